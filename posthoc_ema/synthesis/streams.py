"""Byte ranges of a file as one stream: through the page cache, or past it by readers that run ahead.

What lies in the page cache is copied from there by the thread that needs it, while it is still in that
core's cache. What does not is read in large blocks by a few threads of their own, with O_DIRECT where
the file system can: the kernel's copy and its small read-ahead cost a third of a fast disk.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Protocol

import numpy as np

from posthoc_ema.codecs import AnyArray
from posthoc_ema.errors import SnapshotFormatError

PAGE = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of, on any common disk."""
COLD_BYTES = 8 << 20
"""Files below this size are read through the page cache without asking what is in it."""
READERS = 4
"""Threads that read ahead: enough to keep a disk busy, measured."""
AHEAD_BYTES = 128 << 20
"""Memory for blocks that were read ahead, all files together."""
_PROBES = 5

Range = tuple[int, int]


class Stream(Protocol):
    """Bytes in a fixed order, each read once."""

    def readinto(self, out: AnyArray) -> None:
        """Fill `out`, uint8 of shape (n,), with the next n bytes."""
        ...

    def close(self) -> None:
        """Give up what is left."""
        ...


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Join ranges that follow on each other, in order; empty ones go.

    Example:
        >>> merge([(8, 10), (10, 10), (10, 20), (40, 50)])
        [(8, 20), (40, 50)]
    """
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return merged


def open_file(path: Path, flags: int = 0) -> int:
    """A descriptor for reading.

    Raises:
        SnapshotFormatError: the file cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if flags and error.errno == errno.EINVAL:  # the file system knows no O_DIRECT
            return open_file(path)
        raise SnapshotFormatError(
            f"{path}: cannot be opened: {error.strerror}. If it was removed while it was being "
            "used, run the command again."
        ) from error


def _read(path: Path, descriptor: int, view: AnyArray, position: int) -> int:
    """One pread; the number of bytes that came, at least one."""
    try:
        got = os.preadv(descriptor, [view.data], position)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _NotDirect from error
        raise SnapshotFormatError(
            f"{path}: cannot be read: {error.strerror}. Restore the file from a copy."
        ) from error
    if got == 0:
        raise SnapshotFormatError(
            f"{path}: it became shorter while it was being read. Restore the file from a copy."
        )
    return got


class _NotDirect(OSError):
    """The file was opened with O_DIRECT and cannot be read so; some file systems are like that."""


