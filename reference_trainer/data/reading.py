"""Items read ahead by threads, in order, into memory that a device can copy from while it computes."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from reference_trainer.data.dataset import Dataset, Indices, Values

_CHUNK = 16  # items that one thread reads at a time
_THREADS = 16

Result = TypeVar("Result")


class ItemReader:
    """Reads items of a data set by threads. Close it after use.

    Args:
        dataset: the data set.
        pinned: read into pinned memory, from which a GPU copies by itself.

    Raises:
        ConfigError: the first item cannot be read.
    """

    def __init__(self, dataset: Dataset, pinned: bool = False) -> None:
        self._dataset, self._pinned = dataset, pinned
        first, _ = dataset.read(np.zeros(1, np.int64))
        self._shape, self._dtype = first.shape[1:], torch.from_numpy(first).dtype
        self._pool = ThreadPoolExecutor(num_threads(), "phema-data")

    def begin(self, indices: Indices) -> PendingItems:
        """Start reading items; nothing waits."""
        values = torch.empty(
            (len(indices), *self._shape), dtype=self._dtype, pin_memory=self._pinned
        )
        labels = torch.empty(len(indices), dtype=torch.int64, pin_memory=self._pinned)
        into, labels_into = values.numpy(), labels.numpy()

        def read(start: int) -> None:
            part = slice(start, start + _CHUNK)
            into[part], labels_into[part] = self._dataset.read(indices[part])

        starts = range(0, len(indices), _CHUNK)
        return PendingItems(values, labels, [self._pool.submit(read, start) for start in starts])

    def ahead(self, chunks: Iterable[Indices], count: int = 3) -> Iterator[Values]:
        """Values of one chunk of items after another, `count` chunks read ahead."""
        pending: collections.deque[PendingItems] = collections.deque()
        for chunk in chunks:
            pending.append(self.begin(chunk))
            if len(pending) > count:
                yield pending.popleft().result()[0].numpy()
        while pending:
            yield pending.popleft().result()[0].numpy()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class PendingItems:
    """Items that threads are reading, in chunks."""

    values: Tensor
    labels: Tensor
    chunks: list[Future[None]]

    def result(self) -> tuple[Tensor, Tensor]:
        """Wait for values and labels; the first error of a chunk is raised here."""
        try:
            for chunk in self.chunks:
                chunk.result()
        except BaseException:
            self.cancel()
            raise
        return self.values, self.labels

    def cancel(self) -> None:
        """Drop what has not begun."""
        for chunk in self.chunks:
            chunk.cancel()


def num_threads() -> int:
    """Threads that read: as many as this process may use processors, at most 16."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(_THREADS, len(allowed(0)) if allowed is not None else os.cpu_count() or 1)


def ordered(
    function: Callable[[int], Result], indices: Iterable[int], ahead: int = 256
) -> Iterator[Result]:
    """Results of `function`, computed by threads, in the order of `indices`; at most `ahead` in advance."""
    pending: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(num_threads(), "phema-data") as pool:
        try:
            for index in indices:
                pending.append(pool.submit(function, index))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
