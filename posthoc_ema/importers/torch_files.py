"""Files of `torch.save` (zip and older) and plain pickles with tensors in them, as plain data."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.constructors import (
    Constructors,
    element_bytes,
    little_endian,
    storage_kind,
)
from posthoc_ema.importers.restricted_pickle import Budget, Reader
from posthoc_ema.importers.spans import Cursor, OpenFile, Span
from posthoc_ema.importers.tensors import Storage

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file of torch.save before 1.6
_LEGACY_PROTOCOL = 1001
_MOST_ENTRIES = 1 << 20
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)


@contextlib.contextmanager
def open_pickle(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The value of a pickle or of a file of `torch.save`; tensors can be read inside the context.

    Nothing of the file is executed: see `restricted_pickle`.

    Args:
        path: the file.

    Returns:
        Plain containers, numbers and strings; `LazyTensor`; `Span` for long byte strings; `Global`
        and `Opaque` for everything else.

    Raises:
        SnapshotFormatError: the file is missing, damaged, or of another format.
    """
    with OpenFile(path) as file:
        with _told(file.path):
            value = _value(Span.of(file))
        yield value


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say which file a malformed value is in."""
    try:
        yield
    except _MALFORMED as error:
        what = str(error) if type(error) is ValueError else "its instructions do not fit together"
        raise SnapshotFormatError(
            f"{path}: cannot be read as a pickle or a file of torch.save: {what}. It is damaged, cut "
            "short or of another kind; restore it from a copy or take it out of the folder."
        ) from error


def load_bytes(data: bytes) -> Any:
    r"""The value of a pickle, or of a file of `torch.save`, in memory; see `open_pickle`.

    Raises:
        SnapshotFormatError: it is malformed.

    Example:
        >>> load_bytes(b"\x80\x04cos\nsystem\n\x8c\x04echo\x85R.")
        Opaque(os.system)
    """
    with _told(Path("(bytes)")):
        return _value(Span.of(data))


def read_span(span: Span, path: Path) -> Any:
    """The value of a pickle or file of `torch.save` that is a part of an open file, see `open_pickle`.

    Args:
        span: the part.
        path: the file, for the messages.

    Raises:
        SnapshotFormatError: it is malformed.
    """
    with _told(path):
        return _value(span)


def _value(span: Span) -> Any:
    budget = Budget(span.size)
    if span.read(0, min(4, span.size)) == b"PK\x03\x04":
        return _zip_value(span, budget)
    cursor = Cursor(span)
    value = _reader(cursor, budget).read()
    if type(value) is int and value == _LEGACY_MAGIC:
        return _legacy_value(span, budget, embedded=True)
    return value


def _reader(
    cursor: Cursor, budget: Budget, persistent: Any = None, embedded: bool = True
) -> Reader:
    def load_storage(data: Span) -> Any:
        # A storage inside a storage inside ... has no use; one level keeps the recursion bounded.
        if not embedded:
            raise ValueError("a storage in it holds pickled storages itself")
        return _legacy_value(data, budget, embedded=False)

    construct = Constructors(budget, load_storage)
    if persistent is None:
        return Reader(cursor, budget, construct)
    return Reader(cursor, budget, construct, persistent)


def _legacy_value(span: Span, budget: Budget, embedded: bool) -> Any:
    """A file of the old `torch.save`: four pickles, the storages' keys, then their bytes.

    Where the bytes of a storage lie is known only after the last pickle, so the value is built over
    storages that are filled in at the end.
    """
    cursor = Cursor(span)
    storages: dict[str, Storage] = {}
    magic, version, system = (_reader(cursor, budget, embedded=False).read() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != _LEGACY_PROTOCOL:
        raise ValueError("it is a file of torch.save of an unknown version")
    little_endian(system)
    # Where the data starts is known only behind the pickles: read them twice, first for the keys.
    start = cursor.position
    sizes: dict[str, tuple[str | None, int]] = {}

    def declare(key: Any) -> Storage:
        name, dtype, size = _storage_key(key, views=True)
        sizes[name] = (dtype, size)
        return Storage(dtype, _Unknown(size * element_bytes(dtype)))

    _reader(cursor, budget, declare, embedded).read()
    order = _reader(cursor, budget, embedded=False).read()
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        raise ValueError("its list of storages is malformed")
    for key in order:
        dtype, size = sizes[key]
        (written,) = struct.unpack("<q", cursor.take(8))
        if written != size:
            raise ValueError("a storage in it has another size than its tensors say")
        storages[key] = Storage(dtype, cursor.skip(size * element_bytes(dtype)))

    def found(key: Any) -> Storage:
        return storages[_storage_key(key, views=True)[0]]

    return _reader(Cursor(span, start), budget, found, embedded).read()


class _Unknown(Span):
    """Bytes whose place is not known yet; only their number is."""

    def __init__(self, size: int) -> None:
        super().__init__(b"", 0, size)

    def read(self, start: int, end: int) -> bytes:
        raise ValueError("its data is used before it is known")


def _storage_key(key: Any, views: bool = False) -> tuple[str, str | None, int]:
    """Parts of a persistent id: ("storage", class, key, location, number of elements[, view])."""
    if not isinstance(key, tuple) or len(key) != (6 if views else 5) or key[0] != "storage":
        raise ValueError("it refers to data outside itself in an unknown way")
    _, kind, name, _, size = key[:5]
    if not isinstance(name, str) or type(size) is not int or not 0 <= size < 2**62:
        raise ValueError("a storage in it is malformed")
    if views and key[5] is not None:
        raise ValueError(
            "a storage in it is a view of another one, which no current version writes"
        )
    return name, storage_kind(kind), size


def _zip_value(span: Span, budget: Budget) -> Any:
    """A file of `torch.save`: a zip archive of data.pkl and one uncompressed entry per storage."""
    entries = _zip_entries(span)
    [pickle_name] = [name for name in entries if name.endswith("/data.pkl")] or [""]
    if not pickle_name:
        raise ValueError("it is a zip archive without data.pkl: not one of torch.save")
    root = pickle_name.removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and order.read(0, min(order.size, 16)) != b"little":
        raise ValueError("it was written on a big-endian machine")
    storages: dict[str, Storage] = {}

    def found(key: Any) -> Storage:
        name, dtype, size = _storage_key(key)
        if name not in storages:
            data = entries.get(f"{root}data/{name}")
            if data is None or data.size != size * element_bytes(dtype):
                raise ValueError("a storage in it is missing or has the wrong size")
            storages[name] = Storage(dtype, data)
        if storages[name].dtype != dtype:
            raise ValueError("a storage in it is used with two dtypes")
        return storages[name]

    return _reader(Cursor(entries[pickle_name]), budget, found).read()


def _zip_entries(span: Span) -> dict[str, Span]:
    """Name -> bytes of the entries of an archive, all uncompressed."""
    try:
        with zipfile.ZipFile(cast("BinaryIO", _SpanFile(span))) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"its zip directory is damaged ({error})") from None
    if len(infos) > _MOST_ENTRIES:
        raise ValueError("it has far too many entries")
    entries = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(
                "it holds compressed or encrypted entries, which torch.save never writes"
            )
        header = span.read(info.header_offset, info.header_offset + 30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("its zip directory points to other data")
        names, extra = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + names + extra
        if info.filename in entries:
            raise ValueError("an entry stands in it twice")
        entries[info.filename] = span.part(start, start + info.file_size)
    return entries


class _SpanFile:
    """A span as the seekable file that `zipfile` wants."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._span.size}[whence]
        if base + offset < 0:
            raise ValueError("its zip directory is damaged")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._span.size
        if size is not None and size >= 0:
            end = min(end, self._position + size)
        data = self._span.read(min(self._position, end), end)
        self._position += len(data)
        return data
