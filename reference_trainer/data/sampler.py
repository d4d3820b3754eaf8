"""Which items a run draws: endless shuffled epochs, computed from the position alone.

There is no state to store. A resumed run asks for the positions it has not seen and draws what an
uninterrupted run would have drawn.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError


@functools.lru_cache(maxsize=2)  # a batch touches one epoch, or two at the seam
def _epoch_order(num_items: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Order of one epoch: items sorted by random 64-bit keys, int64 `[num_items]`."""
    # NumPy freezes the raw words of a bit generator but not what `Generator.permutation` makes of
    # them, and a run must be resumable after an upgrade.
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_items)
    return np.argsort(keys, kind="stable").astype(np.int64)


def batch_indices(num_items: int, start: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Items at positions start..start+count of an endless sequence of shuffled epochs.

    Every epoch of `num_items` positions holds each item once, in an order given by (seed, epoch).

    Args:
        num_items: size of the data set, at least 1.
        start: first position, counted in images since the start of training, at least 0.
        count: number of positions, at least 0.
        seed: seed of the run, at least 0.

    Returns:
        int64 `[count]`, each in 0..num_items - 1.

    Raises:
        ConfigError: an argument is below its minimum.

    Example:
        >>> whole = batch_indices(10, 0, 25, seed=1)
        >>> bool((whole[7:12] == batch_indices(10, 7, 5, seed=1)).all())
        True
        >>> sorted(whole[10:20].tolist()) == list(range(10))
        True
    """
    for name, value, low in (
        ("num_items", num_items, 1),
        ("start", start, 0),
        ("count", count, 0),
        ("seed", seed, 0),
    ):
        if value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}.")
    first, last = start // num_items, (start + count) // num_items
    epochs = [_epoch_order(num_items, seed, epoch) for epoch in range(first, last + 1)]
    offset = start - first * num_items
    return np.concatenate(epochs)[offset : offset + count]


def entropy(seed: int, nimg: int, use: int) -> int:
    """64 well-mixed bits of (seed, images seen, use): neighbouring seeds share no stream."""
    mixed = np.random.SeedSequence((seed, nimg), spawn_key=(use,)).generate_state(1, np.uint64)
    return int(mixed[0])
