"""track(optimizer, model, folder): a tracker that follows the optimizer by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, Unpack

import torch
from torch import nn

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch.tracker import Tracker


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
    resume: bool
    run_id: str | None
    metadata: Mapping[str, str] | None
    on_error: Literal["warn", "raise"]


def track(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    every: int | None,
    **options: Unpack[TrackerOptions],
) -> Tracker:
    """Track averages of `model` after each step of `optimizer`, without touching the training loop.

    Args:
        optimizer: the optimizer that trains the model; a hook after its `step` is registered.
        model: the module that is trained.
        folder: where the snapshots go.
        every: store a snapshot whenever training time passes a multiple of this; None for none.
        **options: further arguments of `Tracker`: `sigma_rels`, `clock`, `samples_per_step`,
            `update_every`, `dtype`, `keep`, `keep_range`, `raw`, `resume`, `run_id`, `metadata`, `on_error`.

    Returns:
        The tracker. Save `tracker.state_dict()` with your checkpoints; `tracker.close()` takes the
        hook off again.

    Raises:
        TrackingError: the optimizer trains a parameter that the model does not have.

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
    owned = {id(parameter) for parameter in model.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in trained if id(p) not in owned]
    if foreign:
        raise TrackingError(
            f"{len(foreign)} of the optimizer's {len(trained)} parameters are not parameters of "
            f"{type(model).__name__}. Pass the module whose parameters the optimizer was given."
        )
    tracker = Tracker(model, folder, every=every, **options)
    handle = optimizer.register_step_post_hook(lambda *_: tracker.step())
    tracker._detach = handle.remove
    return tracker
