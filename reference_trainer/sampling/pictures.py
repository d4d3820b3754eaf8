"""Images as files: one PNG each, or laid out in a grid."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from posthoc_ema.tensor_files import atomic_write


def image_grid(
    images: npt.NDArray[np.uint8], columns: int, scale: int = 1, gap: int = 0
) -> npt.NDArray[np.uint8]:
    """Lay images out row by row, each pixel enlarged to a square.

    Args:
        images: uint8 `[n, c, h, w]`, c 1 (gray) or 3 (RGB), n at least 1.
        columns: images per row, at least 1; the rest of the last row is white.
        scale: side of an enlarged pixel, at least 1.
        gap: white pixels between neighbouring images.

    Returns:
        uint8 `[H, W]` for gray, `[H, W, 3]` for RGB.

    Raises:
        ConfigError: the shape, `columns` or `scale` is out of range.

    Example:
        >>> image_grid(np.zeros((5, 1, 8, 8), np.uint8), columns=3, scale=2).shape
        (32, 48)
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ConfigError(
            f"images must have shape [n, c, h, w] with c 1 or 3, got {list(images.shape)}."
        )
    if columns < 1 or scale < 1:
        raise ConfigError(f"columns and scale must be at least 1, got {columns} and {scale}.")
    n, c, h, w = images.shape
    rows = -(-n // columns)
    h, w = h * scale, w * scale
    cells = np.full((rows * columns, c, h, w), 255, np.uint8)
    cells[:n] = images.repeat(scale, axis=2).repeat(scale, axis=3)
    cells = np.pad(cells, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=255)
    grid = cells.reshape(rows, columns, c, h + gap, w + gap).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (h + gap), columns * (w + gap), c)[: -gap or None, : -gap or None]
    return grid[:, :, 0] if c == 1 else grid


def save_png(path: str | Path, array: npt.NDArray[np.uint8], *, durable: bool = True) -> None:
    """Write an image as PNG; the file appears complete or not at all.

    Args:
        path: the file.
        array: uint8 `[H, W]` for gray or `[H, W, 3]` for RGB.
        durable: wait until it is on the disk; without, a crash of the machine may lose it.

    Raises:
        SnapshotWriteError: it cannot be written.
    """
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(array).save(content, format="PNG")
    with (
        atomic_write(Path(path), durable) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as file,
    ):
        file.write(content.getbuffer())
