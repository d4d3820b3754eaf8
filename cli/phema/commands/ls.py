"""`phema ls`: what a store holds, from its manifest alone."""

from __future__ import annotations

import math

import typer

from phema.options import Json, Snapshots, find_store
from phema.output import print_json, size, table
from posthoc_ema import PointProfile, SnapshotStore


def command(snapshots: Snapshots, json: Json = False) -> None:
    """List what a folder of snapshots holds."""
    store = find_store(snapshots)
    if json:
        print_json(_as_json(store))
        return
    typer.echo(f"{store.folder}: run {store.run_id}, time in {store.clock}")
    averaged = [e for e in store.table.entries.values() if e.averaged]
    copied = len(store.table.entries) - len(averaged)
    tied = f", {len(store.table.aliases)} tied names" if store.table.aliases else ""
    typer.echo(
        f"{len(averaged)} averaged tensors, {_num_parameters(store)} parameters; "
        f"{copied} copied tensors{tied}"
    )
    if not store.records:
        typer.echo("no snapshots yet")
        return
    raw_times = {r.time for r in store.records if isinstance(r.profile, PointProfile)}
    rows = []
    for time in sorted({record.time for record in store.records}):
        records = [record for record in store.records if record.time == time]
        lengths = ", ".join(repr(r.sigma_rel) for r in records if r.sigma_rel is not None)
        dtypes = ", ".join(dict.fromkeys(record.dtype for record in records))
        total = sum(record.file_bytes for record in records)
        rows.append([time, lengths, "yes" if time in raw_times else "", dtypes, size(total)])
    typer.echo(table(["time", "sigma_rel", "raw", "dtype", "size"], rows))
    total = sum(record.file_bytes for record in store.records)
    typer.echo(f"{len(store.records)} files, {size(total)}")


def _num_parameters(store: SnapshotStore) -> int:
    return sum(math.prod(e.shape) for e in store.table.entries.values() if e.averaged)


def _as_json(store: SnapshotStore) -> dict[str, object]:
    return {
        "folder": str(store.folder),
        "run_id": store.run_id,
        "clock": store.clock,
        "parameters": _num_parameters(store),
        "times": store.times,
        "sigma_rels": store.sigma_rels,
        "snapshots": [record.to_json() for record in store.records],
    }
