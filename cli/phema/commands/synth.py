"""`phema synth`: the average of any length, as a safetensors file or a model folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from phema.options import At, Device, Json, Norm, parse_sigma_rels
from phema.output import note, output_folder, print_json, progress, size, table
from phema.synth_jobs import Job, checkpoint_job, finished, make_outputs, store_job
from phema.synth_options import parse_overrides, parse_part
from posthoc_ema import ConfigError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.snapshot import is_snapshot_file_name
from posthoc_ema.storage_costs import FILE_COSTS
from posthoc_ema.sweep import label
from posthoc_ema.synthesis import Layout, Output, check_free, write_outputs
from posthoc_ema.synthesis.checkpoint_names import is_made
from posthoc_ema.synthesis.checkpoints import COPIED


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
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write the I-th of N parts of the files; other machines write the others. `torchrun` "
            "takes I and N from there.",
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
            job = checkpoint_job(
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
            job = store_job(snapshots, sigma_rels, overrides, at, include, exclude, norm, chosen)
        outputs = make_outputs(job.recipe, out, like, variant, shard_size, dtype)
        mine = parse_part(part, len(outputs[0].paths))
        if part is not None and overwrite:
            raise ConfigError("--part continues what is there; remove the old output instead.")
        _spare_inputs(snapshots, outputs)
        if not overwrite:
            check_free(job.recipe, outputs)
        there = 0 if overwrite else finished(job.recipe, outputs)
        if not dry_run:
            for folder in dict.fromkeys(output.folder for output in outputs):
                stack.enter_context(output_folder(folder))
            with progress("synthesizing") as report:
                complete = write_outputs(
                    job.recipe, outputs, resume=not overwrite, part=mine, progress=report
                )
    if not dry_run and not complete:
        note("this part is done; files of other parts are still to come, and the index after them.")
    _print(job, outputs, there, dry_run, json)


def _only_with_checkpoints(**options: object) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"--{name} is for raw checkpoints; add --from-checkpoints, or leave it out."
            )


def _spare_inputs(inputs: Sequence[Path], outputs: Sequence[Output]) -> None:
    """Refuse to write over what is read, also with --overwrite."""
    given = {path.resolve() for path in inputs}
    for path in (path for output in outputs for path in output.paths):
        parent = path.parent.resolve()
        if (parent / MANIFEST).exists() and is_snapshot_file_name(path.name):
            raise ConfigError(f"{path} is a snapshot of a store; choose another --out.")
        if path.exists() and (path.resolve() in given or parent in given) and not is_made(path):
            raise ConfigError(f"{path} is one of the checkpoints; choose another --out.")


# ---- saying it


def _print(job: Job, outputs: Sequence[Output], there: int, dry_run: bool, json: bool) -> None:
    if json:
        results = [
            {**result, ("file" if o.alone else "folder"): str(_place(o)), "files": _sizes(o)}
            for result, o in zip(job.results, outputs, strict=True)
        ]
        print_json({**job.facts, "dry_run": dry_run, "results": results})
        return
    layout = outputs[0].layout
    rows = [[*row, _place(o)] for row, o in zip(job.rows, outputs, strict=True)]
    typer.echo(table([*job.header, "file" if outputs[0].alone else "folder"], rows))
    typer.echo(job.source)
    rounded = _rounded(job, layout)
    if rounded:
        typer.echo(rounded)
    if job.facts["overrides"]:
        others = ", ".join(f"{p}: {label(s)}" for p, s in job.facts["overrides"].items())
        typer.echo(f"other lengths: {others}")
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


def _rounded(job: Job, layout: Layout) -> str:
    """What writing in a coarse dtype adds, where that is more than the error of the average."""
    counts: dict[str, float] = {}
    for file in layout.files:
        for tensor in file.tensors:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0.0) + tensor.num_bytes
    dtype = max((d for d in counts if d in FILE_COSTS), key=lambda d: counts[d], default="float32")
    rounding = FILE_COSTS[dtype].rounding
    errors = [r["predicted_error"] for r in job.results if r.get("predicted_error") is not None]
    if dtype == "float32" or not errors or rounding < min(errors):
        return ""
    return (
        f"written as {dtype}, which rounds by {rounding:.1e} of the weights: that comes on top of the "
        "error above. --dtype float32 keeps the average as it is."
    )


def _left_out(layout: Layout) -> str:
    if not layout.left_out:
        return ""
    return (
        f"{len(layout.left_out)} averaged tensors of other parts of the model are not in the base and "
        f"were left out, such as {layout.left_out[0]!r}."
    )
