"""`phema evaluate`: image quality of one or several averages, or of images in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phema.commands.sample import Compile, LengthsOfSource, Precision
from phema.guides import (
    GuideLengths,
    GuideSources,
    GuideTimes,
    Intervals,
    Weights,
    open_guides,
    parse_guides,
)
from phema.measuring import (
    ExtractorWeights,
    Reference,
    Setup,
    check_classes,
    measure_average,
    open_evaluation,
)
from phema.networks import open_averages
from phema.options import At, Device, Json, Steps, extra, need_file
from phema.output import print_json, progress, table
from posthoc_ema import ConfigError
from posthoc_ema.manifest import MANIFEST

if TYPE_CHECKING:
    from reference_trainer.distributed import DistributedContext
    from reference_trainer.metrics import Evaluator

_NUM_IMAGES = 1000


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Weights file, run folder or folder of snapshots; or a folder or zip of images.",
        ),
    ],
    sigma_rel: LengthsOfSource = None,
    at: At = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="fd-digits, fid, fd-dinov2, kid, precision-recall, or several with commas; kid and "
            "precision-recall also with -dinov2 or -digits.",
        ),
    ] = "fd-digits",
    ref: Reference = None,
    weights: ExtractorWeights = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            min=2,
            help="Images of one measurement.  [default: 1000; of a folder all]",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measurements with further seeds: mean, smallest, error.")
    ] = 1,
    steps: Steps = 32,
    seed: Annotated[int, typer.Option(min=0, help="First of the consecutive seeds.")] = 0,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Classes of the images: in-turn, or drawn by seed.  [default: in-turn for digits]",
        ),
    ] = None,
    guide: GuideSources = None,
    guide_sigma_rel: GuideLengths = None,
    guide_at: GuideTimes = None,
    guidance: Weights = None,
    guidance_interval: Intervals = None,
    precision: Precision = None,
    compiled: Compile = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 256,
    vae: Annotated[
        str | None,
        typer.Option(metavar="VAE", help="Autoencoder that decodes latents: folder or name."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the quality of generated images.

    For networks of `phema train`, and for images in a folder or zip. A Frechet distance (fd, fid; lower
    is better) depends on the number of images: compare only rows with the same one. `torchrun -m phema
    evaluate` shares the images out.
    """
    need_file(source)
    check_classes(classes)
    guides = parse_guides(guide, guide_sigma_rel, guide_at, guidance, guidance_interval)
    with extra("evaluate"):
        from reference_trainer.distributed import started

        with started(device) as ranks:
            evaluator = open_evaluation(metric, ref, weights, ranks)
            if _holds_images(source):
                _refuse(sigma_rel=sigma_rel, at=at, guide=guide, vae=vae, classes=classes)
                measured = _of_images(
                    evaluator, source, num_images, repeats, seed, batch_size, ranks
                )
            else:
                setup = Setup(
                    evaluator=evaluator,
                    num_images=num_images or _NUM_IMAGES,
                    steps=steps,
                    seed=seed,
                    classes=classes,
                    guidance=open_guides(guides, str(ranks.device), "evaluate"),
                    precision=precision,
                    compiled=compiled,
                    batch_size=batch_size,
                    vae=vae,
                )
                measured = _of_networks(setup, source, sigma_rel, at, repeats, ranks)
            description, rows = measured
    if not ranks.is_main:
        return
    if json:
        print_json({"metric": description, "results": rows})
    else:
        _print(description, rows, evaluator)


def _holds_images(source: Path) -> bool:
    """Whether SOURCE is a set of images, and not weights or snapshots."""
    if source.is_file():
        return source.suffix == ".zip"
    if not any(source.iterdir()):
        return False  # what is missing is then said of snapshots, as elsewhere
    return not any((source / place / MANIFEST).exists() for place in ("", "snapshots"))


def _refuse(**options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} goes with networks, and SOURCE holds images. Leave it out."
        )


