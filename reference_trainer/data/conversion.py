"""Images of any size and container to a data set in the EDM2 layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from posthoc_ema import ConfigError
from reference_trainer.data.crop import CROPS, crop_image
from reference_trainer.data.images import loaded, open_image, png_bytes
from reference_trainer.data.items import EncodedItems
from reference_trainer.data.output import labels_table, open_output
from reference_trainer.data.reading import ordered

MODES = {"rgb": "RGB", "gray": "L"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """What becomes of each image.

    Attributes:
        resolution: side of the results, a power of two.
        crop: "adm", "center" or "none" (`reference_trainer.data.crop`).
        mode: "rgb" or "gray"; transparency is dropped.

    Raises:
        ConfigError: a value is out of range.
    """

    resolution: int
    crop: str = "adm"
    mode: str = "rgb"

    def __post_init__(self) -> None:
        side = self.resolution
        if side < 1 or side & (side - 1):
            raise ConfigError(f"resolution must be a power of two, got {side}.")
        for name, known in (("crop", CROPS), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )


@dataclass(frozen=True, slots=True)
class Written:
    """What a call made.

    Attributes:
        path: the data set.
        num_items: items in it.
        already: items that were there before this call; all of them if there was nothing to do.
        label_dim: number of classes, 0 without labels.
    """

    path: Path
    num_items: int
    already: int
    label_dim: int


def convert(
    source: EncodedItems,
    path: Path,
    options: ConversionOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write images as PNG files of one size in the EDM2 layout.

    Threads decode, crop and encode; entries are written in the order of the source. An interrupted call
    goes on when it is made again, and makes the same bytes.

    Args:
        source: the images.
        path: a folder, or a zip (`.zip`); it must not exist, or be the result of this very call.
        options: what becomes of each image.
        progress: called with (done, total) items.

    Raises:
        ConfigError: an image cannot be read or cropped (names its file), or `path` holds something else.
        SnapshotWriteError: the disk is full, for example.

    Example:
        >>> import tempfile
        >>> from reference_trainer.data.loading import open_items
        >>> folder = Path(tempfile.mkdtemp())
        >>> options = ConversionOptions(resolution=4, mode="gray")
        >>> convert(open_items("digits"), folder / "small.zip", options).num_items
        1797
    """
    if source.kind != "pixels":
        raise ConfigError(f"data {source.name} holds latents; only images can be converted.")
    count = len(source)
    identity = {"kind": "pixels", "source": source.fingerprint, **asdict(options)}

    def item(index: int) -> bytes:
        data = source.read_files(np.array([index]))[0]
        return converted(data, source.where(index), options)

    with open_output(path, pixel_name, count, identity) as output:
        if output is None:
            return Written(path, count, count, source.label_dim)
        already = output.done
        for data in ordered(item, range(already, count)):
            output.add(data)
            if progress is not None:
                progress(output.done, count)
        names = [pixel_name(i) for i in range(count)]
        labels = None if source.labels is None else source.labels.tolist()
        output.finish(labels_table(names, labels, identity))
    return Written(path, count, already, source.label_dim)


def converted(data: bytes, where: str, options: ConversionOptions) -> bytes:
    """One image file to a PNG file of the wanted size.

    Raises:
        ConfigError: it is damaged or cannot be cropped; `where` is named.
    """
    image = loaded(open_image(data, where), where, MODES[options.mode])
    try:
        image = crop_image(image, options.resolution, options.crop)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return png_bytes(image)


def pixel_name(index: int) -> str:
    """Name of an image in the EDM2 layout.

    Example:
        >>> pixel_name(1234567)
        '01234/img01234567.png'
    """
    return f"{index // 1000:05d}/img{index:08d}.png"
