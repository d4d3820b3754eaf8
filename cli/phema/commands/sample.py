"""`phema sample`: images of one or several averages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phema.networks import classes_in_turn, open_networks
from phema.options import At, Device, Steps, extra, need_file
from phema.output import output_folder, progress
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


def command(
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="PICTURE", help="Picture, .png.")],
    sigma_rel: LengthsOfSource = None,
    at: At = None,
    seeds: Annotated[
        str, typer.Option(metavar="SEEDS", help="One image each: 0-79 or 3,5,10-19.")
    ] = "0-79",
    columns: Annotated[int, typer.Option(min=1, help="Images in a row of the picture.")] = 10,
    classes: Annotated[
        bool, typer.Option("--classes", help="Ask for classes 0, 1, 2, ... in turn, not at random.")
    ] = False,
    steps: Steps = 32,
    device: Device = "auto",
) -> None:
    """Generate images with one or several averages.

    For networks of `phema train`. The same seed gives the same noise at any batch size.
    """
    if out.suffix != ".png":
        raise ConfigError(f"--out must end in .png, got {out}.")
    numbers = parse_seeds(seeds)
    need_file(source)
    panels = []
    with output_folder(out.parent), extra("sample"):
        from posthoc_ema.plotting import plot_images
        from reference_trainer.sampling import image_grid, sample_images, save_png

        for name, network in open_networks(source, sigma_rel, at, device, "sample"):
            labels = classes_in_turn(network, len(numbers)) if classes else None
            with progress(f"sampling {name}") as bar:
                images = sample_images(
                    network, numbers, num_steps=steps, labels=labels, on_batch=bar
                )
            panels.append(
                (name, image_grid(images, columns, scale=max(1, 32 // images.shape[-1]), gap=2))
            )
        if len(panels) == 1:
            save_png(out, panels[0][1])
        else:
            named = [("raw weights" if n == "raw" else f"sigma_rel {n}", g) for n, g in panels]
            plot_images(named, out)
    typer.echo(out)


def parse_seeds(text: str) -> list[int]:
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
            "--seeds must be numbers and rising ranges, a million at most, as 0-79 or 3,5,10-19, got "
            f"{text!r}."
        ) from None
    return seeds
