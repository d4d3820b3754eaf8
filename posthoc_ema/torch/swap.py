"""Averages in a model for a while, and the weights back afterwards, whatever happens in between."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from posthoc_ema.codecs import AnyArray
from posthoc_ema.errors import TrackingError
from posthoc_ema.synthesis import synthesize
from posthoc_ema.torch.distributed.ranks import replica_group
from posthoc_ema.torch.distributed.sharding import (
    is_sharded,
    layout_of,
    local_part,
    whole_from_part,
)
from posthoc_ema.torch.parameters import named_tensors
from posthoc_ema.torch.peft_names import adapter_tensors

if TYPE_CHECKING:
    from posthoc_ema.torch.tracker import Tracker

_in_use: set[int] = set()
"""Ids of the tensors that hold averages now; each is kept alive by the context that put it here."""


def is_swapped(model: nn.Module) -> bool:
    """Whether some tensors of the model hold averages now, see `swap_in`."""
    if not _in_use:
        return False
    return any(id(p) in _in_use for p in model.parameters()) or any(
        id(b) in _in_use for b in model.buffers()
    )


# ---- putting tensors into a module and back


@contextlib.contextmanager
def swap_in(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor | AnyArray],
    *,
    train: bool | None = False,
) -> Iterator[nn.Module]:
    """Put tensors into a module for the length of a `with` block.

    Values are copied into the live tensors in place, so optimizers, tied weights, DistributedDataParallel
    and torch.compile keep what they hold. At the end, by an exception too, the module has its weights,
    its buffers (all of them) and the train flag of every submodule as they were, bit for bit. A step of
    an optimizer on the swapped weights is refused before it changes anything.

    Args:
        model: the module; wrappers are fine. It needs memory for a copy of what is replaced, on its
            own device.
        tensors: name -> values of the tensor's shape, under the names of the bare model's state_dict;
            tensors that are not named stay as they are. Each takes the dtype and device of its target.
        train: train flag of the model inside: False evaluates (dropout off), True trains, None leaves
            the flags alone.

    Yields:
        The module.

    Raises:
        TrackingError: a name or shape is not the model's, or the model is swapped already.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> with swap_in(model, {"weight": torch.zeros(1, 1), "bias": torch.ones(1)}):
        ...     print(model(torch.tensor([5.0])).item(), model.training)
        1.0 False
        >>> model.training
        True
    """
    with _swap(model, _targets(model, tensors), train):
        yield model


Target = tuple[torch.Tensor, torch.Tensor | None]
"""A live tensor and its new values; None if another rank sends them."""


@contextlib.contextmanager
def _swap(
    model: nn.Module,
    targets: Sequence[Target],
    train: bool | None,
    share: Callable[[torch.Tensor], None] = lambda target: None,
) -> Iterator[None]:
    """Fill targets, for a while. `share` is called on each when it has been filled."""
    if is_swapped(model):
        raise TrackingError(
            "the model is swapped already, and swaps do not nest. Leave the first `with` block before "
            "the second."
        )
    backup = Backup(model, [target for target, _ in targets])
    try:
        _in_use.update(id(target) for target, _ in targets)
        with _no_steps(targets):
            for target, values in targets:
                if values is not None:
                    _fill(target, values)
                share(target)
            torch.clear_autocast_cache()  # it holds casts of the weights as they were
            if train is not None:
                model.train(train)
            yield
    finally:
        try:
            _reshard(model)
            backup.restore()
        except KeyboardInterrupt:  # half of the weights would be averages
            backup.restore()
            raise
        finally:
            torch.clear_autocast_cache()
            _in_use.difference_update(id(target) for target, _ in targets)


def _targets(
    model: nn.Module, tensors: Mapping[str, torch.Tensor | AnyArray | None]
) -> list[Target]:
    """Live tensors and their new values, tied tensors once; nothing has been changed yet."""
    _reshard(model)
    live = adapter_tensors(model) or {}
    if not tensors.keys() <= live.keys():
        live |= dict(named_tensors(model, "all"))
    found: dict[int, Target] = {}
    for name, given in tensors.items():
        if name not in live:
            raise TrackingError(
                f"{name!r} is no tensor of this {type(model).__name__}. Swap into the model that was "
                "tracked, or one of the same class and configuration."
            )
        values = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
        if values is not None and live[name].shape != values.shape:
            raise TrackingError(
                f"{name!r} has shape {tuple(live[name].shape)} in this model and {tuple(values.shape)} in "
                "the average. Swap into a model of the same configuration."
            )
        found[id(live[name])] = (live[name], values)
    return list(found.values())


@torch.inference_mode(False)
@torch.no_grad()
def _fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a live tensor, whole or sharded; each rank its part."""
    if is_sharded(values) and not (
        is_sharded(target) and layout_of(target).box == layout_of(values).box
    ):
        # Averages that replicas have split: every rank needs the whole.
        part = local_part(values).to(target.device)
        values = whole_from_part(part, layout_of(values)).full_tensor()  # type: ignore[attr-defined]
    if is_sharded(target):
        box = layout_of(target).box
        local_part(target).copy_(local_part(values) if is_sharded(values) else values[box])
    else:
        target.copy_(values)


