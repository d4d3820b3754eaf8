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
    return Mark(counter_of(optimizer), _fingerprint(parameters_of(optimizer)))


def _spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    return items[:: -(-len(items) // most)] if items else items


def counter_of(optimizer: Optimizer) -> int | None:
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
        exact: whether the weights are those of the state, as far as can be seen.
    """

    saved: SavedState
    gap: int = 0
    exact: bool = True


def is_empty(folder: Path) -> bool:
    """Whether a store holds nothing that could be lost: its run ended before the first snapshot."""
    return not SnapshotStore.open(folder).times and not saved_states(folder / STATE_FOLDER)


def exact_state(folder: Path, mark: Mark) -> SavedState | None:
    """The newest saved state of a store that belongs to a run that stands at `mark`; None without one."""
    exact = [state for state in _readable_states(folder) if _fits(_mark_in(state), mark)]
    # The same weights at several times (a learning rate of 0): the counter decides.
    same = [state for state in exact if _mark_in(state).counter == mark.counter]
    fitting = same or exact
    return fitting[-1] if fitting else None


def find_state(folder: Path, mark: Mark, nearest: bool) -> Continuation:
    """The saved state of a store that a run that stands at `mark` continues from.

    Args:
        folder: of the store.
        mark: of the optimizer before its first step in this process.
        nearest: take the newest state that is not later, if none belongs exactly; the optimizer's own
            count of steps tells which that is, and how many steps were not tracked.

    Raises:
        TrackingError: none fits; the message names what is there, what was found, and the choices.
    """
    exact = exact_state(folder, mark)
    if exact is not None:
        return Continuation(exact)
    states = _readable_states(folder)
    if nearest and mark.counter is not None:
        counted = [(state, _mark_in(state).counter) for state in states]
        earlier = [(s, mark.counter - c) for s, c in counted if c is not None and c <= mark.counter]
        if earlier:
            return Continuation(*earlier[-1], exact=False)
    raise TrackingError(_mismatch(folder, states, mark, nearest))


def times_of(states: Sequence[SavedState]) -> str:
    """Where one can continue: by the optimizer's count of steps, or by time if it does not count."""
    return ", ".join(str(_mark_in(s).counter or s.time) for s in states) or "none"


def _readable_states(folder: Path) -> list[SavedState]:
    return [state for state in saved_states(folder / STATE_FOLDER) if _is_readable(state)]


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
    later = " (none of them is earlier)" if nearest and mark.counter else ""
    return (
        f"{folder} holds the snapshots of a run up to {reached}, with states to continue from at "
        f"{times_of(states)}{later}; this one starts at {_place(states, mark)}. Let the script load a "
        f"checkpoint of one of those steps{_advice(states, mark)}, or choose: {_nearest(mark)}"
        "--restart discards the snapshots, another --out keeps them."
    )


def _place(states: Sequence[SavedState], mark: Mark) -> str:
    if mark.counter:
        same = any(_mark_in(state).counter == mark.counter for state in states)
        return f"step {mark.counter} of the optimizer" + ", with other weights" * same
    if _counts(states):
        return (
            "its beginning, or from weights alone: the optimizer is new (no steps made), and the weights "
            "belong to no saved state"
        )
    return "weights that belong to no saved state, and its optimizer does not count steps"


def _advice(states: Sequence[SavedState], mark: Mark) -> str:
    if mark.counter:
        return ""
    if _counts(states):
        return ", with the state of its optimizer (save that as well: optimizer.state_dict())"
    return ", which is recognised by its weights if it saves optimizer.state_dict() as well"


def _nearest(mark: Mark) -> str:
    if mark.counter:
        return "--resume nearest continues from the newest that is not later, "
    return (
        "--resume nearest goes by the steps that the optimizer has counted, and finds none here, "
    )


def _counts(states: Sequence[SavedState]) -> bool:
    return not states or any(_mark_in(state).counter is not None for state in states)
