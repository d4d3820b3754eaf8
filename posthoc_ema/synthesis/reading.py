"""What a synthesis reads: tiles of elements of one input at a time, checked on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from posthoc_ema.codecs import (
    BLOCK,
    SCALES,
    AnyArray,
    Float32Array,
    decode,
    decode_int8_blocks,
    storage_dtype,
)
from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.streams import CachedStream, Range, Stream, merge
from posthoc_ema.tensor_files import Header, TensorFile, TensorInfo

PLAIN = ("float16", "bfloat16", "float32")
"""dtypes whose stored bits the arithmetic takes as they are."""


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
    """A snapshot file: its header and the checksums of its tensors."""

    path: Path
    header: Header
    digests: dict[str, str]

    @staticmethod
    def open(store: SnapshotStore, record: SnapshotRecord) -> SnapshotSource:
        """The file of a record, its header checked against the manifest."""
        header, digests = store.header(record)
        return SnapshotSource(store.path(record), header, digests)

    @property
    def unit(self) -> int:
        """Tiles must begin at multiples of this within a tensor: int8 has a scale per block."""
        return BLOCK if any(name.endswith(SCALES) for name in self.header.tensors) else 1

    def ranges(self, names: Iterable[str]) -> list[Range]:
        """Where the bytes of some tensors lie, in that order, neighbours joined."""
        infos = (self.header.tensors[name] for name in names)
        return merge((info.start, info.end) for info in infos)

    def reader(self, stream: Stream, names: Iterable[str] = ()) -> SnapshotReader:
        """One pass over the file.

        Args:
            stream: the bytes of the tensors that will be asked for.
            names: those tensors, in order; needed where scales belong to them.
        """
        scales = [n + SCALES for n in names if n + SCALES in self.header.tensors]
        # A scale takes 2 bytes for each 64: so few that the page cache serves them well.
        return SnapshotReader(self, stream, CachedStream(self.path, self.ranges(scales), True))

    def read_copy(self, name: str) -> AnyArray:
        """A whole tensor, as stored, checked."""
        info = self.header.tensors[name]
        with TensorFile(self.path, self.header) as file:
            values = file.read(name)
        digest = xxhash.xxh3_64_hexdigest(values.reshape(-1).view("u1").data)
        self.compare(name, digest)
        return values.reshape(info.shape)

    def compare(self, name: str, digest: str) -> None:
        """Raise unless `digest` is the checksum of tensor `name`.

        Raises:
            SnapshotFormatError: it is another.
        """
        if digest != self.digests[name]:
            raise SnapshotFormatError(
                f"{self.path}: the data of tensor {name!r} is damaged (checksum). Restore the "
                "file from a copy; `phema verify` lists all damaged files, `phema verify --drop` "
                "goes on without them."
            )


class SnapshotReader:
    """One pass over a snapshot file: the running checksums, and where in the bytes it is.

    Args:
        source: the file.
        stream: the bytes of the tensors, in the order in which their tiles are asked for.
        scales: the bytes of the scales that belong to them.
    """

    def __init__(self, source: SnapshotSource, stream: Stream, scales: Stream) -> None:
        self._source, self._stream, self._scales_stream = source, stream, scales
        self._tensors = source.header.tensors
        self._hasher, self._scales_hasher = xxhash.xxh3_64(), xxhash.xxh3_64()

    def stored_dtype(self, tile: Sequence[Piece]) -> str | None:
        """The dtype in which all of a tile is stored, if it is one of `PLAIN`; else None."""
        dtype = self._tensors[tile[0].name].dtype
        if dtype not in PLAIN:
            return None
        if len(tile) > 1 and any(self._tensors[p.name].dtype != dtype for p in tile):
            return None
        return dtype

    def read_stored(self, tile: Sequence[Piece], out: AnyArray, gaps: bool = False) -> None:
        """Read a tile as stored, bytes into `out`, uint8 of shape (tile bytes,), and check it.

        Only for tiles that have a `stored_dtype`; `gaps` if there are some between the pieces.
        """
        if not gaps:
            self._stream.readinto(out)
        for piece in tile:
            info = self._tensors[piece.name]
            begin = (piece.position - tile[0].position) * info.itemsize
            raw = out[begin : begin + (piece.stop - piece.start) * info.itemsize]
            if gaps:
                self._stream.readinto(raw)
            self._check(self._hasher, piece, info, raw)

    def read(self, tile: Sequence[Piece], out: Float32Array) -> None:
        """Read a tile as float32 into `out`, shape (tile length,)."""
        for piece in tile:
            info = self._tensors[piece.name]
            raw = np.empty((piece.stop - piece.start) * info.itemsize, dtype=np.uint8)
            self.read_stored([piece], raw)
            values = out[piece.position : piece.position + piece.stop - piece.start]
            stored = raw.view(storage_dtype(info.dtype))
            if info.dtype == "int8":
                decode_int8_blocks(stored, self._scales(piece, info), values)
            else:
                decode(stored, info.dtype, values)

    def _scales(self, piece: Piece, info: TensorInfo) -> AnyArray:
        """bfloat16 bits of the scales of a piece's blocks."""
        scales = self._tensors[piece.name + SCALES]
        first, last = piece.start // BLOCK, -(-piece.stop // BLOCK)
        raw = np.empty(2 * (last - first), dtype=np.uint8)
        self._scales_stream.readinto(raw)
        self._check(self._scales_hasher, Piece(scales.name, first, last, 0), scales, raw)
        return raw.view(storage_dtype(scales.dtype))

    def _check(self, hasher: xxhash.xxh3_64, piece: Piece, info: TensorInfo, raw: AnyArray) -> None:
        if piece.start == 0:
            hasher.reset()
        hasher.update(raw.data)
        if piece.stop == info.size:
            self._source.compare(info.name, hasher.hexdigest())

    def close(self) -> None:
        """Close the file, end its reading ahead."""
        self._stream.close()
        self._scales_stream.close()
