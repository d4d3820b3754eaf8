"""What a synthesis reads: tiles of elements of one input at a time, checked on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from posthoc_ema.codecs import AnyArray, Float32Array, decode, storage_dtype
from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.store import SnapshotStore
from posthoc_ema.tensor_files import Header, TensorFile, TensorInfo


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of one tensor, at `position` in the tile."""

    name: str
    start: int
    stop: int
    position: int


class Source(Protocol):
    """One input of a synthesis. Tiles are asked for in order, each element once."""

    def read(self, tile: Sequence[Piece], out: Float32Array) -> None:
        """Read a tile as float32 into `out`, shape (tile length,)."""
        ...


@dataclass
class SnapshotSource:
    """A snapshot file: its header, and the running checksum of the tensor that is being read."""

    path: Path
    header: Header
    digests: dict[str, str]
    hasher: Any = field(default_factory=xxhash.xxh3_64)

    @staticmethod
    def open(store: SnapshotStore, record: SnapshotRecord) -> SnapshotSource:
        """The file of a record, its header checked against the manifest."""
        header, digests = store.header(record)
        return SnapshotSource(store.path(record), header, digests)

    def read(self, tile: Sequence[Piece], out: Float32Array) -> None:
        """Read a tile as float32 into `out`, shape (tile length,)."""
        with TensorFile(self.path, self.header) as file:
            for run in self._runs(tile):
                first, last = run[0], run[-1]
                begin = self._position(first[0], first[1].start)
                data = file.read_bytes(begin, self._position(last[0], last[1].stop))
                for info, piece in run:
                    at = self._position(info, piece.start) - begin
                    raw = data[at : at + (piece.stop - piece.start) * info.itemsize]
                    self._check(info, piece, raw)
                    span = slice(piece.position, piece.position + piece.stop - piece.start)
                    decode(raw.view(storage_dtype(info.dtype)), info.dtype, out[span])

    @staticmethod
    def _position(info: TensorInfo, element: int) -> int:
        return info.start + element * info.itemsize

    def _runs(self, tile: Sequence[Piece]) -> Iterator[list[tuple[TensorInfo, Piece]]]:
        """Group pieces whose bytes follow on each other, so that each group is one read."""
        run: list[tuple[TensorInfo, Piece]] = []
        end = -1
        for piece in tile:
            info = self.header.tensors[piece.name]
            if run and self._position(info, piece.start) != end:
                yield run
                run = []
            run.append((info, piece))
            end = self._position(info, piece.stop)
        if run:
            yield run

    def _check(self, info: TensorInfo, piece: Piece, raw: AnyArray) -> None:
        if piece.start == 0:
            self.hasher.reset()
        self.hasher.update(raw.data)
        if piece.stop == info.size and self.hasher.hexdigest() != self.digests[info.name]:
            raise SnapshotFormatError(
                f"{self.path}: the data of tensor {info.name!r} is damaged (checksum). Restore the "
                "file from a copy; `phema verify` lists all damaged files, `phema verify --drop` "
                "goes on without them."
            )

    def read_copy(self, name: str) -> AnyArray:
        """A whole tensor, as stored, checked."""
        info = self.header.tensors[name]
        with TensorFile(self.path, self.header) as file:
            values = file.read(name)
        self._check(info, Piece(name, 0, info.size, 0), values.reshape(-1).view("u1"))
        return values
