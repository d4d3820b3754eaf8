"""Patches of eight photographs that installed packages carry: natural images without a download.

Six are scikit-image's (astronaut, cat, coffee, galaxies, motorcycle, rocket) and two scikit-learn's (china,
flower). Each is fitted into the same frame and cut on a regular grid, so all classes have equally many
patches; neighbouring patches overlap.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError

FRAME = (320, 212)
"""Width and height that every photograph is fitted into: none is enlarged."""

STRIDES = {16: 4, 32: 4, 64: 8}
"""Side of the patches -> distance of neighbouring ones, in pixels."""

PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
)
"""Package and file of each class, in the order of the labels."""


def load_arrays(side: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the patches, uint8 `[n, 3, side, side]`, and the photograph of each, int64 `[n]` in 0..7.

    Args:
        side: 16, 32 or 64.

    Raises:
        ConfigError: scikit-image or scikit-learn is not installed.

    Example:
        >>> images, labels = load_arrays(64)
        >>> images.shape, int(labels.max())
        ((5016, 3, 64, 64), 7)
    """
    patches = [cut(photograph(*source), side, STRIDES[side]) for source in PHOTOGRAPHS]
    labels = np.repeat(np.arange(len(patches)), len(patches[0]))
    return np.concatenate(patches), labels


def cut(photo: npt.NDArray[np.uint8], side: int, stride: int) -> npt.NDArray[np.uint8]:
    """All patches of a regular grid, row by row.

    Args:
        photo: uint8 `[h, w, 3]`.
        side: side of a patch.
        stride: distance of neighbouring patches.

    Returns:
        uint8 `[n, 3, side, side]`.
    """
    windows = np.lib.stride_tricks.sliding_window_view(photo, (side, side), axis=(0, 1))
    grid = windows[::stride, ::stride]  # [rows, columns, 3, side, side]
    return np.ascontiguousarray(grid.reshape(-1, *grid.shape[2:]))


@cache
def photograph(package: str, file: str) -> npt.NDArray[np.uint8]:
    """A photograph in `FRAME`, uint8 `[h, w, 3]`.

    Raises:
        ConfigError: the package is not installed, or does not carry the file.
    """
    from PIL import Image, ImageOps

    path = _package_folder(package) / file
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), FRAME, Image.Resampling.BICUBIC)
    except OSError:
        raise ConfigError(
            f"data set 'photos' needs {path}, which this version of {package} does not carry. "
            "Run: pip install --upgrade 'posthoc-ema[trainer]'"
        ) from None
    return np.asarray(fitted)


def _package_folder(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"data set 'photos' needs {package}, which is not installed. "
            "Run: pip install 'posthoc-ema[trainer]'"
        )
    return Path(spec.origin).parent