def _reshard(model: nn.Module) -> None:
    """FSDP2: drop gathered weights, which would be stale once their shards change."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()


@contextlib.contextmanager
def _no_steps(targets: Sequence[Target]) -> Iterator[None]:
    ids = {id(target) for target, _ in targets}

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
            raise TrackingError(
                f"{type(optimizer).__name__}.step() inside `swapped`: it would train the averages, and "
                "the step would be lost. Leave the `with` block before you train."
            )

    handle = register_optimizer_step_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


class Backup:
    """What a module has to get back.

    Args:
        model: the module.
        replaced: its tensors that will hold other values; all buffers are saved as well.
    """

    def __init__(self, model: nn.Module, replaced: list[torch.Tensor]) -> None:
        ids = {id(tensor) for tensor in replaced}
        self._flags = [(module, module.training) for module in model.modules()]
        self._slots: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._values: dict[int, torch.Tensor] = {}
        for module in model.modules():
            parameters = [item for item in module._parameters.items() if id(item[1]) in ids]
            self._save(module._parameters, parameters)
            self._save(module._buffers, list(module._buffers.items()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _save(
        self, owner: dict[str, Any], items: Sequence[tuple[str, torch.Tensor | None]]
    ) -> None:
        for key, tensor in items:
            if tensor is None:
                continue
            self._slots.append((owner, key, tensor))
            if id(tensor) not in self._values:  # tied tensors have several slots
                self._values[id(tensor)] = tensor.detach().clone()

    def restore(self) -> None:
        """Put everything back, also into tensors that were re-assigned, moved or cast meanwhile."""
        self.restore_flags()
        for owner, key, tensor in self._slots:
            if owner.get(key) is not tensor:
                owner[key] = tensor
            values = self._values[id(tensor)]
            as_before = tensor.dtype == values.dtype and tensor.device == values.device
            if as_before and tensor.shape == values.shape:
                with torch.inference_mode(False), torch.no_grad():
                    tensor.copy_(values)
            else:
                tensor.data = values

    def restore_flags(self) -> None:
        """Put the train flag of every submodule back."""
        for module, flag in self._flags:
            module.training = flag


# ---- averages of a tracker


@contextlib.contextmanager
def swapped(
    tracker: Tracker,
    model: nn.Module | None = None,
    *,
    sigma_rel: float,
    at: int | None = None,
    train: bool | None = False,
    snapshot: bool = False,
    broadcast: bool = False,
) -> Iterator[nn.Module]:
    """Evaluate an average while training runs: it is in the model for the length of a `with` block.

    A tracked length without `at` is the average in memory, as of the last update: nothing is read. Any
    other length, or time, is synthesized from the stored snapshots, in host memory (4 bytes per
    parameter), with the buffers of that time; it ends at the last *stored* time unless `snapshot` asks
    for one of now.

    With averages on all ranks (FSDP2, shard_averages=True) every rank calls this. Of replicas the first
    rank alone has the averages: it may call this alone, or all of them with `broadcast`.

    Args:
        tracker: what tracks the model.
        model: where the average goes; the tracked model by default. It may be wrapped, or another
            instance of the same class.
        sigma_rel: relative length in (0, 0.2887].
        at: stored training time at which the average ends; by default now (tracked lengths) or the
            last stored one.
        train: train flag inside, see `swap_in`.
        snapshot: store the averages as of now first, if the length is not a tracked one.
        broadcast: the first rank sends the average to the other replicas, which call this as well.
            Nothing is different where there is one process, or where every rank has its part.

    Yields:
        The model.

    Raises:
        TrackingError: nothing has been averaged yet, or what `swap_in` raises.
        SnapshotNotFoundError: nothing is stored, or nothing at `at`.
        InvalidProfileError: sigma_rel lies outside the family.

    Example:
        >>> import tempfile
        >>> from posthoc_ema.torch import Tracker
        >>> model = torch.nn.Linear(1, 1)
        >>> tracker = Tracker(model, tempfile.mkdtemp() + "/snapshots", sigma_rels=(0.1,), every=1)
        >>> before = model.weight.item()
        >>> tracker.step()
        >>> _ = model.weight.data.fill_(7.0)
        >>> with swapped(tracker, sigma_rel=0.1):
        ...     model.weight.item() == before
        True
        >>> model.weight.item()
        7.0
    """
    model = tracker._model.module if model is None else model
    tracker._settle()
    average = functools.partial(_average, tracker, sigma_rel, at, snapshot)
    if broadcast and not tracker._ranks.sharded and len(tracker._ranks.members) > 1:
        entries = tracker._model.table.entries.values()
        in_memory = _in_memory(tracker, sigma_rel, at)
        names = [entry.name for entry in entries if entry.averaged or not in_memory]
        swap = _from_first_rank(tracker, model, names, average, train)
    else:
        swap = _swap(model, _targets(model, average()), train)
    with swap:
        tracker._swapped = model_is_tracked = is_swapped(tracker._model.module)
        try:
            yield model
        finally:
            if model_is_tracked:
                tracker._swapped = False


def _in_memory(tracker: Tracker, sigma_rel: float, at: int | None) -> bool:
    return at is None and sigma_rel in tracker.sigma_rels


def _average(
    tracker: Tracker, sigma_rel: float, at: int | None, snapshot: bool
) -> Mapping[str, torch.Tensor | AnyArray]:
    if not tracker._ranks.tracks:  # nor may it read the store, to which the first rank is writing
        raise TrackingError(
            f"the averages of replicas are on rank {tracker._ranks.members[0]}. Call swapped there alone, or "
            "on all ranks with broadcast=True."
        )
    if _in_memory(tracker, sigma_rel, at):
        if tracker.failure is not None:
            raise TrackingError(
                f"there is no average of now: tracking stopped before ({tracker.failure}). Stored ones are "
                "there: name a time with at=."
            )
        return tracker.averages(sigma_rel)
    if snapshot and at is None:
        tracker.snapshot()
    tracker.flush()
    return synthesize(tracker.store, sigma_rel, at)


def _from_first_rank(
    tracker: Tracker,
    model: nn.Module,
    names: Sequence[str],
    average: Callable[[], Mapping[str, torch.Tensor | AnyArray]],
    train: bool | None,
) -> contextlib.AbstractContextManager[None]:
    """The swap of a replica: the first rank has the average and sends it, tensor by tensor.

    Raises:
        TrackingError: the first rank has no average; on all ranks.
    """
    distributed = torch.distributed
    group, first = replica_group(tracker._model.module), tracker._ranks.members[0]
    tensors: dict[str, torch.Tensor | AnyArray | None] = dict.fromkeys(names)
    error: Exception | None = None
    if tracker._ranks.writes:
        try:
            found = average()
            tensors = {name: found[name] for name in names}
        except Exception as problem:
            error = problem
    targets = _targets(model, tensors)
    is_there = torch.tensor([error is None], dtype=torch.uint8, device=targets[0][0].device)
    distributed.broadcast(is_there, src=first, group=group)
    if error is not None:
        raise error
    if not is_there.item():
        raise TrackingError(f"rank {first} has no average to send; its own error says why.")

    @torch.inference_mode(False)
    @torch.no_grad()
    def send(target: torch.Tensor) -> None:
        if target.numel():
            flat = target.detach().reshape(-1)
            distributed.broadcast(flat.view(torch.uint8), src=first, group=group)
            target.copy_(flat.view_as(target))  # nothing but work if flat is no copy

    return _swap(model, targets, train, send)
