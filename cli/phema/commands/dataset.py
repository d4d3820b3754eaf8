"""`phema dataset`: training data in the EDM2 layout, latents of it, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phema.options import Device, Json, extra
from phema.output import print_json, progress, table
from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from reference_trainer.data.conversion import Written

HELP = "Make training data from images, encode it to latents, and measure it."
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder or zip of images, folder of Hugging Face's save_to_disk, or a built-in name.",
    ),
]
Destination = Annotated[
    Path,
    typer.Argument(metavar="DEST", help="Zip (.zip) or folder to make; continued if it is a part."),
]


def convert(
    source: Source,
    out: Destination,
    resolution: Annotated[int, typer.Option(min=1, help="Side of the results, a power of two.")],
    crop: Annotated[
        str,
        typer.Option(
            help="adm (EDM2's: resize the shorter side, cut out the middle), center, or none (images have "
            "that size)."
        ),
    ] = "adm",
    mode: Annotated[str, typer.Option(help="rgb or gray.")] = "rgb",
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON like dataset.json, {"labels": [[name, class], ...]}.  [default: the source\'s '
            "dataset.json, or its top-level folders]",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Crop and resize images into the EDM2 layout.

    PNG files without compression, and dataset.json. Interrupted, the same command goes on where it was.
    """
    _check_apart(source, out)
    with extra("dataset convert"):
        from reference_trainer.data.conversion import ConversionOptions
        from reference_trainer.data.conversion import convert as run
        from reference_trainer.data.loading import open_items

        options = ConversionOptions(resolution=resolution, crop=crop, mode=mode)
        items = open_items(source, labels)
        with progress("converting") as bar:
            written = run(items, out, options, bar)
    _say(written, json)


def encode(
    source: Source,
    out: Destination,
    vae: Annotated[
        str,
        typer.Option(
            metavar="VAE",
            help="Folder of diffusers' AutoencoderKL or of a pipeline with one, or its name on the Hub, "
            "such as stabilityai/sd-vae-ft-mse.",
        ),
    ],
    input_range: Annotated[
        str,
        typer.Option(
            metavar="RANGE",
            help="How pixels are fed: 0..1 (EDM2; its published statistics belong to it) or -1..1 (as the "
            "autoencoder was trained).",
        ),
    ] = "0..1",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 16,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Encode images to latents: mean and standard deviation of each.

    Interrupted, the same command goes on where it was. The range is written into dataset.json.
    """
    _check_apart(source, out)
    with extra("dataset encode"):
        from reference_trainer.data import load_dataset
        from reference_trainer.data.encoding import encode as run
        from reference_trainer.data.vae import load_autoencoder
        from reference_trainer.loop import resolve_device

        dataset = load_dataset(source)
        autoencoder = load_autoencoder(vae, input_range=input_range, device=resolve_device(device))
        with progress("encoding") as bar:
            written = run(dataset, out, autoencoder, batch_size=batch_size, progress=bar)
    _say(written, json)


def stats(
    source: Source,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, help="Look at so many, evenly spread.  [default: all]"),
    ] = None,
    sigma_data: Annotated[
        float, typer.Option("--sigma-data", help="Wanted standard deviation in network units.")
    ] = 0.5,
    json: Json = False,
) -> None:
    """Measure each channel, and print the mapping to network units that follows.

    Of v = pixel / 127.5 - 1 for images, of fresh samples for latents. Network units are (v - mean) * scale.
    """
    if not sigma_data > 0:
        raise ConfigError(f"--sigma-data must be positive, got {sigma_data}.")
    with extra("dataset stats"):
        from reference_trainer.data import load_dataset
        from reference_trainer.data.statistics import channel_statistics

        dataset = load_dataset(source)
        with progress("measuring") as bar:
            measured = channel_statistics(dataset, num_images, bar)
        scale = measured.scale(sigma_data)
    if json:
        value: dict[str, Any] = {
            "name": dataset.name,
            "kind": dataset.kind,
            "num_items": len(dataset),
            "measured_items": measured.num_items,
            "resolution": dataset.resolution,
            "channels": dataset.channels,
            "label_dim": dataset.label_dim,
            "fingerprint": dataset.fingerprint,
            "std": list(measured.std),
            "data": {"mean": list(measured.mean), "scale": list(scale), "sigma_data": sigma_data},
        }
        print_json(value)
        return
    size = f"{dataset.resolution}x{dataset.resolution}x{dataset.channels}"
    classes = f"{dataset.label_dim} classes" if dataset.label_dim else "no labels"
    typer.echo(f"{dataset.name}: {len(dataset)} {dataset.kind} of {size}, {classes}")
    rows = [
        [channel, f"{mean:.6f}", f"{std:.6f}", f"{factor:.6f}"]
        for channel, (mean, std, factor) in enumerate(
            zip(measured.mean, measured.std, scale, strict=True)
        )
    ]
    typer.echo(table(["channel", "mean", "std", "scale"], rows))
    values = {"mean": list(measured.mean), "scale": list(scale), "sigma_data": sigma_data}
    typer.echo(" ".join(f"--set 'data.{key}={value}'" for key, value in values.items()))


COMMANDS: dict[str, Callable[..., None]] = {"convert": convert, "encode": encode, "stats": stats}


def _check_apart(source: str, out: Path) -> None:
    """A folder that grows inside of its own source would be part of it."""
    if out.suffix != ".zip" and out.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(
            f"{out} lies in {source}, which is read. Choose a destination outside of it."
        )


def _say(written: Written, json: bool) -> None:
    if json:
        print_json(
            {
                "out": str(written.path),
                "num_items": written.num_items,
                "already": written.already,
                "label_dim": written.label_dim,
            }
        )
        return
    classes = f"{written.label_dim} classes" if written.label_dim else "no labels"
    if written.already == written.num_items:
        typer.echo(f"{written.path}: complete with {written.num_items} items, nothing to do")
    else:
        new = written.num_items - written.already
        typer.echo(f"{written.path}: {written.num_items} items ({new} new), {classes}")
