"""The manifest of a store: its record, reading it with suspicion, and making it anew from the files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_ema.codecs import SCALES
from posthoc_ema.errors import (
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.snapshot import (
    CLOCKS,
    METADATA_KEY,
    SCHEMA,
    SnapshotRecord,
    TensorEntry,
    TensorTable,
    described_bases,
    is_snapshot_file_name,
    kind_of,
    order_of,
    revision_of,
)
from posthoc_ema.tensor_files import Header, brief, open_regular, read_header, strict_json

MANIFEST = "manifest.json"
MAX_BYTES = 100_000_000
"""Largest manifest that is read: some hundred thousand averages."""
_FORMAT = "posthoc-ema snapshot store"


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        run_id: id of the training run.
        clock: unit of all times.
        table: the model's tensors.
        metadata: the run's own string map.
        records: the stored averages, by time.
    """

    run_id: str
    clock: str
    table: TensorTable
    metadata: dict[str, str]
    records: tuple[SnapshotRecord, ...]

    @property
    def last_time(self) -> int:
        """Time of the last record; 0 if there is none."""
        return max((record.time for record in self.records), default=0)

    def to_json(self) -> dict[str, Any]:
        """JSON form, as in the file."""
        return {
            "format": _FORMAT,
            "schema": SCHEMA,
            "run_id": self.run_id,
            "clock": self.clock,
            "metadata": self.metadata,
            **self.table.to_json(),
            "snapshots": [record.to_json() for record in self.records],
        }


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a store.

    Raises:
        SnapshotNotFoundError: there is none.
        SnapshotFormatError: it is damaged, hostile, or of a newer schema.
    """
    path = folder / MANIFEST
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(size) if size <= MAX_BYTES else b""
    except (FileNotFoundError, NotADirectoryError):
        kind = f"is not a folder of snapshots: it has no {MANIFEST}"
        if not folder.exists():
            kind = "does not exist"
        hint = "Give the folder that the tracker wrote to."
        if (folder / "snapshots" / MANIFEST).exists():
            hint = f"Did you mean {folder / 'snapshots'}?"
        elif folder.is_dir() and any(is_snapshot_file_name(p.name) for p in folder.iterdir()):
            hint = "It does hold snapshots: `phema verify --rebuild` makes the manifest anew."
        raise SnapshotNotFoundError(f"{folder} {kind}. {hint}") from None
    except OSError as error:
        raise SnapshotFormatError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {MAX_BYTES} that are read")
        value = strict_json(raw)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ValueError("it does not say that it is a snapshot store")
        schema = value.get("schema")
        if type(schema) is not int:
            raise ValueError(f"the schema {brief(schema)} is not a number")
        if schema > SCHEMA:
            raise SnapshotFormatError(
                f"{path}: has schema {brief(schema)}, this version reads up to {SCHEMA}. "
                "Upgrade: pip install --upgrade posthoc-ema."
            )
        return _parse_manifest(value)
    except ValueError as error:
        raise SnapshotFormatError(
            f"{path}: cannot be used: {error}. The snapshots beside it are untouched: "
            "`phema verify --rebuild` makes the manifest anew from them."
        ) from None


def _parse_manifest(value: dict[str, Any]) -> Manifest:
    run_id, clock, metadata = value.get("run_id"), value.get("clock"), value.get("metadata", {})
    if not isinstance(run_id, str) or not run_id:
        raise ValueError("it has no run id")
    if clock not in CLOCKS:
        raise ValueError(f"the clock {brief(clock)} is not one of {', '.join(CLOCKS)}")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not a map of strings")
    if "format" in metadata or METADATA_KEY in metadata:
        raise ValueError(f"its metadata may not use the keys 'format' and {METADATA_KEY!r}")
    rows = value.get("snapshots")
    if not isinstance(rows, list):
        raise ValueError("it lists no snapshots")
    records = tuple(sorted((SnapshotRecord.from_json(row) for row in rows), key=order_of))
    if len({record.file for record in records}) != len(records):
        raise ValueError("a file stands in it twice")
    for record in records:
        if revision_of(record) is None:
            raise ValueError(f"{record.file}: its name and its profile do not agree")
    if len({(record.time, kind_of(record.profile)) for record in records}) != len(records):
        raise ValueError("an average stands in it twice")
    _check_bases(records)
    return Manifest(run_id, clock, TensorTable.from_json(value), metadata, records)


def _check_bases(records: tuple[SnapshotRecord, ...]) -> None:
    """Every base is listed, and comes before what stands on it: so there are no circles."""
    before: set[str] = set()
    for record in records:
        for base, _ in record.bases:
            if base not in before:
                raise ValueError(f"{record.file}: its base {brief(base)} is not listed before it")
        before.add(record.file)


def own_description(path: Path, header: Header) -> dict[str, Any]:
    """What a snapshot file says about itself.

    Raises:
        SnapshotFormatError: it is no snapshot, its description is damaged, or of a newer schema.
    """
    if METADATA_KEY not in header.metadata:
        raise SnapshotFormatError(
            f"{path}: a safetensors file, but not a snapshot of this tool. Restore the file that was "
            "stored, or take it out of the store: `phema verify --drop`."
        )
    try:
        own: Any = strict_json(header.metadata[METADATA_KEY])
        if not isinstance(own, dict) or type(own.get("schema")) is not int:
            raise ValueError
    except ValueError:
        raise SnapshotFormatError(
            f"{path}: its own description is damaged. Restore it from a copy, or take it out of the "
            "store: `phema verify --drop`."
        ) from None
    if own["schema"] > SCHEMA:
        raise SnapshotFormatError(
            f"{path}: has schema {brief(own['schema'])}, this version reads up to {SCHEMA}. "
            "Upgrade: pip install --upgrade posthoc-ema."
        )
    return dict(own)


def rebuild_manifest(folder: Path) -> Manifest:
    """Manifest of the snapshot files that lie in a folder, from their own descriptions.

    Files that cannot be read are left out.

    Raises:
        SnapshotNotFoundError: there is no readable snapshot.
        SnapshotMismatchError: they are of several runs or models.
    """
    found: list[tuple[Path, Header, dict[str, Any], SnapshotRecord]] = []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if is_snapshot_file_name(path.name):
            try:
                header = read_header(path)
                own = own_description(path, header)
                found.append((path, header, own, _record_of(path, header, own)))
            except (SnapshotError, ValueError):
                continue
    if not found:
        raise SnapshotNotFoundError(f"{folder} holds no readable snapshot to rebuild a store from.")
    first, header, own, _ = found[0]
    manifest = _manifest_of(first, header, own)
    for path, header, own, _ in found[1:]:
        other = _manifest_of(path, header, own)
        difference = table_difference(manifest.table, other.table)
        if (other.run_id, other.clock) != (manifest.run_id, manifest.clock) or difference:
            raise SnapshotMismatchError(
                f"{path.name} and {first.name} are not of one run. Move the files of the other run "
                "elsewhere first."
            )
    records = _with_bases([(record, own) for *_, own, record in found])
    return Manifest(manifest.run_id, manifest.clock, manifest.table, manifest.metadata, records)


def _with_bases(found: list[tuple[SnapshotRecord, dict[str, Any]]]) -> tuple[SnapshotRecord, ...]:
    """Records with the files of their bases filled in; those whose bases are lost are left out.

    Of several revisions of one average, left by a crash, the newest counts.
    """
    newest: dict[tuple[int, str], tuple[SnapshotRecord, dict[str, Any]]] = {}
    for record, own in sorted(found, key=lambda pair: revision_of(pair[0]) or 0):
        newest[record.time, kind_of(record.profile)] = (record, own)
    kept: dict[tuple[int, str], SnapshotRecord] = {}
    for key, (record, own) in sorted(newest.items(), key=lambda item: order_of(item[1][0])):
        named = [((time, kind_of(profile)), x) for time, profile, x in described_bases(own)]
        if all(base in kept for base, _ in named):
            kept[key] = replace(record, bases=tuple((kept[base].file, x) for base, x in named))
    return tuple(kept.values())


def _record_of(path: Path, header: Header, own: dict[str, Any]) -> SnapshotRecord:
    noise = own.get("noise")
    if not isinstance(noise, str | None):
        raise ValueError("its noise is malformed")
    row = {
        "file": path.name,
        "time": own.get("time"),
        "profile": own.get("profile"),
        "dtype": own.get("dtype"),
        "bytes": header.file_bytes,
        "header_xxh3": header.checksum,
        # Which files the bases are, is known when all are read.
        "bases": [["", 1.0]] if described_bases(own) else [],
        "noise": None if noise is None else float(noise),
    }
    record = SnapshotRecord.from_json(row)
    if revision_of(record) is None:
        raise ValueError("its name and its profile do not agree")
    return record


def _manifest_of(path: Path, header: Header, own: dict[str, Any]) -> Manifest:
    """Manifest without records, as one file describes its store."""
    try:
        dtypes, copied = own["model_dtypes"], set(own["copied"])
        # Averages in the model's order, then copies: the order of a table has no meaning.
        names = [*dtypes, *(name for name in header.tensors if name in copied)]
        entries = {
            name: TensorEntry(
                name,
                header.tensors[name].shape,
                header.tensors[name].dtype if name in copied else dtypes[name],
                name not in copied,
            )
            for name in names
        }
        table = TensorTable.from_json(TensorTable(entries, own["aliases"]).to_json())
        user = {k: v for k, v in header.metadata.items() if k not in ("format", METADATA_KEY)}
        scales = {n + SCALES for n in dtypes if header.tensors[n].dtype == "int8"}
        if {*entries, *scales} != set(header.tensors) or own["clock"] not in CLOCKS:
            raise ValueError
        if not isinstance(own["run_id"], str) or not own["run_id"]:
            raise ValueError
        return Manifest(own["run_id"], own["clock"], table, user, ())
    except (KeyError, TypeError, ValueError):
        raise SnapshotFormatError(
            f"{path}: its description of the store is damaged. Move it elsewhere to rebuild from the "
            "other files."
        ) from None


def table_difference(stored: TensorTable, given: TensorTable) -> str:
    """First difference between two tensor tables, in words; empty if there is none."""
    for name in (*stored.entries, *given.entries):
        a, b = stored.entries.get(name), given.entries.get(name)
        if a is None or b is None:
            return f"tensor {name!r} is only in the {'model' if a is None else 'store'}"
        if a != b:
            return f"tensor {name!r} is {_describe(a)} in the store and {_describe(b)} in the model"
    if stored.aliases != given.aliases:
        return f"tied names differ: {stored.aliases} in the store, {given.aliases} in the model"
    return ""


def _describe(entry: TensorEntry) -> str:
    return f"{entry.dtype} {entry.shape} ({'averaged' if entry.averaged else 'copied'})"
