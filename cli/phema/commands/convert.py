"""`phema convert`: files of other tools become a store, and a store one of another dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from phema.options import Json, extra, find_store, parse_sigma_rels
from phema.output import note, print_json, progress, size, table
from posthoc_ema import ConfigError, PowerProfile, SnapshotStore
from posthoc_ema.codecs import CODECS, check_codec
from posthoc_ema.importers import (
    KINDS,
    ImportOptions,
    ImportPlan,
    check_new,
    detect_kind,
    plan_import,
    write_import,
)
from posthoc_ema.profiles import GammaProfile
from posthoc_ema.reencoding import reencode
from posthoc_ema.snapshot import StoredProfile, label_of

_MOST_TIMES = 100_000


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder of another tool's files, one file, or a store."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="STORE",
            help="The store to make, a new folder; with --as-trainer also a new .safetensors file.",
        ),
    ],
    kind: Annotated[
        str, typer.Option("--from", metavar="TOOL", help=f"auto, {', '.join(KINDS)} or store.")
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
        typer.Option(help=f"{', '.join(CODECS)}.  [default: as in the files]"),
    ] = None,
    trainer: Annotated[
        bool,
        typer.Option(
            "--as-trainer",
            help="EDM2: make it a network of `phema train`, for sample, evaluate and sweep.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Make a store of files that another tool wrote, or of a store in another dtype.

    EDM2 network snapshots (.pkl), folders of ema-pytorch, nitrous-ema and pytorch-posthoc-ema, LoRA
    files of kohya and musubi-tuner. Pickles are read by a reader that executes nothing: no code in a
    file is run and no class of it imported, so files need not be trusted. All files are checked before
    anything is written; an interrupted conversion goes on when it is run again.

    Tensors keep their names, so that averages fit the tool that they came from. --as-trainer gives those
    of EDM2 the names of our own network instead: `phema sample` and its like then run them.
    """
    if kind == "auto":
        kind = detect_kind(source)
    told = (sigma_rel, update_every, batch_size, time)
    if kind == "store":
        others = trainer or any(option is not None for option in told)
        _reencode(source, out, dtype, json, others=others)
        return
    if dtype is not None:
        check_codec(dtype)
    as_file = out.suffix == ".safetensors"
    if as_file and (not trainer or dtype is not None):
        raise ConfigError(
            f"--out {out} is a file's name, and a store is a folder. Only one file of EDM2 becomes a "
            "file, with --as-trainer and without --dtype."
        )
    check_new(out)  # before all files are read
    options = ImportOptions(
        sigma_rels=tuple(parse_sigma_rels(sigma_rel)) if sigma_rel is not None else (),
        update_every=update_every,
        batch_size=batch_size,
        times=tuple(_parse_times(time)) if time is not None else (),
    )
    plan = plan_import(source, kind, options)
    if trainer:
        with extra("convert"):
            from reference_trainer.interchange import as_trainer

            plan = as_trainer(plan)
    if as_file:
        _write_weights(plan, out, json)
        return
    for text in plan.notes:
        note(text)
    with progress("converting") as report:
        store, noticed = write_import(plan, out, dtype, progress=report)
    for text in noticed:
        note(text)
    _report(store, plan.kind, [*plan.notes, *noticed], json)


def _write_weights(plan: ImportPlan, out: Path, json: bool) -> None:
    from reference_trainer.interchange import write_weights

    write_weights(plan, out)
    for text in plan.notes:
        note(text)
    (file,) = plan.files
    if json:
        about = {"time": file.time, "profile": label_of(file.profile), "bytes": out.stat().st_size}
        print_json({"from": plan.kind, "notes": list(plan.notes), "weights": str(out), **about})
        return
    row = [plan.kind, _label(file.profile), file.time, size(out.stat().st_size), out]
    typer.echo(table(["from", "profile", "time", "size", "weights"], [row]))


def _reencode(source: Path, out: Path, dtype: str | None, json: bool, others: bool) -> None:
    if dtype is None or others:
        raise ConfigError(
            f"{source} is a store of this tool: --dtype says how to store it anew, and it needs no other "
            "option."
        )
    with progress("converting") as report:
        store = reencode(find_store(source), out, dtype, progress=report)
    _report(store, "store", [], json)


def _report(store: SnapshotStore, kind: str, notes: list[str], json: bool) -> None:
    if json:
        print_json({"from": kind, "notes": notes, **_summary(store)})
        return
    times = [record.time for record in store.records]
    # the numbers of the files' names, which are exact, are for machines
    labels = dict.fromkeys(_label(record.profile) for record in store.records)
    total = size(sum(record.file_bytes for record in store.records))
    span = f"{min(times)} to {max(times)}"
    row = [kind, len(times), ", ".join(labels), span, store.clock, total, store.folder]
    typer.echo(table(["from", "files", "profiles", "times", "clock", "size", "store"], [row]))


def _label(profile: StoredProfile) -> str:
    """Short name of a profile for people: "sigma_rel 0.246", "gamma -0.206", "raw"."""
    if isinstance(profile, PowerProfile):
        return f"sigma_rel {profile.sigma_rel:.4g}"
    if isinstance(profile, GammaProfile):
        return f"gamma {profile.gamma:.4g}"
    return label_of(profile)


def _summary(store: SnapshotStore) -> dict[str, object]:
    return {
        "store": str(store.folder),
        "clock": store.clock,
        "times": sorted({record.time for record in store.records}),
        "profiles": list(dict.fromkeys(label_of(record.profile) for record in store.records)),
        "files": len(store.records),
        "bytes": sum(record.file_bytes for record in store.records),
    }


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
