"""Keeping a store within its budget while training runs on."""

from __future__ import annotations

from posthoc_ema.profiles import PointProfile
from posthoc_ema.retention import keep_online
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.measuring import measure


def thin_out(store: SnapshotStore, keep: int, keep_range: tuple[float, float]) -> None:
    """Remove what a store of `keep` averages can best do without; raw weights do not count.

    Args:
        store: open for writing.
        keep: averages that stay.
        keep_range: lengths that will be asked for, (low, high).
    """
    averages = [r for r in store.records if not isinstance(r.profile, PointProfile)]
    if len(averages) <= keep:
        return
    noise = measure(store, averages).fit_noise
    drop = keep_online([r.profile for r in averages], noise, keep, keep_range)
    store.remove([averages[i] for i in drop])
