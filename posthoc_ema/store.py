"""SnapshotStore: a folder of stored averages that describes itself.

The manifest is the one commit point: a file that it does not list is not part of the store. It is
replaced atomically after the files that it names are complete and synced, so a reader never sees half a
snapshot, whatever happens to the writer. One writer at a time holds the lock of the folder.
"""

from __future__ import annotations

import contextlib
import operator
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import filelock

from posthoc_ema.chains import dependents
from posthoc_ema.errors import (
    ConfigError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotWriteError,
)
from posthoc_ema.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    rebuild_manifest,
    table_difference,
)
from posthoc_ema.profiles import PointProfile
from posthoc_ema.snapshot import (
    CLOCKS,
    METADATA_KEY,
    SnapshotRecord,
    StoredProfile,
    TensorTable,
    file_name,
    is_snapshot_file_name,
    kind_of,
    order_of,
    place_of,
)
from posthoc_ema.snapshot_files import (
    ArraySource,
    AverageReader,
    Source,
)
from posthoc_ema.snapshot_folder import NewAverage, SnapshotFolder, with_noise
from posthoc_ema.tensor_files import (
    Header,
    fsync_directory,
    is_temporary_name,
    write_json,
)

_LOCK = ".lock"
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Problem:
    """Something that `verify` found.

    Attributes:
        file: which file.
        what: what about it, and what to do.
        takes_along: files of averages that are stored as differences to it and lost with it.
    """

    file: str
    what: str
    takes_along: tuple[str, ...] = ()


