"""track(optimizer, model, folder): a tracker that follows the optimizer by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from posthoc_ema.errors import ConfigError, TrackingError
from posthoc_ema.torch.distributed.sharding import check_can_be_tracked
from posthoc_ema.torch.stepping import follow, parameters_of
from posthoc_ema.torch.tracker import Tracker
from posthoc_ema.torch.wrapped_steps import is_optimizer, stepping_parts


class TrackerOptions(TypedDict, total=False):
    """Keyword arguments of `Tracker`, see there."""

    sigma_rels: Sequence[float]
    clock: Literal["steps", "images"]
    samples_per_step: int | None
    update_every: int
    dtype: str
    keep: int | None
    keep_range: tuple[float, float]
    raw: Literal["last", "all", "none"]
    tensors: Literal["auto", "all", "trainable"]
    resume: bool
    run_id: str | None
    metadata: Mapping[str, str] | None
    device: str | torch.device | None
    kernel: Literal["auto", "eager", "compiled", "triton"]
    shard_averages: bool
    average_dtype: Literal["float32", "bfloat16"]
    background: bool
    on_error: Literal["warn", "raise"]


def track(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    every: int | None,
    **options: Unpack[TrackerOptions],
) -> Tracker:
    """Track averages of `model` after each step of `optimizer`, without touching the training loop.

    A step counts once however it is made: with closures, through `super().step()`, inside an optimizer
    that wraps another, compiled. One that a GradScaler makes do nothing does not count. With several
    optimizers an iteration counts once, when all of them have stepped.

    With clock="images", the samples that `advance` was told for a step that a GradScaler skips are not lost:
    they go to the next step that counts. With `samples_per_step` a skipped step adds none.

    Pass the outermost optimizer. One whose `step` PyTorch puts no hooks around (a Lookahead that does not
    call `super().__init__()`, schedulefree's `ScheduleFreeWrapper`, what accelerate prepares) is followed
    by wrapping `step` on the object; it counts when an optimizer inside has stepped.

    Args:
        optimizer: the optimizer that trains the model, or all of them if there are several; hooks
            before and after their `step` are registered.
        model: the module that is trained.
        folder: where the snapshots go.
        every: store a snapshot whenever training time passes a multiple of this; None for none.
        **options: further arguments of `Tracker`: `sigma_rels`, `clock`, `samples_per_step`,
            `update_every`, `dtype`, `keep`, `keep_range`, `raw`, `tensors`, `resume`, `run_id`, `metadata`,
            `device`, `kernel`, `average_dtype`, `background`, `shard_averages`, `on_error`.

    Returns:
        The tracker. Save `tracker.state_dict()` with your checkpoints; `tracker.close()` takes the
        hooks off again.

    Raises:
        TrackingError: the optimizer trains a parameter that the model does not have, or its `step`
            cannot be followed: call Tracker.step() yourself after each step.
        ConfigError: no optimizer was given, or an option is wrong.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> tracker = track(optimizer, model, tempfile.mkdtemp() + "/snapshots", every=1000)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> _ = optimizer.step()
        >>> tracker.time
        1
    """
    one = is_optimizer(optimizer) or not isinstance(optimizer, Iterable)
    optimizers: list[Any] = [optimizer] if one else list(optimizer)  # type: ignore[arg-type]
    if not optimizers:
        raise ConfigError("track needs at least one optimizer, got an empty list.")
    for each in optimizers:
        check_can_be_tracked(model, each)
        for part in stepping_parts(each):
            check_can_be_tracked(model, part)
    owned = {id(parameter) for parameter in model.parameters()}
    trained = [p for each in optimizers for p in parameters_of(each)]
    foreign = [p for p in trained if id(p) not in owned]
    if foreign:
        raise TrackingError(
            f"{len(foreign)} of the optimizer's {len(trained)} parameters are not parameters of "
            f"{type(model).__name__}. Pass the module whose parameters the optimizer was given."
        )
    tracker = Tracker(model, folder, every=every, **options)
    attach(tracker, optimizers)
    return tracker


def attach(tracker: Tracker, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let a tracker count the iterations of these optimizers, until it is closed."""
    report = None if tracker._settings.on_error == "raise" else tracker._report
    iterations, tracker._detach = follow(optimizers, tracker.step, report)
    tracker._settle, tracker._discard = iterations.settle, iterations.discard
