"""`phema verify`: check every byte of a store."""

from __future__ import annotations

import typer

from phema.options import Json, Snapshots, find_store
from phema.output import print_json, size


def command(snapshots: Snapshots, json: Json = False) -> None:
    """Check every file of a store.

    Exit code 1 if anything is wrong; all problems are listed.
    """
    store = find_store(snapshots)
    problems = list(store.verify())
    if json:
        found = [{"file": problem.file, "what": problem.what} for problem in problems]
        print_json({"files": len(store.records), "problems": found})
    else:
        for problem in problems:
            typer.echo(f"{store.folder / problem.file}: {problem.what}", err=True)
        total = size(sum(record.file_bytes for record in store.records))
        verdict = f"{len(problems)} problems" if problems else "all good"
        typer.echo(f"{store.folder}: {len(store.records)} files, {total}: {verdict}")
    if problems:
        raise typer.Exit(1)
