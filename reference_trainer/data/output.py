"""Data sets written item by item, in order: killed at any point, the same call goes on where it was.

A zip grows in a hidden file beside its destination and gets its name when it is complete; a folder grows in
place and is complete when it has its `dataset.json`. What is being written is noted beside it, so that a
part of another data set is not continued. Entries are stored, not deflated, without times: a zip is
the same byte for byte whenever and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import filelock

from posthoc_ema import ConfigError, SnapshotWriteError
from posthoc_ema.tensor_files import atomic_write, fsync_directory, strict_json, write_json
from reference_trainer.data.archive import LOCAL_HEADER, LOCAL_MAGIC, open_files
from reference_trainer.data.files import LABELS_FILE, read_labels_file

METADATA_KEY = "phema"
"""Key of `dataset.json` under which it is written how the data set was made."""


class Output(Protocol):
    """A data set that is being written."""

    @property
    def done(self) -> int:
        """Items that are written already."""
        ...

    def add(self, data: bytes) -> None:
        """Write the next item.

        Raises:
            SnapshotWriteError: the disk is full, for example; what is written stays.
        """
        ...

    def finish(self, table: Mapping[str, Any]) -> None:
        """Write `dataset.json` and make the data set complete."""
        ...


@contextlib.contextmanager
def open_output(
    path: Path, name_of: Callable[[int], str], num_items: int, identity: Mapping[str, Any]
) -> Iterator[Output | None]:
    """Begin a data set, or go on with it; None if it is complete already.

    Args:
        path: a folder, or a zip if it ends in `.zip`.
        name_of: name of each item's file, by index.
        num_items: number of items that it will have.
        identity: plain values that say what is being written.

    Raises:
        ConfigError: something else is at `path`, or another process is writing to it.
        SnapshotWriteError: it cannot be written.
    """
    if is_complete(path, identity):
        yield None
        return
    lock = filelock.FileLock(_beside(path, "lock"), thread_local=False)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"{path} is being written by another process. Wait for it, or choose another destination."
            ) from None
    try:
        kind = _Zip if path.suffix == ".zip" else _Folder
        with _writing(path), contextlib.closing(kind(path, name_of, num_items, identity)) as output:
            yield output
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()


def is_complete(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `path` holds a complete data set of this identity.

    Raises:
        ConfigError: it holds something else.
    """
    folder = path.suffix != ".zip"
    if not path.exists() or (folder and _may_grow(path)):
        return False
    stored: Any = None
    with contextlib.suppress(ConfigError):
        stored = read_labels_file(open_files(path))[1].get(METADATA_KEY)
    if stored == dict(identity):
        return True
    raise ConfigError(
        f"{path} exists and is not what this command would make. Choose another destination, or remove it."
    )


