"""Features of a stream of images: what metrics need to know of one set of images.

Images come in numbered batches. Each process of a job takes its own batches; statistics are summed over the
processes and single features put back in the order of the images, so the result does not depend on how many
processes there are (but for the rounding of a float64 sum).
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema.errors import MetricError
from reference_trainer.data import Dataset
from reference_trainer.metrics.extractors import Extractor
from reference_trainer.metrics.frechet import FeatureStatistics

T = TypeVar("T")
Keep = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""Says of positions, int64 `[n]`, whether their single features are kept, bool `[n]`."""


class Ranks(Protocol):
    """The processes of a job, see `reference_trainer.distributed`."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this is the first one."""
        ...

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        ...

    def gather(self, value: T) -> list[T] | None:
        """Values of all processes on the first one."""
        ...


class ImageBatch(Protocol):
    """Some images of a set; `reference_trainer.sampling.ImageBatch` is one."""

    @property
    def first(self) -> int:
        """Position of the first one in the set; the others follow it."""
        ...

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """8-bit images, `[n, c, h, w]`."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class that each image was asked to show, `[n]`; None if nobody asked."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images in memory, see `ImageBatch`."""

    first: int
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FeatureSet:
    """What one extractor saw in a set of images.

    Attributes:
        statistics: of all images.
        features: single vectors in the order of the images, float32 `[m, d]`; None if they were not asked
            for, or on another process than the first.
        right: images whose asked class the extractor recognised; None if it has no classes or nobody asked.
    """

    statistics: FeatureStatistics
    features: npt.NDArray[np.float32] | None
    right: int | None


def blocks(count: int, size: int, ranks: Ranks | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of `size` positions out of `count` that are this process's share: every world_size-th one.

    The ranges themselves do not depend on the number of processes.

    Example:
        >>> list(blocks(5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    rank, world = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    for start in range(rank * size, count, world * size):
        yield start, min(start + size, count)


def collect(
    batches: Iterable[ImageBatch],
    extractors: Sequence[Extractor],
    *,
    keep: Mapping[str, Keep] | None = None,
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, FeatureSet]:
    """Run every extractor over every image once.

    Args:
        batches: this process's images.
        extractors: of different names.
        keep: extractor name -> which positions' single features to keep (all: `keep_all`); others keep none.
        ranks: the processes that share the set; None is this one alone.
        on_batch: called after each batch with the number of its images.

    Returns:
        Extractor name -> what it saw in the images of all processes.

    Raises:
        MetricError: the images do not fit an extractor, or its features are not finite.
    """
    parts = {e.name: _Part(e, (keep or {}).get(e.name)) for e in extractors}
    for batch in batches:
        for part in parts.values():
            part.add(batch)
        if on_batch is not None:
            on_batch(len(batch.images))
    return {name: part.result(ranks) for name, part in parts.items()}


def keep_all(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Keep the features of all images."""
    return np.ones(len(positions), dtype=np.bool_)


class _Part:
    """What one extractor has seen so far in this process; sums stay on its device."""

    def __init__(self, extractor: Extractor, keep: Keep | None) -> None:
        self._extractor, self._keep = extractor, keep
        dim = extractor.feature_dim
        self._count = 0
        self._total = torch.zeros(dim, dtype=torch.float64, device=extractor.device)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=extractor.device)
        self._kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        self._right, self._asked = 0, 0

    def add(self, batch: ImageBatch) -> None:
        images = torch.tensor(batch.images).to(self._extractor.device)
        features = self._extractor(images)
        x = features.double()
        self._count += len(x)
        self._total += x.sum(dim=0)
        self._outer.addmm_(x.T, x)
        if self._keep is not None:
            positions = np.arange(batch.first, batch.first + len(x))
            chosen = self._keep(positions)
            self._kept.append((positions[chosen], features.float().cpu().numpy()[chosen]))
        classes = getattr(self._extractor, "classes", None)
        if batch.labels is not None and classes is not None:
            self._right += int((classes(features).cpu().numpy() == batch.labels).sum())
            self._asked += len(batch.labels)

    def result(self, ranks: Ranks | None) -> FeatureSet:
        total, outer = (sums.cpu().numpy() for sums in (self._total, self._outer))
        statistics = FeatureStatistics(self._count, total, outer)
        right, asked = self._right, self._asked
        if ranks is not None and ranks.world_size > 1:
            statistics = reduced(statistics, ranks)
            counts = ranks.sum_(torch.tensor([right, asked]))
            right, asked = (int(n) for n in counts)
        if not np.isfinite(statistics.outer).all():
            raise MetricError(
                f"the {self._extractor.name} features of the images hold NaN or infinity; check the "
                "weights of the extractor."
            )
        features = self._gathered(ranks) if self._keep is not None else None
        return FeatureSet(statistics, features, right if asked else None)

    def _gathered(self, ranks: Ranks | None) -> npt.NDArray[np.float32] | None:
        parts: list[list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]] | None
        parts = [self._kept] if ranks is None else ranks.gather(self._kept)
        if parts is None:
            return None
        kept = [pair for part in parts for pair in part]
        if not kept:
            return np.zeros((0, self._extractor.feature_dim), np.float32)
        order = np.argsort(np.concatenate([positions for positions, _ in kept]), kind="stable")
        return np.concatenate([values for _, values in kept])[order]


def reduced(statistics: FeatureStatistics, ranks: Ranks) -> FeatureStatistics:
    """The statistics of all processes' vectors together, on every process.

    Args:
        statistics: of this process's vectors.
        ranks: the processes; all of them must call this.
    """
    count = ranks.sum_(torch.tensor(statistics.count))
    total = ranks.sum_(torch.from_numpy(statistics.total.copy()))
    outer = ranks.sum_(torch.from_numpy(statistics.outer.copy()))
    return FeatureStatistics(int(count), total.numpy(), outer.numpy())


def in_batches(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None = None,
    *,
    batch_size: int = 64,
    ranks: Ranks | None = None,
) -> Iterator[Images]:
    """Cut images in memory into batches.

    Args:
        images: uint8 `[n, c, h, w]`.
        labels: int64 `[n]`, or None.
        batch_size: images at a time.
        ranks: gives this process's share only.

    Raises:
        MetricError: the labels are not one per image.
    """
    if labels is not None and labels.shape != (len(images),):
        raise MetricError(
            f"labels must be one per image, got shape {list(labels.shape)} for {len(images)} images."
        )
    for start, stop in blocks(len(images), batch_size, ranks):
        yield Images(start, images[start:stop], None if labels is None else labels[start:stop])


def of_dataset(
    dataset: Dataset,
    chosen: npt.NDArray[np.int64],
    *,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    threads: int = min(16, os.cpu_count() or 1),
) -> Iterator[Images]:
    """Read chosen images of a data set, with their labels if it has some, a few batches ahead.

    Args:
        dataset: of pixels.
        chosen: which images, int64 `[n]`; positions in the stream count these.
        batch_size: images at a time.
        ranks: gives this process's share only.
        threads: batches that are read at the same time.

    Raises:
        MetricError: the data set holds latents.
        ConfigError: an image cannot be read; names its file.
    """
    if dataset.kind != "pixels":
        raise MetricError(
            f"{dataset.name} holds latents, and metrics look at images. Give the images that they were "
            "encoded from."
        )

    def read(start: int, stop: int) -> Images:
        values, labels = dataset.read(chosen[start:stop])
        return Images(start, values, labels if dataset.label_dim else None)

    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[Images]] = collections.deque()
        try:
            for start, stop in blocks(len(chosen), batch_size, ranks):
                waiting.append(pool.submit(read, start, stop))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
