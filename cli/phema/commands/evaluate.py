"""`phema evaluate`: image quality of one or several averages."""

from __future__ import annotations

from typing import Annotated

import typer

from phema.commands.sample import LengthsOfSource, Source
from phema.networks import TrainerMetric, open_networks
from phema.options import At, Device, Json, NumImages, Steps, extra, need_file
from phema.output import print_json, progress, table


def command(
    source: Source,
    sigma_rel: LengthsOfSource = None,
    at: At = None,
    num_images: NumImages = 1000,
    steps: Steps = 32,
    seed: Annotated[int, typer.Option(min=0, help="First of the consecutive seeds.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the quality of generated images.

    Prints the Frechet distance (fd; lower is better) for networks of `phema train`.
    The features are those of the digit classifier that comes with the package. The distance
    depends on the number of images: compare only rows with the same one.
    """
    need_file(source)
    metric = TrainerMetric(num_images, steps, seed, device)
    rows = []
    with extra("evaluate"):
        for name, network in open_networks(source, sigma_rel, at, device, "evaluate"):
            with progress(f"measuring {name}") as bar:
                metric.on_batch = bar
                rows.append({"weights": name, **metric.measure(network)})
    if json:
        print_json({"metric": metric.description, "results": rows})
        return
    names = [name for name in ("fd", "accuracy") if name in rows[0]]
    shown = {"fd": "{:.3f}", "accuracy": "{:.1%}"}
    cells = [[row["weights"], *(shown[n].format(row[n]) for n in names)] for row in rows]
    typer.echo(table(["weights", *names], cells))
    typer.echo(f"{metric.description}")
