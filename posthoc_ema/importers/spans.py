"""Bytes of a file that are read when they are asked for: what the pickle reader works on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from posthoc_ema.errors import SnapshotFormatError


class OpenFile:
    """A file open for reading at any place. Use as a context manager.

    Raises:
        SnapshotFormatError: it is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise SnapshotFormatError(
                f"{path}: cannot be opened: {error.strerror}. Check the path and its permissions."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)
        self._fd = -1  # a read from now on fails, and never reads another file

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`."""
        parts = []
        while start < end:
            try:
                part = os.pread(self._fd, min(end - start, 1 << 30), start)
            except OSError as error:
                raise SnapshotFormatError(
                    f"{self.path}: cannot be read: {error.strerror}. Give a file, not a folder, and "
                    "check its permissions."
                ) from error
            if not part:
                raise SnapshotFormatError(
                    f"{self.path}: became shorter while it was being read. Let its writer finish."
                )
            parts.append(part)
            start += len(part)
        return b"".join(parts)


class Span:
    """A range of an open file, or of bytes in memory.

    Example:
        >>> Span.of(b"abcdef").part(1, 4).read(1, 3)
        b'cd'
    """

    __slots__ = ("_source", "_start", "size")

    def __init__(self, source: OpenFile | bytes, start: int, end: int) -> None:
        self._source = source
        self._start = start
        self.size = end - start

    @staticmethod
    def of(source: OpenFile | bytes) -> Span:
        """The whole of a file or of bytes."""
        return Span(source, 0, len(source) if isinstance(source, bytes) else source.size)

    def part(self, start: int, end: int) -> Span:
        """The range `start` to `end` of this one; ValueError if it does not lie inside."""
        if not 0 <= start <= end <= self.size:
            raise ValueError("a range lies outside the file")
        return Span(self._source, self._start + start, self._start + end)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of the range; ValueError if they do not lie inside."""
        if not 0 <= start <= end <= self.size:
            raise ValueError("a range lies outside the file")
        first, last = self._start + start, self._start + end
        if isinstance(self._source, bytes):
            return self._source[first:last]
        return self._source.read(first, last)


class Cursor:
    """Reads a span from front to back through a small window."""

    _WINDOW = 1 << 16
    _LONGEST_LINE = 1 << 20

    def __init__(self, span: Span, position: int = 0) -> None:
        self.span = span
        self._window = b""
        self._offset = position  # of the window in the span
        self._at = 0  # in the window

    @property
    def position(self) -> int:
        """Next byte, counted from the start of the span."""
        return self._offset + self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes; ValueError if there are fewer."""
        end = self._at + count
        if end <= len(self._window):
            data = self._window[self._at : end]
            self._at = end
            return data
        position = self.position
        if count > self.span.size - position:
            raise ValueError("it ends in the middle")
        if count > self._WINDOW // 2:
            self._move(position + count)
            return self.span.read(position, position + count)
        self._move(position)
        self._window = self.span.read(position, min(position + self._WINDOW, self.span.size))
        self._at = count
        return self._window[:count]

    def skip(self, count: int) -> Span:
        """The next `count` bytes, unread."""
        position = self.position
        part = self.span.part(position, position + count)
        self._move(position + count)
        return part

    def line(self) -> bytes:
        """The bytes up to the next line end, without it."""
        end = self._window.find(b"\n", self._at)
        if end >= 0:
            data = self._window[self._at : end]
            self._at = end + 1
            return data
        position = self.position
        data = self.span.read(position, min(position + self._LONGEST_LINE, self.span.size))
        end = data.find(b"\n")
        if end < 0:
            raise ValueError("a line in it has no end")
        self._move(position + end + 1)
        return data[:end]

    def _move(self, position: int) -> None:
        self._window, self._offset, self._at = b"", position, 0
