"""How far a run has got, seen from its optimizer; and the saved state that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.optim import Optimizer

from posthoc_ema.errors import SnapshotError, TrackingError
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.state_files import SavedState, saved_states
from posthoc_ema.torch.stepping import parameters_of

_PARAMETERS = 64
_ELEMENTS = 16
STATE_FOLDER = "state"


@dataclass(frozen=True)
class Mark:
    """Where training stands.

    Attributes:
        counter: steps that the optimizer says it has made; None if it does not count (SGD).
        fingerprint: hash of a sample of its parameters' bits; None if they are sharded, because the
            sample would depend on the number of ranks.
    """

    counter: int | None
    fingerprint: str | None


def mark_of(optimizer: Optimizer) -> Mark:
    """The mark of an optimizer as of now; waits for its device."""
    return Mark(_counter(optimizer), _fingerprint(parameters_of(optimizer)))


def _spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    return items[:: -(-len(items) // most)] if items else items


def _counter(optimizer: Optimizer) -> int | None:
    """The optimizer's own count: "step" of a parameter's state, or of a group ("k": schedule-free)."""
    trained = [p for p in parameters_of(optimizer) if "step" in optimizer.state.get(p, {})]
    counts = [optimizer.state[p]["step"] for p in _spread(trained, 8)]
    counts += [g[key] for g in optimizer.param_groups for key in ("step", "k") if key in g]
    whole = [int(c) for c in counts if isinstance(c, int | float | torch.Tensor)]
    return max(whole) if whole else None


@torch.no_grad()
def _fingerprint(parameters: Sequence[torch.Tensor]) -> str | None:
    digest = xxhash.xxh3_128()
    for parameter in _spread(parameters, _PARAMETERS):
        if hasattr(parameter, "device_mesh"):
            return None
        values = parameter.detach().reshape(-1)
        if not len(values):
            continue  # has no bits to look at, and cannot be viewed as bytes
        sample = values[:: max(1, len(values) // _ELEMENTS)][:_ELEMENTS].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def extra_of(mark: Mark) -> dict[str, Any]:
    """What is saved beside a tracker's state to recognise it by."""
    return {"counter": mark.counter, "fingerprint": mark.fingerprint}


def _mark_in(saved: SavedState) -> Mark:
    return Mark(saved.extra.get("counter"), saved.extra.get("fingerprint"))


@dataclass(frozen=True)
class Continuation:
    """The state to continue from.

    Attributes:
        saved: the state.
        gap: optimizer steps that were made since without being tracked.
    """

    saved: SavedState
    gap: int


def is_empty(folder: Path) -> bool:
    """Whether a store holds nothing that could be lost: its run ended before the first snapshot."""
    return not SnapshotStore.open(folder).times and not saved_states(folder / STATE_FOLDER)


def find_state(folder: Path, mark: Mark, nearest: bool) -> Continuation:
    """The saved state of a store that belongs to a run that stands at `mark`.

    Args:
        folder: of the store.
        mark: of the optimizer before its first step in this process.
        nearest: take the newest state that is not later, if none belongs exactly.

    Raises:
        TrackingError: none fits; the message names what is there, what was found, and the choices.
    """
    states = [state for state in saved_states(folder / STATE_FOLDER) if _is_readable(state)]
    exact = [state for state in states if _fits(_mark_in(state), mark)]
    if exact:
        # The same weights at several times (a learning rate of 0): the counter decides.
        same = [state for state in exact if _mark_in(state).counter == mark.counter]
        return Continuation((same or exact)[-1], 0)
    if nearest:
        counts = any(_mark_in(state).counter is not None for state in states)
        now = mark.counter if mark.counter is not None or not counts else 0
        earlier = [s for s in states if now is None or (_mark_in(s).counter or 0) <= now]
        if earlier:
            then = _mark_in(earlier[-1]).counter
            return Continuation(earlier[-1], now - then if now and then is not None else 0)
    raise TrackingError(_mismatch(folder, states, mark, nearest))


def _is_readable(state: SavedState) -> bool:
    try:
        return isinstance(state.extra, dict)
    except (SnapshotError, OSError):  # damaged or just removed: an older one may do
        return False


def _fits(saved: Mark, now: Mark) -> bool:
    if saved.fingerprint is not None and now.fingerprint is not None:
        return saved.fingerprint == now.fingerprint
    return saved.counter is not None and saved.counter == now.counter


def _mismatch(folder: Path, states: Sequence[SavedState], mark: Mark, nearest: bool) -> str:
    reached = max(SnapshotStore.open(folder).times, default=0)
    times = ", ".join(str(_mark_in(s).counter or s.time) for s in states) or "none"
    now = "its beginning" if not mark.counter else f"step {mark.counter} of the optimizer"
    same = any(_mark_in(s).counter == mark.counter and mark.counter for s in states)
    weights = ", with other weights" if same else ""
    later = " (none of them is earlier)" if nearest else ""
    return (
        f"{folder} holds the snapshots of a run up to {reached}, with states to continue from at "
        f"{times}{later}; this one starts at {now}{weights}. Let the script load a checkpoint of one of "
        "those steps, or choose: --resume nearest continues from the newest that is not later, "
        "--restart discards the snapshots, another --out keeps them."
    )
