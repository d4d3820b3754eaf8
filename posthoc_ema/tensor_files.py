"""The one room that touches the safetensors format: lazy reading, streaming atomic writing.

Why not the safetensors package itself: its NumPy side cannot read bfloat16, it needs every tensor of
a file in memory to write it, the order of its metadata changes between calls, and it does not sync to
disk. The format is small (8 bytes of length, a JSON header, the data), and files written here are read
by it in the tests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from posthoc_ema.codecs import DTYPE_CODES, DTYPE_NAMES, AnyArray, storage_dtype
from posthoc_ema.errors import SnapshotFormatError, SnapshotWriteError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
MAX_DIMENSIONS = 64  # NumPy's limit
_TEMPORARY = re.compile(r"\.tmp-.+-[0-9a-f]{8}")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a file.

    Attributes:
        name: the tensor's name.
        dtype: dtype name as PyTorch and NumPy spell it, for example "bfloat16".
        shape: its shape.
        start: first byte, counted from the start of the file.
        end: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file, checked against the file's size.

    Attributes:
        path: the file.
        tensors: name -> where it lies, in the order of the data.
        metadata: the file's `__metadata__`.
        file_bytes: size of the file.
        checksum: xxh3_64 of the header's bytes (length field included), 16 hex digits.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """xxh3_64 of a buffer, 16 hex digits: a check against damage, not against an attacker."""
    return xxhash.xxh3_64_hexdigest(data)


def byte_view(values: AnyArray) -> memoryview:
    """The bytes of an array, without copying a contiguous one."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 120


