"""Executing a synthesis: stream all inputs once, a tile of elements at a time, into all targets.

Memory is bounded by the tile, not by the model, the number of inputs or their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_ema.codecs import Float32Array
from posthoc_ema.synthesis.reading import Piece, Source

TILE = 1 << 18
"""Elements that are combined at once. 2^18 keeps a tile of 31 targets in 32 MiB."""
_GROUP = 32  # inputs whose tiles are in memory together


@dataclass(frozen=True)
class Block:
    """A run of elements of one averaged tensor, for all targets.

    Attributes:
        name: the tensor.
        start: index of its first element in the flattened tensor.
        values: float32, shape (num_targets, num_elements); valid until the next block.
    """

    name: str
    start: int
    values: Float32Array


@dataclass(frozen=True)
class Group:
    """Tensors that are combined with the same coefficients.

    Attributes:
        sizes: name -> number of elements, in the order in which they lie in the inputs.
        weights: coefficient of each input in each target, float64, (num_targets, num_sources).
    """

    sizes: Mapping[str, int]
    weights: npt.NDArray[np.float64]


def combine(sources: Sequence[Source], groups: Sequence[Group]) -> Iterator[Block]:
    """Stream tensors from all sources into all targets; every byte of the inputs is read once.

    Args:
        sources: the inputs, (num_sources).
        groups: which tensors, with which coefficients; no tensor is in two groups.

    Yields:
        Blocks, group by group, in the order of the tensors.

    Raises:
        SnapshotFormatError: a file is missing or damaged; the message names it and the tensor.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for group in groups:
            yield from _combine(sources, group, pool)


def _combine(sources: Sequence[Source], group: Group, pool: ThreadPoolExecutor) -> Iterator[Block]:
    weights = group.weights.astype(np.float32)
    # A target that is one input is copied: 0 times another input that holds inf or nan would be nan.
    copied = [
        (i, int(np.argmax(row)))
        for i, row in enumerate(weights)
        if np.count_nonzero(row) == 1 and row.max() == 1
    ]
    weights[[i for i, _ in copied]] = 0
    # The buffers serve all tiles: fresh ones would cost more in page faults than the arithmetic.
    width = min(TILE, sum(group.sizes.values()))
    total, product = (np.empty((len(weights), width), dtype=np.float32) for _ in range(2))
    values = np.empty((min(_GROUP, len(sources)), width), dtype=np.float32)
    for tile in _tiles(group.sizes):
        length = tile[-1].position + tile[-1].stop - tile[-1].start
        total[:, :length] = 0
        for first in range(0, len(sources), _GROUP):
            some = sources[first : first + _GROUP]
            read = values[: len(some), :length]
            list(pool.map(lambda source, out: source.read(tile, out), some, read))  # noqa: B023
            with np.errstate(over="ignore", invalid="ignore"):  # inf and nan of the inputs
                np.matmul(weights[:, first : first + len(some)], read, out=product[:, :length])
                total[:, :length] += product[:, :length]
            for target, source in copied:
                if first <= source < first + len(some):
                    total[target, :length] = read[source - first]
        for piece in tile:
            span = slice(piece.position, piece.position + piece.stop - piece.start)
            yield Block(piece.name, piece.start, total[:, span])


def _tiles(sizes: Mapping[str, int]) -> Iterator[list[Piece]]:
    """Cut the tensors, in order, into tiles of at most TILE elements; small ones share a tile."""
    tile: list[Piece] = []
    position = 0
    for name, size in sizes.items():
        start = 0
        while True:
            stop = min(size, start + TILE - position)
            tile.append(Piece(name, start, stop, position))
            position, start = position + stop - start, stop
            if position == TILE:
                yield tile
                tile, position = [], 0
            if start == size:
                break
    if tile:
        yield tile
