"""The snapshot files of one store: opening averages, whatever they are stored as, and writing them.

What belongs to the store is decided in `store`, by the manifest; here is how its files are made and read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_ema.chains import choose_bases, parts, rewritten_dtype
from posthoc_ema.codecs import DELTA_WIDTHS, SCALES, AnyArray, check_codec, is_delta
from posthoc_ema.errors import (
    PhemaWarning,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
)
from posthoc_ema.manifest import own_description, read_manifest
from posthoc_ema.profiles import PointProfile
from posthoc_ema.snapshot import (
    SnapshotMetadata,
    SnapshotRecord,
    StoredProfile,
    TensorTable,
    described_bases,
    file_name,
    kind_of,
    order_of,
    place_of,
    profile_from_json,
    revision_of,
    unrevised,
)
from posthoc_ema.snapshot_files import (
    CHUNK,
    RESTORE,
    AverageReader,
    KeyFrameNeededError,
    Node,
    Source,
    StoredFile,
    check_tensors,
    open_kept,
    write_snapshot,
)
from posthoc_ema.tensor_files import Header, read_header

RAW_DTYPE = "float16"
"""How raw weights are stored beside differences: the next ones replace them, so they start no chain."""
KEY_FRAME = "float32"
"""How the average that starts a chain is stored: what all others of the chain stand on."""
LONGEST_CHAIN = 32
"""Times in a chain of differences: a damaged file takes at most the rest of its chain along."""

_KEPT = ".latest-"
"""Files of what a reader gets back of the latest averages, while a writer is at work: a cache."""


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
class SnapshotFolder:
    """The files of one store.

    Attributes:
        folder: where they are.
        run_id: the run.
        clock: unit of times.
        table: the model's tensors.
        metadata: the run's own string map.
    """

    folder: Path
    run_id: str
    clock: str
    table: TensorTable
    metadata: Mapping[str, str]

    # ---- reading

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
        if not path.exists() and self._was_taken_out(record):
            raise SnapshotFormatError(
                f"{path}: a run or `phema prune` has taken this file out of the store since it was "
                "opened. Run the command again (open the store again)."
            )
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
        _check_description(path, own, record)
        digests = own.get("xxh3", "")
        names = list(header.tensors)  # in the order of their data
        if not isinstance(digests, str) or len(digests) != 16 * len(names):
            raise SnapshotFormatError(f"{path}: its table of checksums is malformed.")
        return header, {n: digests[16 * i : 16 * i + 16] for i, n in enumerate(names)}

    def _was_taken_out(self, record: SnapshotRecord) -> bool:
        """Whether the manifest on disk does not list the file of a record any more."""
        try:
            return record.file not in {r.file for r in read_manifest(self.folder).records}
        except SnapshotError:
            return False

    def reader(
        self,
        records: Sequence[SnapshotRecord],
        combination: Sequence[tuple[SnapshotRecord, float]],
        use_kept: bool = False,
    ) -> AverageReader:
        """Open a combination of averages for reading.

        Args:
            records: what is stored, in the order of the store; holds all bases.
            combination: averages with their coefficients.
            use_kept: take what a writer kept of averages instead of their chains.

        Raises:
            SnapshotFormatError: a file is missing or damaged.
        """
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

    def verify(self, record: SnapshotRecord) -> None:
        """Read every byte of a file; raises SnapshotError if anything is wrong."""
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

    # ---- writing

    def add(
        self,
        stored: Sequence[SnapshotRecord],
        time: int,
        average: NewAverage,
        source: Source,
    ) -> SnapshotRecord:
        """Write the file of a new average.

        Args:
            stored: what is there, the shorter averages of the same time included.
            time: training time of the new one.
            average: what it is (`read` is not called).
            source: its values.

        Raises:
            SnapshotWriteError: the file could not be written.
        """
        codec = check_codec(average.dtype)
        if is_delta(codec) and isinstance(average.profile, PointProfile):
            average = replace(average, dtype=RAW_DTYPE)
        # An average that is stored later than a longer one of its time must not stand on that one.
        place = place_of(time, average.profile)
        earlier = [r for r in sorted(stored, key=order_of) if order_of(r) < place]
        keep = (
            self._kept_path(file_name(time, average.profile)) if is_delta(average.dtype) else None
        )
        return self._write(earlier, time, average, source, 0, keep)[0]

    def _write(
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
            user=dict(self.metadata),
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
            return self._write((), time, average, source, revision, keep)

    def _base_reader(
        self,
        earlier: Sequence[SnapshotRecord],
        bases: Sequence[tuple[SnapshotRecord, float]],
    ) -> AverageReader:
        try:
            return self.reader(earlier, bases, use_kept=True)
        except SnapshotError as error:
            raise KeyFrameNeededError(str(error)) from error

    def rewrite(
        self,
        records: Sequence[SnapshotRecord],
        earlier: Sequence[SnapshotRecord],
        record: SnapshotRecord,
    ) -> tuple[SnapshotRecord, float]:
        """Write a difference anew, to bases that stay (or by itself).

        Args:
            records: what is stored, in the order of the store.
            earlier: what stays of what stands before it, under its new names.
            record: the average.

        Returns:
            Its new record, and the mean square error that writing it anew added.
        """
        dtype = rewritten_dtype({r.file: r for r in records}, record)
        average = NewAverage(record.profile, dtype, _no_read, record.noise or 0.0)
        revision = (revision_of(record) or 0) + 1
        with self.reader(records, [(record, 1.0)]) as source:
            return self._write(earlier, record.time, average, source, revision)

    def _kept_path(self, file: str) -> Path:
        return self.folder / f"{_KEPT}{file}"

    def forget_kept(self, but: Iterable[str] = ()) -> None:
        """Remove what was kept of averages that no next difference will be taken to."""
        needed = {f"{_KEPT}{file}" for file in but}
        for path in self.folder.glob(f"{_KEPT}*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)


def _check_description(path: Path, own: Mapping[str, Any], record: SnapshotRecord) -> None:
    """The file is the one that was stored: where the manifest's row says otherwise, the row is damaged."""
    try:
        profile = profile_from_json(own.get("profile"), record.time)
        described = [(file_name(time, base), x) for time, base, x in described_bases(own)]
        same = (own.get("time"), own.get("dtype")) == (record.time, record.dtype)
        same = same and kind_of(profile) == kind_of(record.profile)
        same = same and described == [(unrevised(file), x) for file, x in record.bases]
    except ValueError:
        same = False
    if not same:
        raise SnapshotFormatError(
            f"{path}: the manifest says otherwise about time, profile, dtype or bases than the file "
            "itself: the manifest is damaged. `phema verify --rebuild` makes it anew from the files."
        )


def _width(codec: str, time: int, bases: Sequence[tuple[SnapshotRecord, float]]) -> str:
    """Codec of a file of a store of `codec`."""
    if not is_delta(codec):
        return codec
    if not bases:
        return KEY_FRAME
    if all(base.time == time for base, _ in bases):
        return "delta-float16"  # nothing earlier predicts it: much is left to store
    first, others = DELTA_WIDTHS[codec]
    return others if any(base.time == time for base, _ in bases) else first


def with_noise(
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
