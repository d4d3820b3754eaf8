"""`phema synth`: the average of any length, as a safetensors file or a model folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phema.options import At, Device, Json, Norm, find_store, parse_sigma_rels
from phema.output import note, output_folder, print_json, progress, size, table
from phema.synth_options import (
    parse_overrides,
    parse_profiles,
    parse_time_list,
    parse_times,
)
from posthoc_ema import ConfigError, SynthesisPlan, plan_synthesis
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.sweep import label
from posthoc_ema.synthesis import (
    DOUBTFUL,
    Layout,
    Output,
    Recipe,
    check_free,
    checkpoint_recipe,
    choose_times,
    find_checkpoints,
    gap_message,
    like_layout,
    out_of_reach,
    plan_checkpoints,
    sharded,
    single_file,
    store_recipe,
    table_tensors,
    write_outputs,
)
from posthoc_ema.synthesis.checkpoint_files import is_checkpoint
from posthoc_ema.synthesis.checkpoints import COPIED, Target, power_target
from posthoc_ema.synthesis.layouts import MODEL, parse_size
from posthoc_ema.synthesis.outputs import beside_base
from posthoc_ema.synthesis.writing import unfinished


@dataclass(frozen=True)
class _Job:
    """A synthesis that is decided, and what is said about it.

    Attributes:
        recipe: what is executed.
        header: names of the columns of `rows`.
        rows: what the table shows of each target.
        results: what JSON shows of each target.
        facts: what JSON shows of all of them.
        source: what was read, for the last line.
        warning: a doubt about the result, or nothing.
    """

    recipe: Recipe
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    source: str
    warning: str


def command(
    context: typer.Context,
    snapshots: Annotated[
        list[Path],
        typer.Argument(
            metavar="SNAPSHOTS",
            help="Folder of snapshots, or a run folder of `phema train`. With --from-checkpoints: "
            "checkpoints, folders of them, or a .txt listing of lines `time path`.",
        ),
    ],
    sigma_rel: Annotated[
        str | None,
        typer.Option(
            "--sigma-rel",
            metavar="LIST",
            help="Lengths: 0.07 or 0.05,0.10 or 0.010,0.015,...,0.250; `raw` is no averaging.",
        ),
    ] = None,
    at: At = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="File (one length, *.safetensors) or folder; with --like or --shard-size the model "
            "folder, of several lengths one in it for each.  [default: the current folder]",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Model folder (transformers, diffusers, PEFT) or file that the output takes the place "
            "of: its names, dtypes, shards and configuration files.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write NAME into the file names: model.ema.safetensors."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Split the weights into files of at most 5GB (or 500MB)."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="model (the model's own, or the base's), float32, float16 or bfloat16."),
    ] = "model",
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SIGMA_REL",
            help="Another length for tensors of these names: 'decoder.*=0.05'. May be repeated.",
        ),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(metavar="TIMES", help="Use these times only: 1000,2000 or 5000:9000."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(metavar="TIMES", help="Leave these times out.")
    ] = None,
    norm: Norm = "random-walk",
    device: Device = "auto",
    from_checkpoints: Annotated[
        bool,
        typer.Option(
            "--from-checkpoints",
            help="SNAPSHOTS are raw checkpoints of any trainer: .safetensors, .pt, .pth, .bin, .ckpt, "
            "model folders, torch.distributed.checkpoint.",
        ),
    ] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROFILE",
            help="For checkpoints, besides --sigma-rel: uniform:START,END or half-life:H.",
        ),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Times of the checkpoints.  [default: the last number in each name]",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Where .pt checkpoints keep the state_dict, for example ema.model."),
    ] = None,
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Names that are taken from the last checkpoint instead of averaged; statistics of "
            "batch norm and integers always are.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be made, and write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Synthesize averages of any length.

    All lengths are made in one pass over the files, in bounded memory. The results load with
    model.load_state_dict(safetensors.torch.load_file(PATH)), those of --like with from_pretrained(PATH).
    What was interrupted is continued by the same command.
    """
    if sigma_rel is None and not (profile and from_checkpoints):
        raise typer.BadParameter("Missing option '--sigma-rel' (or --profile).", context)
    chosen = None if device == "auto" else device
    sigma_rels = parse_sigma_rels(sigma_rel) if sigma_rel is not None else []
    overrides = parse_overrides(override or [])
    with contextlib.ExitStack() as stack:
        if from_checkpoints:
            if norm != "random-walk":
                raise ConfigError("--norm must be random-walk with --from-checkpoints.")
            job = _checkpoint_job(
                stack,
                snapshots,
                sigma_rels,
                profiles=profile or [],
                overrides=overrides,
                at=at,
                include=include,
                exclude=exclude,
                times=times,
                key=key,
                copied=(*COPIED, *(copy or [])),
                device=chosen,
            )
        else:
            _only_with_checkpoints(profile=profile, times=times, key=key, copy=copy)
            job = _store_job(snapshots, sigma_rels, overrides, at, include, exclude, norm, chosen)
        outputs = _outputs(job.recipe, out, like, variant, shard_size, dtype)
        if not overwrite:
            check_free(job.recipe, outputs)
        there = 0 if overwrite else _finished(job.recipe, outputs)
        if not dry_run:
            for folder in dict.fromkeys(output.folder for output in outputs):
                stack.enter_context(output_folder(folder))
            with progress("synthesizing") as report:
                write_outputs(job.recipe, outputs, resume=not overwrite, progress=report)
    _print(job, outputs, there, dry_run, json)