class CachedStream:
    """Ranges of a file through the page cache.

    Args:
        path: the file.
        ranges: what to read, in order.
        keep_open: hold a descriptor all the time. Thousands of files must not.
    """

    def __init__(self, path: Path, ranges: Sequence[Range], keep_open: bool) -> None:
        self._path, self._keep_open = path, keep_open
        self._ranges = iter(ranges)
        self._position = self._end = 0
        self._descriptor = -1

    def readinto(self, out: AnyArray) -> None:
        """Fill `out`, uint8 of shape (n,), with the next n bytes."""
        if self._descriptor < 0:
            self._descriptor = open_file(self._path)
        filled, wanted = 0, len(out)
        if self._position + wanted <= self._end and self._keep_open:  # nearly always
            filled = _read(self._path, self._descriptor, out, self._position)
            self._position += filled
        while filled < wanted:
            if self._position == self._end:
                self._position, self._end = next(self._ranges)
            count = min(wanted - filled, self._end - self._position)
            view = out if count == wanted else out[filled : filled + count]
            got = _read(self._path, self._descriptor, view, self._position)
            self._position += got
            filled += got
        if not self._keep_open:
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class AheadStream:
    """Ranges of a file in blocks that other threads read ahead, past the page cache.

    Args:
        path: the file.
        ranges: what to read, in order.
        memory: pages for the blocks, one (multiple of PAGE,) uint8 array each, at page borders.
        executor: who reads.
    """

    def __init__(
        self, path: Path, ranges: Sequence[Range], memory: Sequence[AnyArray], executor: Executor
    ) -> None:
        self._path, self._executor = path, executor
        self._blocks = _blocks(ranges, len(memory[0]))
        self._flags = getattr(os, "O_DIRECT", 0)
        self._pending: deque[tuple[Future[AnyArray], AnyArray]] = deque()
        self._block, self._memory = np.empty(0, dtype=np.uint8), memory[0]
        for buffer in memory:
            self._submit(buffer)

    def _submit(self, buffer: AnyArray) -> None:
        block = next(self._blocks, None)
        if block is not None:
            self._pending.append((self._executor.submit(self._fetch, block, buffer), buffer))

    def _fetch(self, block: Range, buffer: AnyArray) -> AnyArray:
        """Read whole pages around a block; only the file's last page may come short."""
        begin, end = block[0] // PAGE * PAGE, -(-block[1] // PAGE) * PAGE
        # Opened for each block: a synthesis of thousands of files must not hold them all.
        descriptor, filled = open_file(self._path, self._flags), 0
        try:
            while begin + filled < block[1]:
                view = buffer[filled : end - begin]
                filled += _read(self._path, descriptor, view, begin + filled)
        except _NotDirect:
            self._flags = 0
            return self._fetch(block, buffer)
        finally:
            os.close(descriptor)
        return buffer[block[0] - begin : block[1] - begin]

    def readinto(self, out: AnyArray) -> None:
        """Fill `out`, uint8 of shape (n,), with the next n bytes."""
        filled, wanted = 0, len(out)
        while filled < wanted:
            if not len(self._block):
                future, self._memory = self._pending.popleft()
                self._block = future.result()
            count = min(wanted - filled, len(self._block))
            out[filled : filled + count] = self._block[:count]
            self._block = self._block[count:]
            filled += count
            if not len(self._block):
                self._submit(self._memory)

    def close(self) -> None:
        """Wait for reads under way: they write into memory that goes to others."""
        for future, _ in self._pending:
            if not future.cancel():
                with contextlib.suppress(Exception):  # nobody wants the block any more
                    future.result()
        self._pending.clear()


def _blocks(ranges: Sequence[Range], size: int) -> Iterator[Range]:
    """Cut ranges at multiples of `size`, so that no page is read twice within a range."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            yield start, end
            start = end


def pages(count: int, size: int) -> list[AnyArray]:
    """`count` buffers of `size` bytes (a multiple of PAGE), each at a page border."""
    arena = np.frombuffer(mmap.mmap(-1, count * size), dtype=np.uint8)
    return list(arena.reshape(count, size))


def block_bytes(num_files: int) -> int:
    """Size of a block when two of each file are in memory: 1 MiB, less for many files.

    Example:
        >>> [block_bytes(n) >> 10 for n in (1, 64, 128, 2048, 100_000)]
        [1024, 1024, 512, 32, 32]
    """
    size = 1 << 20
    while size > 32 << 10 and 2 * num_files * size > AHEAD_BYTES:
        size //= 2
    return size


def is_cold(path: Path, ranges: Sequence[Range]) -> bool:
    """Whether most of some probed pages of the ranges are not in the page cache.

    Always False where it cannot be asked (systems other than Linux), and for small files.
    """
    total = sum(stop - start for start, stop in ranges)
    if total < COLD_BYTES or not hasattr(os, "RWF_NOWAIT"):
        return False
    missing = 0
    byte = bytearray(1)
    descriptor = open_file(path)
    try:
        # Without this, a probe that misses starts a read-ahead.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for i in range(_PROBES):
            offset = (2 * i + 1) * total // (2 * _PROBES)
            try:
                os.preadv(descriptor, [byte], _locate(ranges, offset), os.RWF_NOWAIT)
            except BlockingIOError:
                missing += 1
            except OSError:  # a file system that cannot tell
                return False
    finally:
        os.close(descriptor)
    return missing > _PROBES // 2


def _locate(ranges: Sequence[Range], offset: int) -> int:
    """Position in the file of the byte that is `offset` bytes into the stream."""
    for start, stop in ranges:
        if offset < stop - start:
            return start + offset
        offset -= stop - start
    raise AssertionError("offset lies beyond the ranges")