def brief(value: object) -> str:
    """A value of a file for a message: its repr, shortened, however large or deep it is."""
    return _BRIEF.repr(value)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of JSON readers: a key that stands twice is an error, not the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_json(text: str | bytes) -> Any:
    """Parse JSON of a file that may be damaged or hostile.

    Stricter than `json.loads`: no key may stand twice, and NaN, Infinity and half surrogate pairs,
    which cannot be written again, are refused.

    Raises:
        ValueError: it is malformed; the message says how.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no text") from None
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def fits_memory(shape: Sequence[int], itemsize: int) -> bool:
    """Whether an array of this shape can exist: NumPy and safetensors count its bytes in 64 bits."""
    return (
        len(shape) <= MAX_DIMENSIONS
        and all(0 <= n < 2**63 for n in shape)
        and math.prod(max(n, 1) for n in shape) * itemsize < 2**63
    )


def open_regular(path: str | os.PathLike[str]) -> int:
    """Descriptor of a regular file, for reading. Symbolic links are followed.

    Anything else in its place (a pipe, on which opening would wait forever, a device without end, a
    folder) is an OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def _bad(path: Path, what: str) -> SnapshotFormatError:
    return SnapshotFormatError(
        f"{path}: not a readable safetensors file: {what}. "
        "It is damaged, cut short or of another format; restore it from a copy or remove it."
    )


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file, without touching its tensors.

    Args:
        path: the file.

    Returns:
        The `Header`; every range lies inside the file, fits its shape, and none overlap. Unknown keys
        of a tensor are ignored.

    Raises:
        SnapshotFormatError: the file is missing, cut short, or not a safetensors file.
    """
    path = Path(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise _bad(path, f"its {file_bytes} bytes do not hold the header that it announces")
            raw = file.read(length)
    except FileNotFoundError:
        raise SnapshotFormatError(
            f"{path}: the file is missing. Restore it from a copy, or check the path."
        ) from None
    except OSError as error:
        raise SnapshotFormatError(
            f"{path}: cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    try:
        entries = strict_json(raw)
    except ValueError as error:  # bad UTF-8, too
        raise _bad(path, f"its header is not JSON that can be used ({error})") from None
    if not isinstance(entries, dict):
        raise _bad(path, "its header is not a table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "its metadata is not a map of strings")
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in tensors:
        if info.start != position:
            raise _bad(
                path, f"the data of tensor {brief(info.name)} does not follow on its neighbour's"
            )
        position = info.end
    if position != file_bytes:
        raise _bad(path, f"it has {file_bytes} bytes, its header describes {position}")
    return Header(
        path, {info.name: info for info in tensors}, metadata, file_bytes, checksum(prefix + raw)
    )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype_name = DTYPE_NAMES[dtype]
        itemsize = storage_dtype(dtype_name).itemsize
        if not isinstance(shape, list) or not all(type(n) is int for n in (*shape, start, end)):
            raise ValueError
        if not (fits_memory(shape, itemsize) and 0 <= start < 2**63 and 0 <= end < 2**63):
            raise ValueError
        size = math.prod(shape) * itemsize
    except (KeyError, TypeError, ValueError):
        raise _bad(path, f"the entry of tensor {brief(name)} is malformed") from None
    if end - start != size:
        raise _bad(path, f"tensor {brief(name)} needs {size} bytes and has {end - start}")
    return TensorInfo(name, dtype_name, tuple(shape), data_start + start, data_start + end)


class TensorFile:
    """A safetensors file open for reading, tensor by tensor. Use as a context manager.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> _ = write_tensors(path, {"w": np.ones(3, dtype=np.float32)})
        >>> with TensorFile(path) as file:
        ...     file.read("w").tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, path: str | os.PathLike[str], header: Header | None = None) -> None:
        self.header = header or read_header(path)
        try:
            self._fd = open_regular(path)
        except OSError as error:
            raise SnapshotFormatError(
                f"{path}: cannot be opened: {error.strerror}. If it was removed while it was being "
                "used, run the command again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def read(self, name: str) -> AnyArray:
        """One tensor, as stored (bfloat16 as uint16 bits), in its shape."""
        info = self.header.tensors[name]
        buffer = self.read_bytes(info.start, info.end)
        return buffer.view(storage_dtype(info.dtype)).reshape(info.shape)

    def read_bytes(self, start: int, end: int) -> AnyArray:
        """Bytes `start` to `end` of the file, as a fresh uint8 array."""
        buffer = np.empty(end - start, dtype=np.uint8)
        view, position = buffer.data, start
        while position < end:
            got = os.preadv(self._fd, [view[position - start :]], position)
            if got == 0:
                raise _bad(self.header.path, "it became shorter while it was being read")
            position += got
        return buffer


def fsync_directory(folder: Path) -> None:
    """Make the names in `folder` durable: after a rename, the folder itself must reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder; nothing to be done
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_temporary_name(name: str) -> bool:
    """Whether `atomic_write` could have made a temporary file of this name."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[int]:
    """Give a descriptor to write to; the file appears under its name complete and synced, or not at all.

    Args:
        path: the file.
        durable: wait until it is on the disk; without, a crash of the machine may lose it.

    Raises:
        SnapshotWriteError: writing failed (disk full, no permission); nothing is left behind.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        try:
            yield descriptor
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        if durable:
            fsync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, SnapshotWriteError):
            raise _write_error(path, error) from error
        raise


def _write_error(path: Path, error: OSError) -> SnapshotWriteError:
    remedy = "Check the folder and its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "Make room (or raise the quota) and run again"
    return SnapshotWriteError(
        f"{path}: could not be written: {error.strerror or error}. {remedy}; what was stored before "
        "is untouched."
    )


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically and durably."""
    with atomic_write(path) as descriptor:
        _write_all(descriptor, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def data_order(
    layout: Sequence[tuple[str, str, Sequence[int]]],
) -> list[tuple[str, str, Sequence[int]]]:
    """Order of tensors in a file: by falling element size, so that each is aligned; else as given."""
    return sorted(layout, key=lambda row: -storage_dtype(row[1]).itemsize)


class TensorFileWriter:
    """Writes one safetensors file in pieces of any order; it appears complete or not at all.

    The layout is fixed first, so that tensors, or parts of them, can be written as they become known.
    Tensors lie in `data_order`, as the safetensors package lays them out. Use as a context manager:
    leaving it by an exception removes the temporary file.

    Args:
        path: the file to make; an existing one is replaced at the end.
        layout: (name, dtype name, shape) of each tensor.
        metadata: string map of the header. `set_metadata` may replace it by one of the same length.
        durable: see `atomic_write`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Sequence[tuple[str, str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> None:
        self.path, self._durable = Path(path), durable
        self._entries: dict[str, Any] = {}
        self._infos: dict[str, TensorInfo] = {}
        position = 0
        for name, dtype, given in data_order(layout):
            shape = tuple(int(n) for n in given)
            end = position + math.prod(shape) * storage_dtype(dtype).itemsize
            self._infos[name] = TensorInfo(name, dtype, shape, position, end)
            self._entries[name] = {
                "dtype": DTYPE_CODES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        assert len(self._infos) == len(layout), "tensor names must be unique"
        self._data_bytes = position
        self._header = self._render({"format": "pt", **(metadata or {})})

    def _render(self, metadata: Mapping[str, str]) -> bytes:
        text = json.dumps(
            {"__metadata__": dict(metadata), **self._entries},
            separators=(",", ":"),
            ensure_ascii=False,
        ).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        self._context = atomic_write(self.path, self._durable)
        self._descriptor = self._context.__enter__()
        try:
            os.ftruncate(self._descriptor, len(self._header) + self._data_bytes)
        except OSError as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, name: str, values: AnyArray, offset: int = 0) -> None:
        """Write stored bits (see `codecs.encode`) of tensor `name`, from element `offset` on."""
        info = self._infos[name]
        assert values.dtype == storage_dtype(info.dtype), (name, values.dtype, info.dtype)
        data = byte_view(values)
        position = len(self._header) + info.start + offset * info.itemsize
        assert position + len(data) <= len(self._header) + info.end, name
        while data:
            done = os.pwrite(self._descriptor, data, position)
            data, position = data[done:], position + done

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by one whose JSON has the same length (values known only at the end)."""
        header = self._render({"format": "pt", **metadata})
        assert len(header) == len(self._header), "metadata may change its values, not its length"
        self._header = header

    def data_sha256(self) -> str:
        """sha256 of the data part as it is written now: what kohya's tools know a file by."""
        hasher, position = hashlib.sha256(), len(self._header)
        while data := os.pread(self._descriptor, 1 << 20, position):
            hasher.update(data)
            position += len(data)
        return hasher.hexdigest()

    @property
    def header_checksum(self) -> str:
        """xxh3_64 of the header as it will stand in the file."""
        return checksum(self._header)

    @property
    def file_bytes(self) -> int:
        """Size of the finished file."""
        return len(self._header) + self._data_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                data, position = memoryview(self._header), 0
                while data:
                    done = os.pwrite(self._descriptor, data, position)
                    data, position = data[done:], position + done
            except OSError as failure:
                # Leaving through the context's own error path removes the temporary file.
                kind, error, traceback = type(failure), failure, failure.__traceback__
                self._context.__exit__(kind, error, traceback)
                raise
        self._context.__exit__(kind, error, traceback)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, AnyArray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write NumPy arrays as one safetensors file, atomically and durably, with deterministic bytes.

    Args:
        path: the file to make or replace.
        tensors: name -> array of a dtype that NumPy knows (for bfloat16 use `TensorFileWriter`).
        metadata: string map for the header; `{"format": "pt"}` is always added.

    Raises:
        SnapshotWriteError: the file could not be written; nothing is left behind.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    layout = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    with TensorFileWriter(path, layout, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array.astype(storage_dtype(array.dtype.name), copy=False))
