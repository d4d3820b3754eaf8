"""Many small files in a folder or in a zip, read at random by many threads.

A zip is read by offsets: its directory is parsed once, then every read is one `pread` of the entry, so
threads share one descriptor and no lock. Entries that are stored as they are (as EDM2's tools write them)
need nothing else; deflated ones are inflated on every read.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from posthoc_ema import ConfigError

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # ends with the lengths of name and extra field
LOCAL_MAGIC = b"PK\x03\x04"
_EXTRA = 64  # bytes of extra field to read along: usually there are none
_ENCRYPTED = 1
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}


class Files(Protocol):
    """Files by relative name, with `/` between folders. Reading is thread-safe."""

    @property
    def path(self) -> Path:
        """The folder or zip."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Name to bytes, names sorted."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            ConfigError: it cannot be read, or does not match its checksum.
        """
        ...


def open_files(path: Path) -> Files:
    """Files of a folder or of a zip.

    Raises:
        ConfigError: it is neither, or a zip that is damaged or holds names outside of it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("hello")
        >>> open_files(folder).read("a.txt")
        b'hello'
    """
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise ConfigError(f"data {path} does not exist. Check the path.")
    return ZipFiles(path)


class FolderFiles:
    """Files below a folder; hidden ones (of a leading dot) are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, int] = {}
        try:
            self._collect(str(path), "", found)
        except OSError as error:
            raise ConfigError(
                f"data {error.filename or path} cannot be listed: {error.strerror}. Check its permissions."
            ) from None
        self.sizes: Mapping[str, int] = dict(sorted(found.items()))

    def _collect(self, folder: str, prefix: str, found: dict[str, int]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self._collect(entry.path, f"{prefix}{entry.name}/", found)
                elif entry.is_file():
                    found[prefix + entry.name] = entry.stat().st_size

    def read(self, name: str) -> bytes:
        """Content of a file."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{self.path / name}: cannot be read: {error.strerror}. Restore the file, or leave it "
                "out of the data set."
            ) from None


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """Where an entry of a zip lies."""

    offset: int
    stored_bytes: int
    size: int
    crc: int
    deflated: bool


class ZipFiles:
    """Files of a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except zipfile.BadZipFile as error:
            raise ConfigError(
                f"data {path} is no zip that can be read ({error}). Give a folder or a zip of images; if "
                "the zip was still being copied, copy it again."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"data {path} cannot be read: {error.strerror}. Check the path."
            ) from None
        weakref.finalize(self, os.close, self._fd)
        self._entries: dict[str, _Entry] = {}
        for info in sorted(infos, key=lambda info: info.filename):
            self._add(info)
        self.sizes: Mapping[str, int] = {name: e.size for name, e in self._entries.items()}

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.filename
        if not is_inside(name):
            raise ConfigError(
                f"data {self.path} holds {name!r}, a path outside of the zip. Pack it again, with relative "
                "names."
            )
        if name in self._entries:
            raise ConfigError(f"data {self.path} holds {name!r} twice. Pack it again.")
        if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
            raise ConfigError(
                f"data {self.path}: {name!r} is encrypted or packed by a method that is not read here. "
                "Pack it again without compression (zip -0)."
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        self._entries[name] = _Entry(
            info.header_offset, info.compress_size, info.file_size, info.CRC, deflated
        )

    def read(self, name: str) -> bytes:
        """Content of an entry, checked against its checksum."""
        entry = self._entries[name]
        data = self._stored(name, entry)
        if entry.deflated:
            data = self._inflated(name, data, entry.size)
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise self._damaged(name)
        return data

    def _stored(self, name: str, entry: _Entry) -> bytes:
        fixed = LOCAL_HEADER.size
        expected = fixed + len(name.encode()) + _EXTRA + entry.stored_bytes
        raw = self._pread(expected, entry.offset)
        if len(raw) < fixed or raw[:4] != LOCAL_MAGIC:
            raise self._damaged(name)
        name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(raw)[-2:]
        start = fixed + name_bytes + extra_bytes
        end = start + entry.stored_bytes
        if end > len(raw):
            raw = self._pread(end, entry.offset)
        return raw[start:end]

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            raise ConfigError(
                f"data {self.path} cannot be read: {error.strerror}. Check the disk."
            ) from None

    def _inflated(self, name: str, data: bytes, size: int) -> bytes:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error:
            raise self._damaged(name) from None

    def _damaged(self, name: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: {name!r} is damaged (its checksum differs). Copy or make the zip again."
        )


def is_inside(name: str) -> bool:
    """Whether a name is relative and stays inside of its folder."""
    parts = name.replace("\\", "/").split("/")
    return bool(parts[0]) and ".." not in parts and name[1:2] != ":"  # C:, a drive of Windows