def _only_with_checkpoints(**options: object) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"--{name} is for raw checkpoints; add --from-checkpoints, or leave it out."
            )


# ---- deciding


def _store_job(
    snapshots: Sequence[Path],
    sigma_rels: Sequence[float],
    overrides: Sequence[tuple[str, float]],
    at: int | None,
    include: str | None,
    exclude: str | None,
    norm: str,
    device: str | None,
) -> _Job:
    if len(snapshots) != 1:
        raise ConfigError(
            f"one folder of snapshots is combined, {len(snapshots)} were given. Raw checkpoints of "
            "other trainers need --from-checkpoints."
        )
    (folder,) = snapshots
    if folder.is_dir() and not _is_store(folder) and any(map(is_checkpoint, folder.iterdir())):
        raise ConfigError(
            f"{folder} holds no tracked averages, but files that may be raw checkpoints: add "
            "--from-checkpoints to average those."
        )
    store = find_store(folder)
    plan = plan_synthesis(
        store,
        sigma_rels,
        at=at,
        norm=norm,  # type: ignore[arg-type]  # checked inside
        overrides=overrides,
        include=None if include is None else parse_times("--include", include, store.times),
        exclude=parse_times("--exclude", exclude, store.times) if exclude else (),
    )
    results = [
        {
            "sigma_rel": s or None,
            "raw": s == 0,
            "predicted_error": _number(plan.predicted_error[i]),
            "profile_error": plan.profile_error[i].item(),
            "amplification": plan.amplification[i].item(),
        }
        for i, s in enumerate(plan.sigma_rels)
    ]
    facts = {
        "time": plan.time,
        "clock": store.clock,
        "norm": plan.norm,
        "inputs": len(plan.inputs),
        "files_read": len(plan.files),
        "bytes_read": plan.bytes_read,
        "overrides": {o.pattern: o.sigma_rel for o in plan.overrides},
    }
    return _Job(
        store_recipe(store, plan, device=device),
        ["sigma_rel", "error", "profile error", "sum|x|"],
        [_row(plan, i) for i in range(len(plan.sigma_rels))],
        results,
        facts,
        f"at {plan.time} {store.clock}, from {len(plan.files)} files ({size(plan.bytes_read)}) of "
        f"{store.folder}",
        out_of_reach(plan),
    )


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / "snapshots").is_dir()


def _row(plan: SynthesisPlan, i: int) -> list[str]:
    return [
        label(plan.sigma_rels[i]),
        _shown(_number(plan.predicted_error[i])),
        f"{plan.profile_error[i]:.1e}",
        f"{plan.amplification[i]:.1f}",
    ]


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _number(value: float) -> float | None:
    """A number for JSON, which has no nan."""
    return float(value) if value == value else None


def _checkpoint_job(
    stack: contextlib.ExitStack,
    paths: Sequence[Path],
    sigma_rels: Sequence[float],
    *,
    profiles: Sequence[str],
    overrides: Sequence[tuple[str, float]],
    at: int | None,
    include: str | None,
    exclude: str | None,
    times: str | None,
    key: str | None,
    copied: Sequence[str],
    device: str | None,
) -> _Job:
    found = find_checkpoints(paths, None if times is None else parse_time_list(times))
    known = [c.time for c in found]
    left = choose_times(
        found,
        at=at,
        include=None if include is None else parse_times("--include", include, known),
        exclude=parse_times("--exclude", exclude, known) if exclude else (),
    )
    end = left[-1].time
    targets: list[Target] = [power_target(s, end) for s in sigma_rels]
    targets += parse_profiles(profiles, end)
    plan = plan_checkpoints(left, targets, overrides=overrides)
    recipe = stack.enter_context(checkpoint_recipe(plan, key=key, copied=copied, device=device))
    results = [
        {
            "target": t.name,
            "sigma_rel": t.sigma_rel or None,
            "raw": t.profile is None,
            "predicted_error": recipe.provenance[i]["predicted_error"],
            "profile_error": plan.profile_error[i].item(),
            "amplification": plan.amplification[i].item(),
        }
        for i, t in enumerate(plan.targets)
    ]
    facts = {
        "time": plan.time,
        "clock": plan.clock,
        "norm": "random-walk",
        "inputs": len(plan.inputs),
        "bytes_read": recipe.bytes_read,
        "overrides": {pattern: s for pattern, s, _ in plan.overrides},
    }
    return _Job(
        recipe,
        ["average", "error", "lost in gaps"],
        [
            [
                t.name,
                _shown(recipe.provenance[i]["predicted_error"]),
                f"{plan.profile_error[i]:.0%}",
            ]
            for i, t in enumerate(plan.targets)
        ],
        results,
        facts,
        f"at {plan.time} {plan.clock}, from {len(left)} checkpoints ({size(recipe.bytes_read)}) of "
        f"{left[0].time} to {left[-1].time}\nerror: expected, relative to the weights; lost in gaps: "
        "the same as a share of how far averaging moves the weights",
        gap_message(plan, DOUBTFUL),
    )


