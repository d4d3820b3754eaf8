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
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import filelock

from posthoc_ema.chains import choose_bases, dependents, parts
from posthoc_ema.codecs import DELTA_WIDTHS, SCALES, AnyArray, check_codec, is_delta
from posthoc_ema.errors import (
    ConfigError,
    PhemaWarning,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotWriteError,
)
from posthoc_ema.manifest import (
    MANIFEST,
    Manifest,
    own_description,
    read_manifest,
    rebuild_manifest,
    table_difference,
)
from posthoc_ema.profiles import PointProfile
from posthoc_ema.snapshot import (
    CLOCKS,
    METADATA_KEY,
    SnapshotMetadata,
    SnapshotRecord,
    StoredProfile,
    TensorTable,
    file_name,
    is_snapshot_file_name,
    kind_of,
    order_of,
    place_of,
    revision_of,
)
from posthoc_ema.snapshot_files import (
    CHUNK,
    RESTORE,
    ArraySource,
    AverageReader,
    KeyFrameNeededError,
    Node,
    Source,
    StoredFile,
    check_tensors,
    open_kept,
    write_snapshot,
)
from posthoc_ema.tensor_files import (
    Header,
    fsync_directory,
    is_temporary_name,
    read_header,
    write_json,
)

RAW_DTYPE = "float16"
"""How raw weights are stored beside differences: the next ones replace them, so they start no chain."""
KEY_FRAME = "float32"
"""How the average that starts a chain is stored: what all others of the chain stand on."""
LONGEST_CHAIN = 32
"""Times in a chain of differences: a damaged file takes at most the rest of its chain along."""

