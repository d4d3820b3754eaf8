"""`phema verify`: check every byte of a store."""

from __future__ import annotations

from typing import Annotated

import typer

from phema.options import Json, Snapshots, find_store
from phema.output import note, print_json, size
from posthoc_ema import Problem, SnapshotStore


def command(
    snapshots: Snapshots,
    drop: Annotated[
        bool,
        typer.Option(
            "--drop",
            help="Take damaged snapshots out of the store and delete their files; the others go on.",
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="First make a damaged or lost manifest anew from the files."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Check every file of a store.

    Exit code 1 if anything is wrong; all problems are listed.
    """
    inside = snapshots / "snapshots"  # of a run folder
    damaged = inside if inside.is_dir() else snapshots
    store = SnapshotStore.rebuild(damaged) if rebuild else find_store(snapshots)
    problems = list(store.verify())
    if json:
        found = [
            {"file": p.file, "what": p.what, "takes_along": list(p.takes_along)} for p in problems
        ]
        print_json({"files": len(store.records), "problems": found, "dropped": drop})
    else:
        for problem in problems:
            typer.echo(f"{store.folder / problem.file}: {problem.what}", err=True)
        total = size(sum(record.file_bytes for record in store.records))
        verdict = f"{len(problems)} problems" if problems else "all good"
        typer.echo(f"{store.folder}: {len(store.records)} files, {total}: {verdict}")
        _say_what_is_left(store, problems)
    if problems and drop:
        _drop(store, problems)
    elif problems:
        raise typer.Exit(1)


def _say_what_is_left(store: SnapshotStore, problems: list[Problem]) -> None:
    lost = {name for problem in problems for name in (problem.file, *problem.takes_along)}
    left = [r for r in store.records if r.file not in lost]
    if not problems or len(left) == len(store.records):
        return
    times = sorted({r.time for r in left})
    if times:
        note(
            f"without them {len(left)} averages of {len(times)} times, {times[0]} to {times[-1]} "
            f"{store.clock}, can be combined: `phema verify --drop`, then `phema synth`."
        )
    else:
        note("without them nothing is left to combine.")


def _drop(store: SnapshotStore, problems: list[Problem]) -> None:
    names = {problem.file for problem in problems}
    with SnapshotStore.edit(store.folder) as editable:
        gone = editable.drop([record for record in editable.records if record.file in names])
        note(f"dropped {len(gone)} snapshots, {len(editable.records)} are left.")