def _of_networks(
    setup: Setup,
    source: Path,
    sigma_rel: str | None,
    at: int | None,
    repeats: int,
    ranks: DistributedContext,
) -> tuple[str, list[dict[str, Any]]]:
    rows = []
    for average in open_averages(source, sigma_rel, at, str(ranks.device), "evaluate"):
        numbers = []
        for repeat in range(repeats):
            with progress(f"measuring {average.label}") as bar:
                numbers.append(measure_average(setup, average, ranks, repeat=repeat, on_batch=bar))
        rows.append({"weights": average.label, **_summary(numbers)})
    return _described(setup.description, repeats), rows


def _of_images(
    evaluator: Evaluator,
    source: Path,
    num_images: int | None,
    repeats: int,
    seed: int,
    batch_size: int,
    ranks: DistributedContext,
) -> tuple[str, list[dict[str, Any]]]:
    """Measure a folder or zip; repeats take other images of it, in a random order that `seed` decides."""
    from reference_trainer.data import load_dataset
    from reference_trainer.metrics import choose, of_dataset

    dataset = load_dataset(str(source.absolute()))  # never a built-in set of that name
    count = num_images or len(dataset) // repeats
    if count * repeats > len(dataset):
        raise ConfigError(
            f"{source} holds {len(dataset)} images; {repeats} x {count} are asked for, each once. Lower "
            "--num-images or --repeats."
        )
    order, numbers = choose(len(dataset), len(dataset), seed), []
    for repeat in range(repeats):
        chosen = order[repeat * count : (repeat + 1) * count]
        batches = of_dataset(dataset, chosen, batch_size=batch_size, ranks=ranks)
        with progress(f"measuring {source.name}") as bar:
            numbers.append(evaluator.measure(batches, ranks=ranks, on_batch=_counted(bar, count)))
    names = ",".join(metric.name for metric in evaluator.metrics)
    description = f"{names} num_images={count} of {source.name}"
    return _described(description, repeats), [{"images": str(source), **_summary(numbers)}]


def _counted(bar: Any, total: int) -> Any:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        bar(done, total)

    return report


def _described(description: str, repeats: int) -> str:
    return f"{description} repeats={repeats}" if repeats > 1 else description


def _summary(measured: list[dict[str, float]]) -> dict[str, Any]:
    """The numbers of one measurement; of several the means, and what they vary by."""
    from reference_trainer.metrics import confidence

    if len(measured) == 1 or not measured[0]:
        return dict(measured[0])
    row: dict[str, Any] = {}
    for name in measured[0]:
        over = confidence([numbers[name] for numbers in measured])
        row |= {name: over.mean, f"{name}_min": over.min, f"{name}_max": over.max}
        row[f"{name}_standard_error"] = over.standard_error
    return {**row, "repeats": measured}


def _print(description: str, rows: list[dict[str, Any]], evaluator: Evaluator) -> None:
    names = [key for metric in evaluator.metrics for key in metric.keys if key in rows[0]]
    names += [name for name in ("accuracy",) if name in rows[0]]
    first, *_ = rows[0]
    header, cells = [first], [[str(row[first])] for row in rows]
    for name in names:
        columns = [("", name)]
        if f"{name}_min" in rows[0]:
            end = (
                "max"
                if any(m.higher_is_better and name in m.keys for m in evaluator.metrics)
                else "min"
            )
            end = "max" if name == "accuracy" else end
            columns += [(f"{name}_{end}", end), (f"{name}_standard_error", "+-")]
        for key, title in columns:
            header.append(title)
            for row, line in zip(rows, cells, strict=True):
                line.append(_shown(name, row[key or name]))
    typer.echo(table(header, cells))
    typer.echo(description)
    for note in _notes(evaluator, rows):
        typer.echo(note)


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name == "accuracy":
        return f"{value:.1%}"
    return f"{value:.5f}" if name.startswith("kid") else f"{value:.3f}"


def _notes(evaluator: Evaluator, rows: list[dict[str, Any]]) -> Iterator[str]:
    del rows
    for metric in evaluator.metrics:
        reference = evaluator.references[metric.extractor]
        if reference.source and metric.extractor != "digits":
            yield f"{metric.name} against {reference.source}"
