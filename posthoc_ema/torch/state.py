"""The state of a tracker, as it travels in checkpoints: its keys, and checking that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posthoc_ema.errors import TrackingError
from posthoc_ema.snapshot import TensorTable

STATE_SCHEMA = 1
STATE_KEYS = frozenset(
    {
        "schema",
        "run_id",
        "clock",
        "time",
        "last_update",
        "steps",
        "pending",
        "failed",
        "sigma_rels",
        "averages",
    }
)


def check_state(
    state: Mapping[str, Any], sigma_rels: tuple[float, ...], clock: str, table: TensorTable
) -> None:
    """Raise unless `state` fits a tracker of these lengths, this clock and this model.

    Raises:
        TrackingError: it does not; the message names the difference.
    """
    missing = sorted(STATE_KEYS - state.keys())
    if missing and "schema" not in missing:
        raise TrackingError(
            f"this is not the state of a tracker: {missing[0]!r} is missing. Pass what "
            "tracker.state_dict() returned."
        )
    if state.get("schema") != STATE_SCHEMA:
        raise TrackingError(
            f"the tracker's state has schema {state.get('schema')!r}, this version reads "
            f"{STATE_SCHEMA}. Load it with the version that saved it."
        )
    for key, mine in (("sigma_rels", list(sigma_rels)), ("clock", clock)):
        if state[key] != mine:
            raise TrackingError(
                f"{key} of the saved state is {state[key]}, this tracker has {mine}. A run keeps "
                "what it started with; for other values start a new run in a new folder."
            )
    shapes = {e.name: (len(sigma_rels), *e.shape) for e in table.entries.values() if e.averaged}
    given = {name: tuple(tensor.shape) for name, tensor in state["averages"].items()}
    if given and given != shapes:
        name = next(n for n in (*shapes, *given) if shapes.get(n) != given.get(n))
        raise TrackingError(
            f"average {name!r} has shape {given.get(name)} in the saved state and needs "
            f"{shapes.get(name)}. The state belongs to another model."
        )
