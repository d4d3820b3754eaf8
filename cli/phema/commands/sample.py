"""`phema sample`: images of one or several averages, guided or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phema.guides import (
    GuideLengths,
    GuideSources,
    GuideTimes,
    Intervals,
    Weights,
    open_guides,
    parse_guides,
    parse_interval,
)
from phema.networks import open_averages
from phema.options import At, Device, extra, need_file, parse_sigma_rels
from phema.output import note
from phema.sampling_jobs import SamplingJob, fill_folders, make_picture
from posthoc_ema import ConfigError

Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="Weights file, run folder or folder of snapshots."),
]
LengthsOfSource = Annotated[
    str | None,
    typer.Option(
        "--sigma-rel",
        metavar="LIST",
        help="Lengths, for snapshots: 0.07, or raw,0.01,0.1 to compare.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Precision of the network: float32, bfloat16 or float16.  [default: that of training]"
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network: pays for thousands of images.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]


def command(
    source: Source,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="OUT", help="Picture, .png; or a folder, for a file per image."
        ),
    ],
    sigma_rel: LengthsOfSource = None,
    at: At = None,
    seeds: Annotated[
        str, typer.Option(metavar="SEEDS", help="One image each: 0-79 or 3,5,10-19.")
    ] = "0-79",
    columns: Annotated[int, typer.Option(min=1, help="Images in a row of the picture.")] = 10,
    classes: Annotated[
        bool,
        typer.Option("--classes", help="Ask for classes in turn by seed, not at random."),
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(metavar="CLASSES", help="Ask for these in turn by seed: 3 or 0-4,7."),
    ] = None,
    guide: GuideSources = None,
    guide_sigma_rel: GuideLengths = None,
    guide_at: GuideTimes = None,
    guidance: Weights = None,
    guidance_interval: Intervals = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps of the sampler.")] = 32,
    sampler: Annotated[str, typer.Option(help="heun (2nd order) or euler (1st).")] = "heun",
    churn: Annotated[
        float, typer.Option(metavar="S", help="S_churn of the stochastic sampler; 0 is none.")
    ] = 0.0,
    churn_interval: Annotated[
        str | None,
        typer.Option(metavar="LO,HI", help="Churn at noise levels of LO to HI.  [default: all]"),
    ] = None,
    churn_noise: Annotated[float, typer.Option(metavar="S", help="S_noise of churn.")] = 1.0,
    precision: Precision = None,
    compiled: Compile = False,
    batch_size: BatchSize = 256,
    vae: Annotated[
        str | None,
        typer.Option(metavar="VAE", help="Autoencoder that decodes latents: folder or name."),
    ] = None,
    input_range: Annotated[
        str,
        typer.Option(
            "--input-range",
            metavar="RANGE",
            help="What the autoencoder was fed when the latents were made: 0..1 (EDM2) or -1..1.",
        ),
    ] = "0..1",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the images of a folder.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Generate images with one or several averages.

    For networks of `phema train`. The same seed gives the same noise and class at any batch size.
    With --guide the network is guided; each network has a length of its own. A folder is filled up:
    images that it holds are not made again. `torchrun -m phema sample` shares the batches out.
    """
    if out.suffix not in ("", ".png"):
        raise ConfigError(
            f"--out must end in .png, got {out}. For a folder of images give a name without an ending."
        )
    numbers = parse_seeds(seeds)
    asked = None if labels is None else parse_seeds(labels, "--labels")
    need_file(source)
    guides = parse_guides(guide, guide_sigma_rel, guide_at, guidance, guidance_interval)
    with extra("sample"):
        from reference_trainer.distributed import started
        from reference_trainer.sampling import SamplerConfig

        low, high = (0.0, float("inf"))
        if churn_interval is not None:
            low, high = parse_interval(churn_interval, "--churn-interval")
        chosen = SamplerConfig(
            method=sampler,
            num_steps=steps,
            churn=churn,
            churn_min=low,
            churn_max=high,
            churn_noise=churn_noise,
        )
        with started(device) as ranks:
            where = str(ranks.device)
            job = SamplingJob(
                seeds=numbers,
                asked=asked,
                in_turn=classes,
                guidance=open_guides(guides, where, "sample"),
                sampler=chosen,
                precision=precision,
                compiled=compiled,
                batch_size=batch_size,
                vae=vae,
                input_range=input_range,
                ranks=ranks,
            )
            if ranks.is_main and ranks.world_size > -(-len(numbers) // batch_size):
                note(
                    f"{len(numbers)} images in batches of {batch_size} do not keep "
                    f"{ranks.world_size} processes busy; a smaller --batch-size does."
                )
            averages = open_averages(source, sigma_rel, at, where, "sample")
            if out.suffix:
                make_picture(job, averages, out, columns)
            else:
                several = sigma_rel is not None and len(parse_sigma_rels(sigma_rel)) > 1
                fill_folders(job, averages, out, several, overwrite)
    if ranks.is_main:
        typer.echo(out)


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """Parse SEEDS: numbers and ranges with both ends, separated by commas.

    Raises:
        ConfigError: it is malformed, empty or longer than a million.
    """
    seeds: list[int] = []
    try:
        for item in text.split(","):
            first, dash, last = item.strip().partition("-")
            start, stop = int(first), int(last) if dash else int(first)
            if stop < start or len(seeds) + stop - start >= 1_000_000:
                raise ValueError
            seeds += range(start, stop + 1)
    except ValueError:
        raise ConfigError(
            f"{option} must be numbers and rising ranges, a million at most, as 0-79 or 3,5,10-19, got "
            f"{text!r}."
        ) from None
    return seeds
