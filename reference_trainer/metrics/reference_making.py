"""Reference statistics of a data set: every image once through every extractor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from reference_trainer.data import Dataset
from reference_trainer.metrics.collection import Keep, Ranks, collect, of_dataset
from reference_trainer.metrics.extractors import Extractor
from reference_trainer.metrics.reference import Reference

_SEED = 0


def make_references(
    dataset: Dataset,
    extractors: Sequence[Extractor],
    *,
    features: int = 0,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Reference]:
    """Measure a data set.

    Args:
        dataset: of pixels, at least two images.
        extractors: of different names.
        features: number of images, chosen at random, whose single features are kept too, for kernel
            distance, precision and recall; all of them if there are no more.
        batch_size: images at a time.
        ranks: the processes that share the images; all of them must call this.
        on_batch: called after each batch with the number of its images.

    Returns:
        Extractor name -> statistics; empty on other processes than the first.

    Raises:
        ConfigError: `features` or `batch_size` is out of range, or an image cannot be read.
        MetricError: the images do not fit an extractor, or there are fewer than two.
    """
    if features < 0 or batch_size < 1:
        raise ConfigError(
            f"features must be at least 0 and batch_size at least 1, got {features} and {batch_size}."
        )
    everything = np.arange(len(dataset), dtype=np.int64)
    keep = _some(choose(len(dataset), features))
    sets = collect(
        of_dataset(dataset, everything, batch_size=batch_size, ranks=ranks),
        extractors,
        keep={e.name: keep for e in extractors} if features else None,
        ranks=ranks,
        on_batch=on_batch,
    )
    if ranks is not None and not ranks.is_main:
        return {}
    return {
        e.name: Reference(
            e.name,
            sets[e.name].statistics.moments,
            sets[e.name].features,
            e.weights_hash,
            dataset.name,
            dataset.fingerprint,
        )
        for e in extractors
    }


def choose(count: int, wanted: int, seed: int = _SEED) -> npt.NDArray[np.int64]:
    """A random choice without repetition, in random order: min(count, wanted) of 0..count - 1.

    Example:
        >>> sorted(choose(3, 9).tolist())
        [0, 1, 2]
    """
    return np.random.default_rng(seed).permutation(count)[:wanted].astype(np.int64)


def _some(chosen: npt.NDArray[np.int64]) -> Keep:
    return lambda positions: np.isin(positions, chosen)
