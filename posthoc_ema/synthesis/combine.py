"""Executing a synthesis: stream all inputs once, a tile of elements at a time, into all targets.

The inputs are divided among threads. A tile's sums go from thread to thread, each adds its own inputs:
every file is read and checked in order by one thread, nothing is summed twice, and the result does not
depend on who is faster. Memory is bounded by the tile, not by the model or the number of inputs.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.codecs import AnyArray, Float32Array, decode
from posthoc_ema.synthesis.arithmetic import Arithmetic, basis, choose
from posthoc_ema.synthesis.reading import Piece, SnapshotReader, SnapshotSource, Source
from posthoc_ema.synthesis.streams import (
    READERS,
    AheadStream,
    CachedStream,
    Stream,
    block_bytes,
    is_cold,
    pages,
)

TILE = 1 << 17
"""Elements that are combined at once: 16 inputs of a tile in float16 are 4 MiB."""
_GROUP = 16  # inputs whose tiles are in memory together, of each thread
_TILE_TARGETS = 1 << 21  # elements of a tile times targets
_SLOTS_AHEAD = 2  # tiles under way besides one for each thread
_MAX_WORKERS = 8
_WORTH_A_THREAD = 1 << 20  # elements of all inputs
_OPEN_FILES = 400  # common limit of descriptors is 1024


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


@dataclass(frozen=True)
class _Task:
    """What is done with the tiles of one group.

    Attributes:
        sizes: name -> number of elements.
        num_targets: targets of the group.
        weights: of the sums, float32, (num_sums, num_sources).
        summed: target that each sum is, (num_sums).
        derived: targets that are made of the sums, (num_derived).
        matrix: how, float32, (num_derived, num_sums).
        copied: (target, source) of targets that are one input.
    """

    sizes: Mapping[str, int]
    num_targets: int
    weights: Float32Array
    summed: tuple[int, ...]
    derived: tuple[int, ...]
    matrix: Float32Array
    copied: tuple[tuple[int, int], ...]

    @staticmethod
    def of(group: Group) -> _Task:
        weights = group.weights
        # A target that is one input is copied: 0 times another input that holds inf or nan would be nan.
        copied = [
            (i, int(np.argmax(row)))
            for i, row in enumerate(weights)
            if np.count_nonzero(row) == 1 and row.max() == 1
        ]
        rest = [i for i in range(len(weights)) if i not in dict(copied)]
        few = basis(weights[rest])
        chosen, matrix = (list(range(len(rest))), np.eye(len(rest))) if few is None else few
        others = [i for i in range(len(rest)) if i not in chosen]
        summed = [rest[i] for i in chosen]
        return _Task(
            group.sizes,
            len(weights),
            weights[summed].astype(np.float32),
            tuple(summed),
            tuple(rest[i] for i in others),
            matrix[others].astype(np.float32),
            tuple(copied),
        )


@dataclass
class _Slot:
    """Memory of one tile on its way through the threads."""

    sums: Any
    out: Float32Array
    empty: bool = True  # whether nothing is in the sums yet
    values: Float32Array = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    tile: list[Piece] = field(default_factory=list)


def combine(
    sources: Sequence[Source | SnapshotSource],
    groups: Sequence[Group],
    *,
    device: str | None = None,
) -> Iterator[Block]:
    """Stream tensors from all sources into all targets; every byte of the inputs is read once.

    Args:
        sources: the inputs, (num_sources).
        groups: which tensors, with which coefficients; no tensor is in two groups.
        device: where the sums are made: "numpy", or a device of PyTorch such as "cpu" or "cuda"; by
            default PyTorch's "cpu" if it is imported already or pays its import, else NumPy.

    Yields:
        Blocks, group by group, in the order of the tensors. A value that is not finite in an input
        makes the results that it enters not finite.

    Raises:
        SnapshotFormatError: a file is missing or damaged; the message names it and the tensor.
        ConfigError: the device is not there.
    """
    tasks = [_Task.of(group) for group in groups]
    names = [name for group in groups for name in group.sizes]
    elements = sum(size for group in groups for size in group.sizes.values()) * len(sources)
    make, around = choose(device, 2 * elements)
    with ExitStack() as stack:
        stack.enter_context(around)
        readers = _open(sources, names, stack)
        unit = max((s.unit for s in sources if isinstance(s, SnapshotSource)), default=1)
        count = _num_workers(len(sources), elements)
        yield from _Relay(readers, tasks, unit, count, make).run()


def _num_workers(num_sources: int, elements: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _MAX_WORKERS, num_sources, elements // _WORTH_A_THREAD))


def _open(
    sources: Sequence[Source | SnapshotSource], names: Sequence[str], stack: ExitStack
) -> list[Any]:
    """A reader of each source: itself, or one pass over its file, read ahead if it is not cached."""
    files = [s for s in sources if isinstance(s, SnapshotSource)]
    keep_open = len(files) <= _OPEN_FILES
    ranges = {id(s): s.ranges(names) for s in files}
    cold = {id(s) for s in files if is_cold(s.path, ranges[id(s)])}
    if cold:
        executor = stack.enter_context(ThreadPoolExecutor(READERS, "phema-read"))
        memory = pages(2 * len(cold), block_bytes(len(cold)))
    readers: list[Any] = []
    for source in sources:
        if not isinstance(source, SnapshotSource):
            readers.append(source)
            continue
        stream: Stream
        if id(source) in cold:
            own = [memory.pop(), memory.pop()]
            stream = AheadStream(source.path, ranges[id(source)], own, executor)
        else:
            stream = CachedStream(source.path, ranges[id(source)], keep_open)
        reader = source.reader(stream, names)
        readers.append(reader)
        stack.callback(reader.close)
    return readers


class _Relay:
    """Threads that hand tiles on, each with its share of the inputs."""

    def __init__(
        self,
        readers: Sequence[Any],
        tasks: Sequence[_Task],
        unit: int,
        count: int,
        make: Callable[[], Arithmetic],
    ) -> None:
        self._readers, self._tasks, self._make = readers, tasks, make
        most = max((task.num_targets for task in tasks), default=1)
        width = max(min(TILE, _TILE_TARGETS // max(most, 1)), min(TILE, 4096))
        width = min(width, max((sum(t.sizes.values()) for t in tasks), default=1) or 1)
        self._width = max(width // unit, 1) * unit
        self._unit = unit
        bounds = np.linspace(0, len(readers), count + 1).round().astype(int).tolist()
        self._shares = list(itertools.pairwise(bounds))
        # queues[i] is what thread i takes from; the last is what the caller takes from.
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count + 1)]

    def run(self) -> Iterator[Block]:
        """The blocks, in order; ends the threads when it is left."""
        threads = [
            threading.Thread(target=self._work, args=(i,), name=f"phema-sum-{i}", daemon=True)
            for i in range(len(self._shares))
        ]
        for thread in threads:
            thread.start()
        try:
            while (slot := self._queues[-1].get()) is not None:
                if isinstance(slot, BaseException):
                    raise slot
                for piece in slot.tile:
                    span = slice(piece.position, piece.position + piece.stop - piece.start)
                    yield Block(piece.name, piece.start, slot.values[:, span])
                self._queues[0].put(slot)
        finally:
            self._queues[0].put(None)
            for thread in threads:
                thread.join()

    def _slots(self, arithmetic: Arithmetic) -> Iterator[_Slot]:
        """Memory for all tiles under way."""
        sums = max((len(task.weights) for task in self._tasks), default=0)
        most = max((task.num_targets for task in self._tasks), default=0)
        for _ in range(len(self._shares) + _SLOTS_AHEAD):
            out = np.empty((most, self._width), dtype=np.float32)
            yield _Slot(arithmetic.sums(sums, self._width), out)

    def _work(self, number: int) -> None:
        """Add one share of the inputs to each tile that comes, and hand it on."""
        inbox, outbox = self._queues[number], self._queues[number + 1]
        last = number == len(self._shares) - 1
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # inf and nan of the inputs
                arithmetic = self._make()
                if number == 0:  # not the caller's thread: `make` changes settings of its thread
                    for slot in self._slots(arithmetic):
                        inbox.put(slot)
                for task in self._tasks:
                    share = _Share(self._readers, task, self._shares[number], arithmetic)
                    for tile in _tiles(task.sizes, self._width, self._unit):
                        slot = inbox.get()
                        if not isinstance(slot, _Slot):
                            outbox.put(slot)
                            return
                        if number == 0:
                            slot.tile, slot.empty = tile, True
                        share.add(slot)
                        if last:
                            share.finish(slot)
                        outbox.put(slot)
        except BaseException as error:  # goes to the caller
            outbox.put(error)
        else:
            outbox.put(None)


class _Share:
    """One thread's inputs of one group."""

    def __init__(
        self, readers: Sequence[Any], task: _Task, bounds: tuple[int, int], arithmetic: Arithmetic
    ) -> None:
        self._task, self._arithmetic = task, arithmetic
        used = np.any(task.weights != 0, axis=0)
        self._copies: dict[int, list[int]] = {}
        for target, source in task.copied:
            self._copies.setdefault(source, []).append(target)
        # An input that only is copied takes no part in the sums.
        self._inputs = [(j, readers[j], bool(used[j])) for j in range(*bounds)]
        self._stacks: dict[str, AnyArray] = {}
        self._rows: dict[str, list[tuple[AnyArray, AnyArray]]] = {}  # stored bits, and as bytes
        self._weights: dict[tuple[int, ...], Any] = {}
        self._matrix = arithmetic.weights(task.matrix)
        self._derived = np.empty((0, 0), dtype=np.float32)

    def add(self, slot: _Slot) -> None:
        """Read the tile from all inputs and add it to the sums."""
        tile, sums = slot.tile, slot.sums[: len(self._task.weights)]
        length = tile[-1].position + tile[-1].stop - tile[-1].start
        gaps = length != sum(piece.stop - piece.start for piece in tile)
        for begin in range(0, len(self._inputs), _GROUP):
            rows: dict[str, list[int]] = {}
            for j, reader, used in self._inputs[begin : begin + _GROUP]:
                dtype = None
                if isinstance(reader, SnapshotReader):
                    dtype = reader.stored_dtype(tile)
                kind = dtype or "float32"
                mine = rows.setdefault(kind, [])
                stored, raw = self._row(kind, len(mine), slot)
                if dtype is None:
                    reader.read(tile, stored[:length])
                else:
                    reader.read_stored(tile, raw[: length * stored.itemsize], gaps)
                for target in self._copies.get(j, ()):
                    decode(stored[:length], kind, slot.out[target, :length])
                if used:
                    mine.append(j)
            for kind, mine in rows.items():
                if mine:
                    stack = self._stacks[kind][: len(mine), :length]
                    self._arithmetic.add(sums, self._weights_of(mine), stack, kind, slot.empty)
                    slot.empty = False

    def _row(self, kind: str, row: int, slot: _Slot) -> tuple[AnyArray, AnyArray]:
        if kind not in self._stacks:
            count = min(_GROUP, len(self._inputs))
            stack = self._arithmetic.stack(kind, count, slot.out.shape[1])
            self._stacks[kind] = stack
            self._rows[kind] = list(zip(stack, stack.view(np.uint8), strict=True))
        return self._rows[kind][row]

    def _weights_of(self, inputs: list[int]) -> Any:
        key = tuple(inputs)
        if key not in self._weights:
            self._weights[key] = self._arithmetic.weights(self._task.weights[:, inputs])
        return self._weights[key]

    def finish(self, slot: _Slot) -> None:
        """The targets from the sums."""
        task, tile = self._task, slot.tile
        length = tile[-1].position + tile[-1].stop - tile[-1].start
        out, sums = slot.out[: task.num_targets, :length], slot.sums[: len(task.weights)]
        if slot.empty:
            sums[:] = 0
        if len(task.summed) == task.num_targets:
            slot.values = self._arithmetic.fetch(sums, out)
            return
        if not len(self._derived):
            shape = max(len(task.summed), len(task.derived)), slot.out.shape[1]
            self._derived = np.empty(shape, dtype=np.float32)
        values = self._arithmetic.fetch(sums, self._derived[: len(sums), :length])
        for row, target in enumerate(task.summed):
            out[target] = values[row]
        if task.derived:
            made = self._derived[: len(task.derived), :length]
            self._arithmetic.derive(sums, self._matrix, made)
            for row, target in enumerate(task.derived):
                out[target] = made[row]
        slot.values = out


def _tiles(sizes: Mapping[str, int], width: int, unit: int) -> Iterator[list[Piece]]:
    """Cut the tensors, in order, into tiles of at most `width` elements; small ones share a tile.

    Tensors are cut, and begin in a tile, at multiples of `unit`; `width` is one.
    """
    tile: list[Piece] = []
    position = 0
    for name, size in sizes.items():
        start = 0
        while True:
            stop = min(size, start + width - position)
            tile.append(Piece(name, start, stop, position))
            position, start = position + -(-(stop - start) // unit) * unit, stop
            if position == width:
                yield tile
                tile, position = [], 0
            if start == size:
                break
    if tile:
        yield tile