class SnapshotStore:
    """A folder of stored averages of one run. Make one with `open`, `create` or `resume`.

    Example:
        >>> import tempfile, numpy as np
        >>> from posthoc_ema import NewAverage, PowerProfile, TensorEntry
        >>> table = TensorTable({"w": TensorEntry("w", (2,), "float32", True)}, {})
        >>> folder = tempfile.mkdtemp() + "/snapshots"
        >>> with SnapshotStore.create(folder, clock="steps", table=table) as store:
        ...     average = NewAverage(PowerProfile(100, 0.1), "float16", lambda name: np.ones(2, "f4"))
        ...     _ = store.add(100, [average])
        >>> SnapshotStore.open(folder).times
        [100]
    """

    def __init__(
        self, folder: Path, manifest: Manifest, lock: filelock.BaseFileLock | None
    ) -> None:
        self.folder = folder
        self._manifest = manifest
        self._lock = lock
        self._files = SnapshotFolder(
            folder, manifest.run_id, manifest.clock, manifest.table, manifest.metadata
        )

    # ---- making one

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SnapshotStore:
        """Open for reading.

        Args:
            folder: the store's folder.

        Returns:
            The store as it is now; averages that are added later are not seen.

        Raises:
            SnapshotNotFoundError: the folder does not exist or holds no store.
            SnapshotFormatError: the manifest is damaged, hostile, or of a newer schema.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder), lock=None)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        clock: str,
        table: TensorTable,
        run_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SnapshotStore:
        """Start the store of a new run, open for writing.

        Args:
            folder: a new or empty folder; its parents are made.
            clock: unit of all times, "steps" or "images".
            table: the model's tensors.
            run_id: id of the run; a random one by default.
            metadata: string map that is carried into every output, for example a configuration.

        Raises:
            SnapshotMismatchError: the folder already holds a store.
            SnapshotWriteError: the folder cannot be written.
            ConfigError: unknown clock, or metadata that is not a string map.
        """
        folder = Path(folder)
        metadata = dict(metadata or {})
        if clock not in CLOCKS:
            raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}, got {clock!r}.")
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ConfigError(
                "metadata must map strings to strings; write other values as JSON text."
            )
        if METADATA_KEY in metadata or "format" in metadata:
            raise ConfigError(
                f"metadata may not use the keys 'format' and {METADATA_KEY!r}: they are taken."
            )
        try:
            table.check_names()
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
        lock = _lock(folder)
        try:
            if (folder / MANIFEST).exists():
                existing = read_manifest(folder)
                raise SnapshotMismatchError(
                    f"{folder} already holds run {existing.run_id} up to time {existing.last_time}. "
                    "Continue that run with resume=True (`--resume`), or choose a new folder."
                )
            orphans = [p.name for p in folder.iterdir() if is_snapshot_file_name(p.name)]
            if orphans:
                raise SnapshotFormatError(
                    f"{folder} holds {len(orphans)} snapshot files but no {MANIFEST}. Restore the "
                    "manifest from a copy, or choose a new folder."
                )
            store = cls(
                folder,
                Manifest(run_id or secrets.token_hex(8), clock, table, metadata, ()),
                lock,
            )
            store._clean_up()
            store._commit(())
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        *,
        run_id: str,
        clock: str,
        table: TensorTable,
        time: int,
    ) -> SnapshotStore:
        """Continue the store of a run from `time`: later snapshots, of a future that is lost, go.

        Args:
            folder: the store's folder.
            run_id: id of the run that goes on; must be the store's.
            clock: must be the store's.
            table: the model's tensors; must be the store's.
            time: training time at which the run goes on, >= 0.

        Raises:
            SnapshotMismatchError: the folder holds another run, clock or model.
            SnapshotNotFoundError: the folder holds no store.
            SnapshotFormatError: the manifest is damaged.
        """
        folder = Path(folder)
        read_manifest(folder)  # fail before the lock makes a file in a folder that is no store
        lock = _lock(folder)
        try:
            store = cls(folder, read_manifest(folder), lock)
            store._check_same_run(run_id, clock, table)
            store._clean_up()
            store.drop([record for record in store.records if record.time > time])
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def edit(cls, folder: str | os.PathLike[str]) -> SnapshotStore:
        """Open an existing store for removing averages, whichever run it holds.

        Raises:
            SnapshotNotFoundError: the folder holds no store.
            SnapshotFormatError: the manifest is damaged.
            SnapshotError: a run is writing to it.
        """
        folder = Path(folder)
        read_manifest(folder)  # fail before the lock makes a file in a folder that is no store
        lock = _lock(folder)
        try:
            store = cls(folder, read_manifest(folder), lock)
            store._clean_up()
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def rebuild(cls, folder: str | os.PathLike[str]) -> SnapshotStore:
        """Make the manifest anew from the snapshot files, which describe themselves.

        For a manifest that was damaged or lost. A file that is damaged itself is left out; `verify`
        then lists it as not part of the store. An existing manifest is kept as `manifest.json.old`.

        Returns:
            The store, open for reading.

        Raises:
            SnapshotNotFoundError: the folder holds no readable snapshot.
            SnapshotMismatchError: the snapshots are of several runs or models.
            SnapshotError: a run is writing to it.
        """
        folder = Path(folder)
        manifest = rebuild_manifest(folder)
        with cls(folder, manifest, _lock(folder)) as store:
            if (folder / MANIFEST).exists():
                (folder / MANIFEST).replace(folder / f"{MANIFEST}.old")
            store._commit(manifest.records)
        return cls.open(folder)

    def close(self) -> None:
        """Give the folder free for another writer."""
        if self._lock is not None:
            if self._lock.is_locked:
                self._files.forget_kept()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- looking

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._manifest.run_id

    @property
    def clock(self) -> str:
        """Unit of the times, "steps" or "images"."""
        return self._manifest.clock

    @property
    def table(self) -> TensorTable:
        """The model's tensors."""
        return self._manifest.table

    @property
    def metadata(self) -> dict[str, str]:
        """The run's own string map."""
        return dict(self._manifest.metadata)

    @property
    def records(self) -> tuple[SnapshotRecord, ...]:
        """All stored averages, by time."""
        return self._manifest.records

    @property
    def times(self) -> list[int]:
        """Times at which averages are stored, rising; of raw weights if there is nothing else."""
        return sorted({r.time for r in self.averages})

    @property
    def averages(self) -> tuple[SnapshotRecord, ...]:
        """What can be combined: the stored averages; the raw weights if there is nothing else."""
        found = tuple(r for r in self.records if not isinstance(r.profile, PointProfile))
        return found or self.records

    @property
    def sigma_rels(self) -> list[float]:
        """sigma_rels that are stored, rising."""
        return sorted({r.sigma_rel for r in self.records if r.sigma_rel is not None})

    def find(self, time: int, profile: StoredProfile) -> SnapshotRecord | None:
        """The record of one average, or None."""
        kind = kind_of(profile)
        at_time = (record for record in self.records if record.time == time)
        return next((record for record in at_time if kind_of(record.profile) == kind), None)

    def path(self, record: SnapshotRecord) -> Path:
        """Where the file of a record is."""
        return self._files.path(record)

    def header(self, record: SnapshotRecord) -> tuple[Header, dict[str, str]]:
        """Header of a record's file, checked against the manifest, and the tensors' checksums.

        Raises:
            SnapshotFormatError: the file is missing, damaged, or not the one that was stored.
            SnapshotMismatchError: it holds tensors of another model.
        """
        return self._files.header(record)

    def read(self, record: SnapshotRecord) -> AverageReader:
        """Open one average for reading, whatever it is stored as; use as a context manager.

        Raises:
            SnapshotFormatError: a file of its chain is missing or damaged.
        """
        return self._files.reader(self.records, [(record, 1.0)])

    def verify(self) -> Iterator[Problem]:
        """Check every byte of every file; yields what is wrong, and goes on after each problem.

        A run may write meanwhile: what it has replaced or added since this store was opened is no
        problem.
        """
        for record in self.records:
            try:
                self._files.verify(record)
            except SnapshotError as error:
                if record in read_manifest(self.folder).records:
                    what = str(error).removeprefix(f"{self.path(record)}: ")
                    along = tuple(r.file for r in dependents(self.records, [record]))
                    if along:
                        what += (
                            f" It takes {len(along)} averages along, stored as differences to it."
                        )
                    yield Problem(record.file, what, along)
        present = sorted(path.name for path in self.folder.iterdir())
        listed = {r.file for r in (*self.records, *read_manifest(self.folder).records)}
        for name in present:
            if is_snapshot_file_name(name) and name not in listed and not self._being_written():
                yield Problem(
                    name,
                    "not listed in the manifest: left by an interrupted run. The next "
                    "resume of the run, or `phema prune --apply`, removes it.",
                )

    def _being_written(self) -> bool:
        """Whether another process holds the folder: files then come before their rows."""
        path = self.folder / _LOCK
        if self._lock is not None or not path.exists() or path.is_symlink():
            return False
        lock = filelock.FileLock(path, thread_local=False)
        try:
            with lock.acquire(blocking=False):
                return False
        except (filelock.Timeout, OSError):
            return True

    # ---- changing

    def add(
        self, time: int, averages: Sequence[NewAverage], replace_raw: bool = True
    ) -> list[SnapshotRecord]:
        """Store averages of one time; they appear together or not at all.

        Args:
            time: training time, exact, > 0.
            averages: what to store; those that are there already stay as they are.
            replace_raw: remove raw weights of earlier times once these are in place.

        Returns:
            The new records.

        Raises:
            SnapshotWriteError: a file could not be written; the store is as it was.
            SnapshotMismatchError: a tensor has not the shape of the table, or an average does not end
                at `time`.
        """
        self._check_writable()
        time = _check_time(time, averages)
        # A file that the manifest lists is never replaced: between its renaming and the manifest's a
        # kill would leave the two contradicting each other.
        averages = [a for a in averages if self.find(time, a.profile) is None]
        has_raw = any(isinstance(average.profile, PointProfile) for average in averages)
        old_raw = {
            record.file
            for record in self.records
            if replace_raw and has_raw and isinstance(record.profile, PointProfile)
        }
        sources = [(a, ArraySource(a.read)) for a in averages]
        return self.add_sources(time, sources, old_raw)

    def add_sources(
        self,
        time: int,
        averages: Sequence[tuple[NewAverage, Source]],
        replaced: Collection[str] = (),
    ) -> list[SnapshotRecord]:
        """Store averages whose values come chunk by chunk; `add` is the same for whole tensors.

        Args:
            time: training time.
            averages: what to store, and where its values come from (`read` is not called).
            replaced: files that go once these are in place.
        """
        self._check_writable()
        new: list[SnapshotRecord] = []
        try:
            # Shorter averages first: the others are stored as differences to them.
            for average, source in sorted(
                averages, key=lambda pair: place_of(time, pair[0].profile)
            ):
                new.append(self._files.add([*self.records, *new], time, average, source))
            if new:
                self._commit([*(r for r in self.records if r.file not in replaced), *new])
        except BaseException:
            self._undo(file_name(time, average.profile) for average, _ in averages)
            raise
        for name in replaced:
            (self.folder / name).unlink(missing_ok=True)
        self._files.forget_kept(record.file for record in new)
        return new

    def _undo(self, names: Iterable[str]) -> None:
        """Delete new files of a change that failed, unless the manifest on disk lists them.

        It may have failed after the manifest was renamed (Ctrl-C, a folder that cannot be synced), so
        what is on disk decides, not what this object knows.
        """
        with contextlib.suppress(SnapshotError, OSError):  # what is left, the next resume removes
            self._manifest = read_manifest(self.folder)
            listed = {record.file for record in self.records}
            for name in names:
                if name not in listed:
                    (self.folder / name).unlink(missing_ok=True)

    def remove(self, records: Iterable[SnapshotRecord]) -> None:
        """Take averages out of the store; what is stored as a difference to them is written anew.

        Crash-safe: new files first, then the manifest, then the old files go.

        Raises:
            SnapshotFormatError: a file that must be written anew cannot be read: `drop` damaged ones.
            SnapshotWriteError: a file could not be written; the store is as it was.
        """
        self._check_writable()
        gone = {record.file for record in records}
        if not gone:
            return
        # Averages that stand on rewritten files move by a rounding: what was kept of them is stale.
        self._files.forget_kept()
        by_file = {record.file: record for record in self.records}
        kept: list[SnapshotRecord] = []
        renamed: dict[str, str] = {}  # file -> the file that took its place
        added: dict[str, float] = {}  # new file -> mean square error that writing it anew added
        try:
            for record in self.records:  # bases come before what stands on them
                if record.file in gone:
                    continue
                if any(base in gone for base, _ in record.bases):
                    new, added_here = self._files.rewrite(self.records, kept, record)
                    renamed[record.file], added[new.file] = new.file, added_here
                    kept.append(new)
                else:
                    bases = tuple((renamed.get(base, base), x) for base, x in record.bases)
                    kept.append(replace(record, bases=bases))
            self._commit(with_noise(kept, added))
        except BaseException:
            self._undo(added)
            raise
        listed = {record.file for record in self.records}
        for name in by_file.keys() - listed:
            (self.folder / name).unlink(missing_ok=True)

    def drop(self, records: Iterable[SnapshotRecord]) -> list[SnapshotRecord]:
        """Take damaged averages out of the store, and those that are stored as differences to them.

        Returns:
            All records that went.
        """
        self._check_writable()
        damaged = list(records)
        lost = [*damaged, *dependents(self.records, damaged)]
        names = {record.file for record in lost}
        if names:
            self._commit([record for record in self.records if record.file not in names])
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            self._files.forget_kept()
        return lost

    def _check_writable(self) -> None:
        if self._lock is None or not self._lock.is_locked:
            raise SnapshotError(
                f"{self.folder} is open for reading only; open it with SnapshotStore.create or "
                "SnapshotStore.resume to change it."
            )

    def _check_same_run(self, run_id: str, clock: str, table: TensorTable) -> None:
        if run_id != self.run_id:
            raise SnapshotMismatchError(
                f"{self.folder} holds run {self.run_id}, the checkpoint belongs to run {run_id}. "
                "Two runs cannot mix in one folder: give the checkpoint of that run, or choose a new "
                "folder."
            )
        if clock != self.clock:
            raise SnapshotMismatchError(
                f"{self.folder} counts time in {self.clock}, the run in {clock}. "
                f"Continue with clock={self.clock!r}."
            )
        difference = table_difference(self.table, table)
        if difference:
            raise SnapshotMismatchError(
                f"{self.folder} was written for another model: {difference}. "
                "Continue with the same model, or choose a new folder."
            )

    def _commit(self, records: Iterable[SnapshotRecord]) -> None:
        ordered = tuple(sorted(records, key=order_of))
        manifest = replace(self._manifest, records=ordered)
        write_json(self.folder / MANIFEST, manifest.to_json())
        self._manifest = manifest

    def _clean_up(self) -> None:
        """Remove what a killed writer left: temporary files and files that no manifest lists."""
        listed = {record.file for record in self.records}
        for path in self.folder.iterdir():
            unlisted = is_snapshot_file_name(path.name) and path.name not in listed
            if unlisted or is_temporary_name(path.name):
                path.unlink(missing_ok=True)
        fsync_directory(self.folder)


def _check_time(time: int, averages: Sequence[NewAverage]) -> int:
    try:
        time = operator.index(
            time
        )  # NumPy integers too; never a float, whose large values are gaps
    except TypeError:
        raise ConfigError(f"time must be a whole number, got {time!r}.") from None
    if not 0 < time < 2**63:
        raise ConfigError(f"time must be positive and below 2^63, got {time}.")
    for average in averages:
        if average.profile.t != time:
            raise SnapshotMismatchError(
                f"the average {average.profile} does not end at time {time}. Store it under its own."
            )
    return time


def _lock(folder: Path) -> filelock.BaseFileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _LOCK).is_symlink():  # opening it for the lock would empty a file elsewhere
            raise SnapshotFormatError(f"{folder / _LOCK} is a symbolic link. Remove it.")
        lock = filelock.FileLock(folder / _LOCK, thread_local=False)
        # A killed writer's lock is gone with it; the wait is for one that is still winding up.
        lock.acquire(timeout=_LOCK_SECONDS)
    except filelock.Timeout:
        raise SnapshotError(
            f"{folder} is being written by another process. Stop that run, or choose a new folder."
        ) from None
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder} cannot be used for snapshots: {error.strerror}. Choose a folder that you may write."
        ) from error
    return lock