# ---- where it goes


def _outputs(
    recipe: Recipe,
    out: Path | None,
    like: Path | None,
    variant: str | None,
    shard_size: str | None,
    dtype: str,
) -> list[Output]:
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    folder = shard_bytes is not None or (like is not None and not like.is_file())
    if variant is not None and not folder:
        raise ConfigError(
            "--variant names the files of a model folder; add --like DIR or --shard-size."
        )
    if not folder:
        return _single_outputs(recipe, out, like, dtype)
    if out is not None and out.suffix == ".safetensors":
        raise ConfigError(
            f"--out {out}: --like and --shard-size make a model folder; give a folder, not a file."
        )
    layout = (
        like_layout(like, recipe.table, dtype=dtype, variant=variant, shard_bytes=shard_bytes)
        if like is not None
        else sharded(MODEL, table_tensors(recipe.table, dtype), shard_bytes or 1, variant)
    )
    if len(recipe.labels) == 1 and out is not None:
        return [beside_base(Output(out, layout))]
    return [beside_base(Output((out or Path()) / name, layout)) for name in recipe.labels]


def _single_outputs(
    recipe: Recipe, out: Path | None, like: Path | None, dtype: str
) -> list[Output]:
    """One file of each target."""
    if out is not None and out.suffix == ".safetensors":
        if len(recipe.labels) != 1:
            raise ConfigError(
                f"--out {out} is one file, but {len(recipe.labels)} lengths are asked for; give a folder."
            )
        paths = [out]
    else:
        paths = [(out or Path()) / f"{name}.safetensors" for name in recipe.labels]
    if like is None:
        tensors, metadata, base = table_tensors(recipe.table, dtype), {}, None
    else:
        (file,) = like_layout(like, recipe.table, dtype=dtype).files
        tensors, metadata, base = file.tensors, dict(file.metadata), like
        if like.resolve() in {path.resolve() for path in paths}:
            raise ConfigError(f"--out {like} is the base itself; choose another file.")
    return [
        Output(path.parent, single_file(path.name, tensors, metadata, like=base), alone=True)
        for path in paths
    ]


def _finished(recipe: Recipe, outputs: Sequence[Output]) -> int:
    """Files that are there already, from the same request."""
    return sum(len(o.paths) - len(unfinished(recipe, i, o)) for i, o in enumerate(outputs))


# ---- saying it


def _print(job: _Job, outputs: Sequence[Output], there: int, dry_run: bool, json: bool) -> None:
    if json:
        results = [
            {**result, ("file" if o.alone else "folder"): str(_place(o)), "files": _sizes(o)}
            for result, o in zip(job.results, outputs, strict=True)
        ]
        print_json({**job.facts, "dry_run": dry_run, "results": results})
        return
    rows = [[*row, _place(o)] for row, o in zip(job.rows, outputs, strict=True)]
    typer.echo(table([*job.header, "file" if outputs[0].alone else "folder"], rows))
    typer.echo(job.source)
    if job.facts["overrides"]:
        others = ", ".join(f"{p}: {label(s)}" for p, s in job.facts["overrides"].items())
        typer.echo(f"other lengths: {others}")
    layout = outputs[0].layout
    if dry_run:
        for name, num_bytes in () if outputs[0].alone else _sizes(outputs[0]).items():
            typer.echo(f"would write {name} ({size(num_bytes)})")
        if outputs[0].alone:
            typer.echo(f"would write {len(outputs)} files of {size(layout.num_bytes)}")
        if layout.copied:
            typer.echo(f"would copy {', '.join(path.name for path in layout.copied)}")
    if there:
        total = sum(len(o.paths) for o in outputs)
        typer.echo(f"{there} of {total} files were there already, made by the same request")
    for message in (_left_out(layout), job.warning):
        if message:
            note(message)


def _place(output: Output) -> Path:
    return output.paths[0] if output.alone else output.folder


def _sizes(output: Output) -> dict[str, int]:
    """File -> bytes of its tensors."""
    return {f.name: sum(t.num_bytes for t in f.tensors) for f in output.layout.files}


def _left_out(layout: Layout) -> str:
    if not layout.left_out:
        return ""
    return (
        f"{len(layout.left_out)} averaged tensors of other parts of the model are not in the base and "
        f"were left out, such as {layout.left_out[0]!r}."
    )