def _may_grow(folder: Path) -> bool:
    """Whether a folder is empty, or a data set that is not complete."""
    started = _beside(folder, "json").exists() and not (folder / LABELS_FILE).exists()
    return folder.is_dir() and (started or next(folder.iterdir(), None) is None)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.partial.{suffix}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Failures to write as sentences."""
    try:
        yield
    except SnapshotWriteError:
        raise
    except OSError as error:
        raise SnapshotWriteError(
            f"{error.filename or path}: could not be written: {error.strerror or error}. Make room or check "
            "the permissions, and run the same command again: it goes on where it stopped."
        ) from error


def _stored_identity(path: Path) -> Any:
    """What the part that is there belongs to; None if nothing says so."""
    try:
        return strict_json(_beside(path, "json").read_bytes())
    except (OSError, ValueError):
        return None


class _Folder:
    """A folder of files; each appears complete under its name."""

    def __init__(
        self, path: Path, name_of: Callable[[int], str], num_items: int, identity: Mapping[str, Any]
    ) -> None:
        self._path, self._name_of = path, name_of
        self._made: set[Path] = set()
        path.mkdir(exist_ok=True)
        if _stored_identity(path) != dict(identity):
            if next(path.iterdir(), None) is not None:
                raise ConfigError(
                    f"{path} holds a part of another data set. Remove it, or choose another destination."
                )
            write_json(_beside(path, "json"), dict(identity))
        missing = (i for i in range(num_items) if not self._file(i).exists())
        self.done = next(missing, num_items)

    def _file(self, index: int) -> Path:
        return self._path / self._name_of(index)

    def add(self, data: bytes) -> None:
        file = self._file(self.done)
        if file.parent not in self._made:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(file.parent)
        with atomic_write(file, durable=False) as descriptor:
            _write_all(descriptor, data)
        self.done += 1

    def finish(self, table: Mapping[str, Any]) -> None:
        os.sync()
        with atomic_write(self._path / LABELS_FILE) as descriptor:
            _write_all(descriptor, json.dumps(table).encode())
        _beside(self._path, "json").unlink()

    def close(self) -> None:
        pass


class _Zip:
    """A zip that grows entry by entry; its directory is written at the end."""

    def __init__(
        self, path: Path, name_of: Callable[[int], str], num_items: int, identity: Mapping[str, Any]
    ) -> None:
        self._path, self._name_of = path, name_of
        self._partial = _beside(path, "zip")
        if _stored_identity(path) != dict(identity):
            self._partial.unlink(missing_ok=True)  # before the note, which would make it ours
            write_json(_beside(path, "json"), dict(identity))
        self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._entries = recover_entries(self._file.fileno(), name_of, num_items)
        last = self._entries[-1] if self._entries else None
        self._end = 0 if last is None else last.header_offset + _entry_bytes(last)
        os.ftruncate(self._file.fileno(), self._end)

    @property
    def done(self) -> int:
        return len(self._entries)

    def add(self, data: bytes) -> None:
        self._append(self._name_of(self.done), data)

    def finish(self, table: Mapping[str, Any]) -> None:
        self._append(LABELS_FILE, json.dumps(table).encode())
        self._file.seek(self._end)
        with zipfile.ZipFile(self._file, "w") as archive:  # writes the directory, and nothing else
            archive.filelist.extend(self._entries)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.replace(self._path)
        fsync_directory(self._path.parent)
        _beside(self._path, "json").unlink()

    def close(self) -> None:
        self._file.close()

    def _append(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name)  # of 1980: no times
        info.external_attr = 0o644 << 16
        info.header_offset = self._end
        info.CRC, info.file_size, info.compress_size = zlib.crc32(data), len(data), len(data)
        block = info.FileHeader() + data
        os.lseek(self._file.fileno(), self._end, os.SEEK_SET)
        _write_all(self._file.fileno(), block)
        self._end += len(block)
        self._entries.append(info)


def recover_entries(
    descriptor: int, name_of: Callable[[int], str], num_items: int
) -> list[zipfile.ZipInfo]:
    """Entries at the start of a zip without directory that are complete and have the expected names."""
    entries: list[zipfile.ZipInfo] = []
    position, size = 0, os.fstat(descriptor).st_size
    while len(entries) < num_items:
        name = name_of(len(entries)).encode()
        head = os.pread(descriptor, LOCAL_HEADER.size + len(name), position)
        if len(head) < LOCAL_HEADER.size + len(name) or head[:4] != LOCAL_MAGIC:
            break
        crc, stored, _, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(head)[-5:]
        start = position + len(head)
        known = head[LOCAL_HEADER.size :] == name and name_bytes == len(name) and extra_bytes == 0
        if not known or start + stored > size:
            break
        if zlib.crc32(os.pread(descriptor, stored, start)) != crc:
            break
        info = zipfile.ZipInfo(name.decode())
        info.external_attr = 0o644 << 16
        info.header_offset, info.CRC = position, crc
        info.file_size = info.compress_size = stored
        entries.append(info)
        position = start + stored
    return entries


def _entry_bytes(info: zipfile.ZipInfo) -> int:
    return LOCAL_HEADER.size + len(info.filename.encode()) + info.file_size


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def labels_table(
    names: Sequence[str], labels: Sequence[int] | None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `dataset.json`."""
    rows = None if labels is None else [list(row) for row in zip(names, labels, strict=True)]
    return {"labels": rows, METADATA_KEY: dict(identity)}
