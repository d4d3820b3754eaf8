"""`phema reference`: statistics of real images, which generated ones are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phema.measuring import ExtractorWeights, parse_weights
from phema.options import Device, Json, extra, need_file
from phema.output import output_folder, print_json, progress, table
from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from reference_trainer.metrics import Extractor, Reference

HELP = "Make or import reference statistics of real images, for `phema evaluate`."
Out = Annotated[Path, typer.Option("--out", metavar="REF", help="File to write, .safetensors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def make(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder or zip of images, or a built-in data set.")
    ],
    out: Out,
    metric: Annotated[
        str, typer.Option(metavar="LIST", help="Metrics that will use it: fid, or fid,fd-dinov2.")
    ] = "fid",
    features: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images whose single features are stored too, for kid and precision-recall.  "
            "[default: 50000 if a metric needs them, else 0]",
        ),
    ] = None,
    weights: ExtractorWeights = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 64,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure all images of a data set.

    Every image goes once through the feature network of each metric. `torchrun -m phema reference make`
    shares the images out.
    """
    _check_out(out, overwrite)
    with extra("reference"):
        from reference_trainer.data import load_dataset
        from reference_trainer.distributed import started
        from reference_trainer.metrics import (
            find_metrics,
            make_references,
            open_extractor,
            write_references,
        )

        chosen = find_metrics(metric)
        if features is None:
            features = 50_000 if any(m.needs_features for m in chosen) else 0
        names = list(dict.fromkeys(m.extractor for m in chosen))
        paths = parse_weights(weights, metric)
        with started(device) as ranks, output_folder(out.parent):
            dataset = load_dataset(data)

            def load() -> list[Extractor]:
                return [open_extractor(n, paths.get(n), ranks.device) for n in names]

            first = ranks.agree(load, main_only=True)  # downloads once
            extractors = ranks.agree(lambda: load() if first is None else first)
            assert extractors is not None
            with progress(f"measuring {dataset.name}") as bar:
                done = 0

                def report(count: int) -> None:
                    nonlocal done
                    done += count * ranks.world_size
                    bar(min(done, len(dataset)), len(dataset))

                made = make_references(
                    dataset,
                    extractors,
                    features=features,
                    batch_size=batch_size,
                    ranks=ranks,
                    on_batch=report,
                )
            if ranks.is_main:
                write_references(out, made)
                _say(out, made, json)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Published statistics, .pkl or .npz.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="REF", help="File to write.  [default: SOURCE with .safetensors]"
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Take over published statistics, such as img512.pkl of EDM2.

    Nothing of a pickle is executed. The file does not say which weights the features are of: use the
    ones that it was made with.
    """
    need_file(source)
    target = out or source.with_suffix(".safetensors")
    _check_out(target, overwrite)
    with extra("reference"):
        from reference_trainer.metrics import import_references, write_references

        references = import_references(source)
        with output_folder(target.parent):
            write_references(target, references)
        _say(target, references, json)


COMMANDS: dict[str, Callable[..., None]] = {"make": make, "import": import_}


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out must end in .safetensors, got {out}.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists. Choose another --out, or replace it with --overwrite.")


def _say(out: Path, references: Mapping[str, Reference], json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "extractor": name,
            "images": reference.moments.count,
            "features": 0 if reference.features is None else len(reference.features),
            "weights_hash": reference.weights_hash,
            "source": reference.source,
        }
        for name, reference in references.items()
    ]
    if json:
        print_json({"out": str(out), "references": rows})
        return
    cells = [[*row.values()] for row in rows]
    for line in cells:
        line[3] = line[3][:12] or "unknown"
    typer.echo(table(["extractor", "images", "single features", "weights", "of"], cells))
    typer.echo(out)
