"""`phema convert`: files of other tools become a store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from phema.options import Json, parse_sigma_rels
from phema.output import note, print_json, progress, size, table
from posthoc_ema import ConfigError, SnapshotStore
from posthoc_ema.importers import KINDS, ImportOptions, detect_kind, plan_import, write_import

_MOST_TIMES = 100_000


def command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of another tool's files, or one file.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="STORE", help="The store to make, a new folder.")
    ],
    kind: Annotated[
        str, typer.Option("--from", metavar="TOOL", help=f"auto, {', '.join(KINDS)}.")
    ] = "auto",
    sigma_rel: Annotated[
        str | None,
        typer.Option(
            "--sigma-rel",
            metavar="LIST",
            help="Lengths that were tracked, in the order in which the tool was given them.",
        ),
    ] = None,
    update_every: Annotated[
        int | None,
        typer.Option(
            "--update-every",
            min=1,
            metavar="K",
            help="The tool's update_every: what it really tracked depends on it.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="N",
            help="EDM2: images per step, if times are not multiples of 1024 images.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            "--time",
            metavar="LIST",
            help="Exact times of the files, rising: 2048,4096 or 2048,4096,...,65536.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16.  [default: as in the files]"),
    ] = None,
    json: Json = False,
) -> None:
    """Make a store of files that another tool wrote.

    EDM2 network snapshots (.pkl), folders of ema-pytorch, nitrous-ema and pytorch-posthoc-ema, LoRA
    files of kohya and musubi-tuner. Pickles are read by a reader that executes nothing: no code in a
    file is run and no class of it imported, so files need not be trusted. All files are checked before
    anything is written; an interrupted conversion goes on when it is run again.
    """
    if kind == "auto":
        kind = detect_kind(source)
    if kind == "store":
        raise ConfigError(f"{source} is a store of this tool already: use it as it is.")
    options = ImportOptions(
        sigma_rels=tuple(parse_sigma_rels(sigma_rel)) if sigma_rel is not None else (),
        update_every=update_every,
        batch_size=batch_size,
        times=tuple(_parse_times(time)) if time is not None else (),
    )
    plan = plan_import(source, kind, options)
    for text in plan.notes:
        note(text)
    with progress("converting") as report:
        store, noticed = write_import(plan, out, dtype, progress=report)
    for text in noticed:
        note(text)
    if json:
        print_json({"from": plan.kind, "notes": [*plan.notes, *noticed], **_summary(store)})
    else:
        _print(store, plan.kind)


def _summary(store: SnapshotStore) -> dict[str, object]:
    return {
        "store": str(store.folder),
        "clock": store.clock,
        "times": sorted({record.time for record in store.records}),
        "sigma_rels": store.sigma_rels,
        "files": len(store.records),
        "bytes": sum(record.file_bytes for record in store.records),
    }


def _print(store: SnapshotStore, kind: str) -> None:
    times = [record.time for record in store.records]
    lengths = ", ".join(f"{value:.6g}" for value in store.sigma_rels) or "raw"
    total = size(sum(record.file_bytes for record in store.records))
    row = [
        kind,
        len(times),
        lengths,
        f"{min(times)} to {max(times)}",
        store.clock,
        total,
        store.folder,
    ]
    typer.echo(table(["from", "files", "sigma_rel", "times", "clock", "size", "store"], [row]))


def _parse_times(text: str) -> list[int]:
    """Parse a list of whole numbers with ranges written as `a,b,...,c`."""
    values: list[int] = []
    items = [item.strip() for item in text.split(",")]
    for i, item in enumerate(items):
        if item in ("...", "…"):
            end = items[i + 1] if i + 1 < len(items) else ""
            if len(values) < 2 or not re.fullmatch(r"[0-9]{1,18}", end):
                raise ConfigError(
                    f"--time {text}: a range needs two numbers before the dots and one after."
                )
            step = values[-1] - values[-2]
            if step <= 0 or (int(end) - values[-1]) // step > _MOST_TIMES:
                raise ConfigError(f"--time {text}: a range must rise, and by larger steps.")
            values += range(values[-1] + step, int(end), step)
        elif re.fullmatch(r"[0-9]{1,18}", item):
            values.append(int(item))
        else:
            raise ConfigError(
                f"--time {text!r}: {item!r} is not a whole number. Write 2048,4096,...,65536."
            )
    return values
