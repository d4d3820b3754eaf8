"""Snapshot files: reading one or a chain of them with every byte checked, and writing one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_ema.codecs import (
    BLOCK,
    SCALES,
    AnyArray,
    Float32Array,
    decode,
    decode_int8_blocks,
    encode,
    encode_int8_blocks,
    fits,
    storage_dtype,
)
from posthoc_ema.errors import SnapshotError, SnapshotFormatError, SnapshotMismatchError
from posthoc_ema.snapshot import (
    SnapshotMetadata,
    SnapshotRecord,
    TensorEntry,
    TensorTable,
    noise_text,
)
from posthoc_ema.tensor_files import (
    Header,
    TensorFile,
    TensorFileWriter,
    byte_view,
    read_header,
)

CHUNK = 1 << 20
"""Elements that are handled at once, a multiple of `codecs.BLOCK`."""

RESTORE = "Restore the file from a copy, or take it out of the store: `phema verify --drop`."


_AVERAGES = {"float32", "float16", "bfloat16", "int8"}
"""What averages are stored in."""


def check_tensors(path: Path, header: Header, table: TensorTable) -> None:
    """Raise unless a file holds exactly the tensors of the table, and the scales of int8 ones.

    Raises:
        SnapshotMismatchError: a tensor is missing, extra, or of another shape or dtype.
    """
    rule = "All snapshots of a store must come from one model."
    expected: dict[str, tuple[int, ...]] = {}
    for name, entry in table.entries.items():
        expected[name] = entry.shape
        info = header.tensors.get(name)
        if entry.averaged and info is not None and info.dtype == "int8":
            expected[name + SCALES] = (-(-info.size // BLOCK),)
    for name, shape in expected.items():
        info = header.tensors.get(name)
        if info is None:
            raise SnapshotMismatchError(f"{path}: tensor {name!r} is missing. {rule}")
        row = table.entries.get(name)  # None: the scales of an average
        stored = {"bfloat16"} if row is None else _AVERAGES if row.averaged else {row.dtype}
        if info.dtype not in stored:
            raise SnapshotMismatchError(
                f"{path}: tensor {name!r} is stored in {info.dtype}, not in "
                f"{' or '.join(sorted(stored))}. {rule}"
            )
        if info.shape != shape:
            raise SnapshotMismatchError(
                f"{path}: tensor {name!r} has shape {info.shape}, the store says {shape}. {rule}"
            )
    extra = sorted(set(header.tensors) - set(expected))
    if extra:
        raise SnapshotMismatchError(
            f"{path}: tensor {extra[0]!r} is not in the store's table. {rule}"
        )


class StoredFile:
    """One snapshot file, open for reading each tensor in order; what was read whole is checked.

    Args:
        path: the file.
        header: its header.
        digests: tensor -> xxh3_64 of its bytes.
    """

    def __init__(self, path: Path, header: Header, digests: dict[str, str]) -> None:
        self.path, self.header, self.digests = path, header, digests
        self._file = TensorFile(path, header)
        self._hashers: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__()

    def bits(self, name: str, start: int, stop: int) -> AnyArray:
        """Elements `start` to `stop` of a tensor as stored; starts must follow on each other."""
        info = self.header.tensors[name]
        data = self._file.read_bytes(
            info.start + start * info.itemsize, info.start + stop * info.itemsize
        )
        if start == 0:
            self._hashers[name] = xxhash.xxh3_64()
        hasher = self._hashers[name]
        hasher.update(data.data)
        if stop == info.size and hasher.hexdigest() != self.digests[name]:
            raise SnapshotFormatError(
                f"{self.path}: the data of tensor {name!r} is damaged (checksum). {RESTORE}"
            )
        return data.view(storage_dtype(info.dtype))

    def values(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements `start` to `stop` of an average as float32; `start` is a multiple of BLOCK."""
        stored = self.bits(name, start, stop)
        dtype = self.header.tensors[name].dtype
        if dtype != "int8":
            return decode(stored, dtype)
        scales = self.bits(name + SCALES, start // BLOCK, -(-stop // BLOCK))
        out = np.empty(stop - start, dtype=np.float32)
        return decode_int8_blocks(stored, scales, out)


class Source(Protocol):
    """Where the values of a snapshot come from."""

    def values(self, entry: TensorEntry, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements of an average, floating, 1-D; each entry is asked for in order, from 0 on."""
        ...

    def copy(self, entry: TensorEntry) -> AnyArray:
        """A tensor that is not averaged, as its own bits."""
        ...


@dataclass(frozen=True)
class Node:
    """One file of a chain.

    Attributes:
        file: the open file.
        bases: (number of an earlier node, coefficient): what is added to the file's own values.
    """

    file: StoredFile
    bases: tuple[tuple[int, float], ...] = ()


class AverageReader:
    """A combination of stored averages; a context manager.

    Each average of a chain is rounded to float32 on the way, as it was when it was written: so the next
    difference is the same bits whether it is taken to a chain or to what was kept of its end.

    Args:
        nodes: files, bases before what stands on them; copies are taken from the last.
        combination: (number of a node, coefficient).
    """

    def __init__(
        self, nodes: Sequence[Node], combination: Sequence[tuple[int, float]] | None = None
    ) -> None:
        self._nodes = nodes
        self._combination = combination or [(len(nodes) - 1, 1.0)]
        uses = [base for node in nodes for base, _ in node.bases]
        uses += [base for base, _ in self._combination]
        self._uses = {i: uses.count(i) for i in range(len(nodes))}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for node in self._nodes:
            node.file.__exit__()

    def values(self, entry: TensorEntry, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Elements `start` to `stop`, float64."""
        held: dict[int, Float32Array] = {}
        left = dict(self._uses)

        def add_up(
            pairs: Sequence[tuple[int, float]], own: Float32Array | None
        ) -> npt.NDArray[np.float64]:
            total = np.zeros(stop - start)
            for i, x in pairs:
                total += x * held[i].astype(np.float64)
                left[i] -= 1
                if not left[i]:
                    del held[i]
            return total if own is None else total + own

        for i, node in enumerate(self._nodes):
            values = node.file.values(entry.name, start, stop)
            held[i] = add_up(node.bases, values).astype(np.float32) if node.bases else values
        return add_up(self._combination, None)

    def copy(self, entry: TensorEntry) -> AnyArray:
        """A tensor that is not averaged, as stored."""
        file = self._nodes[-1].file
        size = file.header.tensors[entry.name].size
        return file.bits(entry.name, 0, size).reshape(entry.shape)


class ArraySource:
    """Values that a function gives tensor by tensor.

    Args:
        read: name -> whole tensor.
    """

    def __init__(self, read: Callable[[str], AnyArray]) -> None:
        self._read = read
        self._held: tuple[str, AnyArray] = ("", np.empty(0))

    def values(self, entry: TensorEntry, start: int, stop: int) -> AnyArray:
        """Elements `start` to `stop`; the tensor is fetched once."""
        if start == 0:
            self._held = (entry.name, self.copy(entry).reshape(-1))
        return self._held[1][start:stop]

    def copy(self, entry: TensorEntry) -> AnyArray:
        """The whole tensor."""
        values = self._read(entry.name)
        if values.shape != entry.shape:
            raise SnapshotMismatchError(
                f"tensor {entry.name!r} has shape {values.shape}, the store was started with "
                f"{entry.shape}. A store holds one model; choose a new folder for a changed one."
            )
        return values


class KeyFrameNeededError(Exception):
    """A difference is not finite, or a base is damaged: the average must be stored by itself."""


class _OverflowError(Exception):
    """Tensors that do not fit the dtype."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


def write_snapshot(
    path: Path,
    draft: SnapshotMetadata,
    source: Source,
    base: AverageReader | None,
    keep: Path | None = None,
) -> tuple[SnapshotRecord, float]:
    """Write one average; the file appears complete or not at all.

    Args:
        path: the file to make.
        draft: its description; `checksums`, `widened` and `noise` are filled in here. Its noise is
            what the values already carry.
        source: the values.
        base: what is taken off before storing (draft.bases says what it is), or None.
        keep: where to put what a reader will get back, for the next difference; see `open_kept`.

    Returns:
        Its record (without `bases`, which are files of the store), and the mean square error that
        storing added to an averaged element.

    Raises:
        KeyFrameNeededError: a difference to `base` is not finite.
        SnapshotWriteError: the file could not be written.
        SnapshotMismatchError: a tensor does not have its shape.
    """
    try:
        return _Writing(draft, source, base).write(path, keep)
    except _OverflowError as overflow:
        widened = replace(draft, widened=tuple(overflow.names))
        return _Writing(widened, source, base).write(path, keep)


_KEPT = "posthoc_ema_kept"


def open_kept(path: Path, record: SnapshotRecord) -> StoredFile | None:
    """What `write_snapshot` kept of an average, in float32; None if there is none of this record.

    It saves reading the whole chain for the next difference. Any doubt about it, and it is not used.
    """
    try:
        header = read_header(path)
        own = json.loads(header.metadata[_KEPT])
        if own["header_xxh3"] != record.header_checksum:
            return None
        return StoredFile(path, header, own["xxh3"])
    except (SnapshotError, ValueError, KeyError, TypeError):
        return None


@dataclass
class _Writing:
    """One attempt to write a snapshot."""

    draft: SnapshotMetadata
    source: Source
    base: AverageReader | None
    checksums: dict[str, str] = field(default_factory=dict)
    squares: float = 0.0  # sum of squared errors of storage
    count: int = 0  # of so many elements
    overflown: list[str] = field(default_factory=list)
    kept: TensorFileWriter | None = None
    kept_hashes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, keep: Path | None) -> tuple[SnapshotRecord, float]:
        if keep is None:
            return self._write(path)
        layout = [
            (e.name, "float32", e.shape) for e in self.draft.table.entries.values() if e.averaged
        ]
        blank = dict.fromkeys((name for name, _, _ in layout), "0" * 16)
        with TensorFileWriter(keep, layout, _kept_metadata("0" * 16, blank), durable=False) as kept:
            self.kept = kept
            result = self._write(path)
            digests = {name: hasher.hexdigest() for name, hasher in self.kept_hashes.items()}
            kept.set_metadata(_kept_metadata(result[0].header_checksum, digests))
        return result

    def _write(self, path: Path) -> tuple[SnapshotRecord, float]:
        draft = self.draft
        blank = {name: "0" * 16 for name, _, _ in draft.layout()}
        metadata = replace(draft, checksums=blank).to_metadata()
        with TensorFileWriter(path, draft.layout(), metadata) as writer:
            for entry in draft.table.entries.values():
                if entry.averaged:
                    self._average(writer, entry)
                else:
                    self._store(writer, entry.name, [(0, self.source.copy(entry))])
            if self.overflown:
                raise _OverflowError(self.overflown)
            added = self.squares / max(self.count, 1)
            noise = float(noise_text(draft.noise + added))
            final = replace(draft, checksums=self.checksums, noise=noise)
            writer.set_metadata(final.to_metadata())
        record = SnapshotRecord(
            path.name,
            draft.time,
            draft.profile,
            draft.dtype,
            writer.file_bytes,
            writer.header_checksum,
            noise=noise,
        )
        return record, added

    def _store(
        self, writer: TensorFileWriter, name: str, pieces: Iterable[tuple[int, AnyArray]]
    ) -> None:
        hasher = xxhash.xxh3_64()
        for start, stored in pieces:
            hasher.update(byte_view(stored))
            writer.write(name, stored, start)
        self.checksums[name] = hasher.hexdigest()

    def _average(self, writer: TensorFileWriter, entry: TensorEntry) -> None:
        dtype = self.draft.stored_dtype(entry)
        scales: list[tuple[int, AnyArray]] = []
        self._store(writer, entry.name, self._pieces(entry, dtype, scales))
        if dtype == "int8":
            self._store(writer, entry.name + SCALES, scales)

    def _pieces(
        self, entry: TensorEntry, dtype: str, scales: list[tuple[int, AnyArray]]
    ) -> Iterable[tuple[int, AnyArray]]:
        """(start, stored bits) of an average, chunk by chunk; int8's scales go to `scales`."""
        size = int(np.prod(entry.shape, dtype=np.int64))
        for start in range(0, size, CHUNK) if size else [0]:
            stop = min(size, start + CHUNK)
            values = self.source.values(entry, start, stop)
            origin: npt.NDArray[np.float64] | float = 0.0
            if self.base is not None:
                try:
                    origin = self.base.values(entry, start, stop)
                    values = values - origin
                except SnapshotFormatError as error:
                    raise KeyFrameNeededError(str(error)) from error
                if not np.isfinite(values.sum()):
                    raise KeyFrameNeededError
            with np.errstate(over="ignore"):
                values = np.asarray(values, dtype=np.float32)
            if self.base is not None and not np.isfinite(values).all():
                raise KeyFrameNeededError  # beyond the range of float32
            if not fits(values, dtype) and entry.name not in self.overflown:
                self.overflown.append(entry.name)
            if dtype == "int8":
                stored, scale = encode_int8_blocks(values)
                scales.append((start // BLOCK, scale))
                back = decode_int8_blocks(stored, scale, np.empty_like(values))
            else:
                stored = encode(values, dtype)
                back = decode(stored, dtype)
            self._count_error(values, back)
            if self.kept is not None:
                self._keep(
                    self.kept, entry.name, start, np.asarray(origin + back, dtype=np.float32)
                )
            yield start, stored

    def _keep(self, kept: TensorFileWriter, name: str, start: int, values: Float32Array) -> None:
        kept.write(name, values, start)
        self.kept_hashes.setdefault(name, xxhash.xxh3_64()).update(byte_view(values))

    def _count_error(self, values: Float32Array, back: Float32Array) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            error = back - values
        squares = float(np.vdot(error, error))
        if not np.isfinite(squares):  # inf and nan have no error that counts
            finite = error[np.isfinite(error)].astype(np.float64)
            squares = float(np.vdot(finite, finite))
        self.squares += squares
        self.count += len(values)


def _kept_metadata(header_checksum: str, digests: dict[str, str]) -> dict[str, str]:
    return {_KEPT: json.dumps({"header_xxh3": header_checksum, "xxh3": digests})}