_LOCK = ".lock"
_KEPT = ".latest-"
"""Files of what a reader gets back of the latest averages, while a writer is at work: a cache."""
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class NewAverage:
    """An average to be stored.

    Attributes:
        profile: which average; its end must be the snapshot's time.
        dtype: "float32", "float16", "bfloat16", or as differences "delta", "delta-float16" or
            "delta-int8". Raw weights are never stored as a difference, but as float16 then.
        noise: mean square error that the values already carry, for example because they were stored
            before.
        read: name -> tensor. Averaged tensors come as float32 arrays, copied ones as the bits of their
            own dtype (bfloat16 as uint16). Called once or twice per name.
    """

    profile: StoredProfile
    dtype: str
    read: Callable[[str], AnyArray]
    noise: float = 0.0


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
        >>> from posthoc_ema import PowerProfile
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
        return cls(folder, read_manifest(folder), lock)

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
                self._forget_kept()
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
        return self.folder / record.file

    def header(self, record: SnapshotRecord) -> tuple[Header, dict[str, str]]:
        """Header of a record's file, checked against the manifest, and the tensors' checksums.

        Raises:
            SnapshotFormatError: the file is missing, damaged, or not the one that was stored.
            SnapshotMismatchError: it holds tensors of another model.
        """
        path = self.path(record)
        header = read_header(path)
        own = own_description(path, header)
        if own.get("run_id") != self.run_id:
            raise SnapshotMismatchError(
                f"{path}: belongs to run {own.get('run_id')}, the store to run {self.run_id}. "
                "Snapshots of two runs cannot be combined; restore the file that was stored here."
            )
        check_tensors(path, header, self.table)
        if header.file_bytes != record.file_bytes or header.checksum != record.header_checksum:
            raise SnapshotFormatError(
                f"{path}: differs from the file that was stored (size or header checksum). {RESTORE}"
            )
        digests = own.get("xxh3", "")
        names = list(header.tensors)  # in the order of their data
        if not isinstance(digests, str) or len(digests) != 16 * len(names):
            raise SnapshotFormatError(f"{path}: its table of checksums is malformed.")
        return header, {n: digests[16 * i : 16 * i + 16] for i, n in enumerate(names)}

    def read(self, record: SnapshotRecord) -> AverageReader:
        """Open one average for reading, whatever it is stored as; use as a context manager.

        Raises:
            SnapshotFormatError: a file of its chain is missing or damaged.
        """
        return self._reader(self.records, [(record, 1.0)], use_kept=False)

    def _reader(
        self,
        records: Sequence[SnapshotRecord],
        combination: Sequence[tuple[SnapshotRecord, float]],
        use_kept: bool,
    ) -> AverageReader:
        """Open a combination of averages; `records` are in the order of the store and hold all bases."""
        needed = {record.file for record, _ in combination}
        nodes: list[tuple[SnapshotRecord, StoredFile, bool]] = []
        with contextlib.ExitStack() as stack:
            for record in reversed(records):
                if record.file in needed:
                    kept = open_kept(self._kept_path(record.file), record) if use_kept else None
                    file = kept or StoredFile(self.path(record), *self.header(record))
                    nodes.append((record, stack.enter_context(file), kept is not None))
                    needed |= set() if kept else {base for base, _ in record.bases}
            nodes.reverse()
            number = {record.file: i for i, (record, _, _) in enumerate(nodes)}
            reader = AverageReader(
                [
                    Node(file, () if kept else tuple((number[base], x) for base, x in record.bases))
                    for record, file, kept in nodes
                ],
                [(number[record.file], x) for record, x in combination],
            )
            stack.pop_all()
        return reader

    def verify(self) -> Iterator[Problem]:
        """Check every byte of every file; yields what is wrong, and goes on after each problem.

        A run may write meanwhile: what it has replaced or added since this store was opened is no
        problem.
        """
        for record in self.records:
            try:
                self._verify_file(record)
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
                    "not listed in the manifest: left by an interrupted run. The next resume of the "
                    "run removes it.",
                )

    def _being_written(self) -> bool:
        """Whether another process holds the folder: files then come before their rows."""
        if self._lock is not None or not (self.folder / _LOCK).exists():
            return False
        lock = filelock.FileLock(self.folder / _LOCK, thread_local=False)
        try:
            with lock.acquire(blocking=False):
                return False
        except (filelock.Timeout, OSError):
            return True

    def _verify_file(self, record: SnapshotRecord) -> None:
        header, digests = self.header(record)
        damaged = []
        with StoredFile(self.path(record), header, digests) as file:
            for name, info in header.tensors.items():
                try:
                    for start in range(0, info.size, CHUNK) if info.size else [0]:
                        file.bits(name, start, min(info.size, start + CHUNK))
                except SnapshotFormatError:
                    damaged.append(repr(name.removesuffix(SCALES)))
        if damaged:
            raise SnapshotFormatError(
                f"{self.path(record)}: the data of {len(damaged)} tensors is damaged (checksum): "
                f"{', '.join(damaged[:3])}{' ...' if damaged[3:] else ''}. {RESTORE}"
            )

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
                new.append(self._write(time, average, source, new))
            if new:
                self._commit([*(r for r in self.records if r.file not in replaced), *new])
        except BaseException:
            self._undo(file_name(time, average.profile) for average, _ in averages)
            raise
        for name in replaced:
            (self.folder / name).unlink(missing_ok=True)
        self._forget_kept(record.file for record in new)
        return new

    def _kept_path(self, file: str) -> Path:
        return self.folder / f"{_KEPT}{file}"

    def _forget_kept(self, but: Iterable[str] = ()) -> None:
        """Remove what was kept of averages that no next difference will be taken to."""
        needed = {f"{_KEPT}{file}" for file in but}
        for path in self.folder.glob(f"{_KEPT}*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

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

    def _write(
        self,
        time: int,
        average: NewAverage,
        source: Source,
        beside: Sequence[SnapshotRecord],
    ) -> SnapshotRecord:
        codec = check_codec(average.dtype)
        if is_delta(codec) and isinstance(average.profile, PointProfile):
            average = replace(average, dtype=RAW_DTYPE)
        earlier = sorted([*self.records, *beside], key=order_of)
        keep = self._kept_path(file_name(time, average.profile)) if is_delta(codec) else None
        if isinstance(average.profile, PointProfile):
            keep = None
        return self._write_file(earlier, time, average, source, 0, keep)[0]

    def _write_file(
        self,
        earlier: Sequence[SnapshotRecord],
        time: int,
        average: NewAverage,
        source: Source,
        revision: int,
        keep: Path | None = None,
    ) -> tuple[SnapshotRecord, float]:
        """Write a file, as a difference to `earlier` ones if its codec is one; see `write_snapshot`."""
        codec = average.dtype
        bases = (
            choose_bases(earlier, time, average.profile, LONGEST_CHAIN) if is_delta(codec) else []
        )
        draft = SnapshotMetadata(
            run_id=self.run_id,
            clock=self.clock,
            time=time,
            profile=average.profile,
            dtype=_width(codec, time, bases),
            table=self.table,
            widened=(),
            checksums={},
            user=self.metadata,
            bases=tuple((base.time, base.profile, x) for base, x in bases),
            noise=average.noise,
        )
        path = self.folder / file_name(time, average.profile, revision)
        if not bases:
            return write_snapshot(path, draft, source, None, keep)
        try:
            with self._base_reader(earlier, bases) as reader:
                record, added = write_snapshot(path, draft, source, reader, keep)
            return replace(record, bases=tuple((base.file, x) for base, x in bases)), added
        except KeyFrameNeededError as error:
            if str(error):
                warnings.warn(
                    f"{error} The average of time {time} is stored by itself, not as a difference.",
                    PhemaWarning,
                    stacklevel=2,
                )
            return self._write_file((), time, average, source, revision, keep)

    def _base_reader(
        self,
        earlier: Sequence[SnapshotRecord],
        bases: Sequence[tuple[SnapshotRecord, float]],
    ) -> AverageReader:
        try:
            return self._reader(earlier, bases, use_kept=True)
        except SnapshotError as error:
            raise KeyFrameNeededError(str(error)) from error

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
        by_file = {record.file: record for record in self.records}
        kept: list[SnapshotRecord] = []
        renamed: dict[str, str] = {}  # file -> the file that took its place
        added: dict[str, float] = {}  # new file -> mean square error that writing it anew added
        try:
            for record in self.records:  # bases come before what stands on them
                if record.file in gone:
                    continue
                if any(base in gone for base, _ in record.bases):
                    new, added_here = self._rewrite(by_file, kept, record)
                    renamed[record.file], added[new.file] = new.file, added_here
                    kept.append(new)
                else:
                    bases = tuple((renamed.get(base, base), x) for base, x in record.bases)
                    kept.append(replace(record, bases=bases))
            self._commit(_with_noise(kept, added))
        except BaseException:
            self._undo(added)
            raise
        listed = {record.file for record in self.records}
        for name in by_file.keys() - listed:
            (self.folder / name).unlink(missing_ok=True)

    def _rewrite(
        self,
        by_file: Mapping[str, SnapshotRecord],
        earlier: Sequence[SnapshotRecord],
        record: SnapshotRecord,
    ) -> tuple[SnapshotRecord, float]:
        """Write a difference anew, to bases that stay (or by itself)."""
        average = NewAverage(record.profile, record.dtype, _no_read, record.noise or 0.0)
        revision = (revision_of(record) or 0) + 1
        with self._reader(list(by_file.values()), [(record, 1.0)], use_kept=False) as source:
            return self._write_file(earlier, record.time, average, source, revision)

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


def _width(codec: str, time: int, bases: Sequence[tuple[SnapshotRecord, float]]) -> str:
    """Codec of a file of a store of `codec`."""
    if not is_delta(codec):
        return codec
    if not bases:
        return KEY_FRAME
    if all(base.time == time for base, _ in bases):
        return "delta-float16"  # beside a key frame: nothing earlier predicts it, much is left to store
    first, others = DELTA_WIDTHS[codec]
    return others if any(base.time == time for base, _ in bases) else first


def _with_noise(
    records: Sequence[SnapshotRecord], added: Mapping[str, float]
) -> list[SnapshotRecord]:
    """Add to what stands on files that were written anew the error that this has moved it by."""
    if not added:
        return list(records)
    by_file = {record.file: record for record in records}
    moved = []
    for record in records:
        if record.file not in added and record.noise is not None and record.bases:
            shift = sum(
                x * x * added[name] for name, x in parts(by_file, record).items() if name in added
            )
            record = replace(record, noise=record.noise + shift)
        moved.append(record)
    return moved


def _no_read(name: str) -> AnyArray:
    raise AssertionError(name)  # the values come from a reader


def _lock(folder: Path) -> filelock.BaseFileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
