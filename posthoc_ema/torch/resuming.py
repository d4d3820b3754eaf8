"""What adapters of training frameworks share: a new run in a folder that holds another."""

from __future__ import annotations

from pathlib import Path

from posthoc_ema.errors import SnapshotMismatchError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.store import SnapshotStore


def refuse_taken(folder: Path, remedy: str) -> None:
    """Raise if a folder holds a store, when a run starts at its beginning.

    Args:
        folder: where the snapshots are to go.
        remedy: what to do about it, in words of the framework.

    Raises:
        SnapshotMismatchError: it does.
    """
    if (folder / MANIFEST).exists():
        held = SnapshotStore.open(folder)
        raise SnapshotMismatchError(
            f"{folder} already holds run {held.run_id} up to time {max(held.times, default=0)}, and this "
            f"run starts at its beginning. {remedy}"
        )
