"""`phema train`: the reference trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phema.options import Device, Json, extra
from phema.output import print_json, progress
from phema.train_config import TrainOptions, resolve
from phema.train_report import dry_run, reporter, show_dry_run

if TYPE_CHECKING:
    from reference_trainer.loop import TrainResult


def command(
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="RUN", help="Run folder; continued if it holds the run."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Configuration by name: digits-xs, digits-s, photos-xs, img64-laptop, edm2-img512-xxs to "
            "-xxl, edm2-img64-xs to -xl, these also with -uncond."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="A..G|FILE",
            help="With a preset: config A to G of the EDM2 paper. Alone: a configuration as JSON, for "
            "example of a run.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Data set: folder, zip, Hugging Face's save_to_disk, or a built-in name.  [default: the "
            "preset's]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and noise.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value, for example total_images=64000 or track.dtype=float32.",
        ),
    ] = None,
    direct: Annotated[
        str | None,
        typer.Option(
            "--direct",
            metavar="LIST",
            help="Also track these lengths directly into RUN/direct, to check syntheses against.",
        ),
    ] = None,
    microbatch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images per forward pass and process; gradients add up to the batch's."
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the step with torch.compile.")
    ] = False,
    parallel: Annotated[
        str | None,
        typer.Option(help="Under torchrun: ddp (replicas) or fsdp2 (shards).  [default: ddp]"),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(help="Also log to tensorboard, wandb or trackio; may be repeated."),
    ] = None,
    device: Device = "auto",
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the configuration and what the run costs; do nothing."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train an EDM2 network, tracking averages.

    Running the same command again continues after a crash, bit for bit (on a CPU). Under torchrun the
    processes share each batch.
    """
    if out is None and not dry:
        raise typer.BadParameter(
            "a run needs a folder: --out RUN (or --dry-run).", param_hint="--out"
        )
    options = TrainOptions(
        preset=preset,
        config=config,
        seed=seed,
        data=data,
        direct=direct,
        microbatch=microbatch,
        compile=compile_,
        parallel=parallel,
        changes=set_ or [],
    )
    with extra("train"):
        resolved = resolve(options)
        if dry:
            found = dry_run(resolved, int(os.environ.get("WORLD_SIZE", "1")))
            if json:
                print_json(found)
            else:
                show_dry_run(found)
            return
        assert out is not None
        from reference_trainer.distributed import OtherRankError
        from reference_trainer.loop import train

        try:
            with progress("training") as bar:
                result = train(resolved, out, device=device, report=reporter(bar), log_to=log or [])
        except OtherRankError:
            raise typer.Exit(1) from None  # that process says why
    if result.is_main:
        _show(result, out, json)


def _show(result: TrainResult, out: Path, json: bool) -> None:
    if json:
        print_json(
            {
                "folder": str(result.folder),
                "images": result.nimg,
                "started_at": result.started_at,
                "snapshots": str(out / "snapshots"),
            }
        )
    elif result.already_complete:
        typer.echo(f"{out}: complete at {result.nimg} images, nothing to do")
    else:
        typer.echo(f"{out}: trained to {result.nimg} images; snapshots in {out / 'snapshots'}")
