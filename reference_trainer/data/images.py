"""One stored file to an array: 8-bit images, and latents of an autoencoder."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LATENT_SUFFIX = ".npy"
MEAN_STD_PREFIX = "img-mean-std-"
"""Latent files of this name hold means and then standard deviations (EDM2)."""

_SAME = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}  # mode of a file -> mode of its pixels


def open_image(data: bytes, where: str) -> Image:
    """The image of a file's bytes, not decoded yet.

    Raises:
        ConfigError: it is no image.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ConfigError(
            f"{where} is no image that can be read. Restore it, or leave it out of the data set."
        ) from None


def decode_pixels(data: bytes, where: str, side: int | None = None) -> npt.NDArray[np.uint8]:
    """Pixels of an image file.

    Args:
        data: the file's bytes.
        where: what to call it in messages.
        side: the side that it must have; None for any square power of two.

    Returns:
        uint8 `[1, h, w]` for gray, `[3, h, w]` for RGB and palettes.

    Raises:
        ConfigError: it is damaged, of another size, or has other channels.
    """
    image = open_image(data, where)
    check_side(image.size, where, side)
    mode = _SAME.get(image.mode)
    if mode is None:
        raise ConfigError(
            f"{where} has {len(image.getbands())} channels of mode {image.mode}; images must be 8-bit gray "
            "or RGB. `phema dataset convert` makes them so."
        )
    pixels = np.asarray(loaded(image, where, mode))
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def loaded(image: Image, where: str, mode: str) -> Image:
    """Decode an opened image in a mode.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        image.load()
        return image if image.mode == mode else image.convert(mode)
    except (OSError, SyntaxError, ValueError):
        raise ConfigError(
            f"{where} is damaged: its pixels cannot be decoded. Restore it, or leave it out of the data "
            "set."
        ) from None


def png_bytes(image: Image) -> bytes:
    """A PNG file, not compressed: it is decoded in every epoch."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of gray or RGB pixels, uint8 `[1 or 3, h, w]`."""
    from PIL import Image

    array = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return png_bytes(Image.fromarray(array))


def decode_latent(data: bytes, where: str, side: int | None = None) -> npt.NDArray[np.float32]:
    """Numbers of a latent file (.npy), float32 `[channels, h, w]`; they may be a view of the bytes.

    Raises:
        ConfigError: it is damaged, holds anything but finite floats, or is of another shape.
    """
    try:
        dtype, shape, order, start = npy_header(data[: _npy_start(data)])
        count = (len(data) - start) // max(dtype.itemsize, 1)
        flat = np.frombuffer(data, dtype, count, start)  # refuses Python objects
        values = flat.reshape(shape, order=order)
    except (ValueError, EOFError, OSError, SyntaxError, TypeError):
        raise ConfigError(
            f"{where} is no .npy file of numbers that can be read. Make it again with `phema dataset "
            "encode`."
        ) from None
    if values.ndim != 3 or not np.issubdtype(values.dtype, np.floating):
        raise ConfigError(
            f"{where} must hold floats of shape (channels, height, width), got {values.dtype} of shape "
            f"{values.shape}. Make it again with `phema dataset encode`."
        )
    check_side((values.shape[2], values.shape[1]), where, side)
    if not np.isfinite(values).all():
        raise ConfigError(f"{where} holds numbers that are not finite. Make it again.")
    return values.astype(np.float32, copy=False)


def _npy_start(data: bytes) -> int:
    """Length of the header of a .npy file."""
    wide = len(data) > 6 and data[6] > 1  # of version 2 on
    return (12 if wide else 10) + int.from_bytes(data[8 : 12 if wide else 10], "little")


@functools.lru_cache(maxsize=64)  # all files of a data set have the same
def npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Literal["C", "F"], int]:
    """Dtype, shape, order and length of the header of a .npy file.

    Raises:
        ValueError: it is none.
    """
    buffer = io.BytesIO(header)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(buffer)
    return dtype, shape, "F" if fortran else "C", buffer.tell()


def check_side(size: tuple[int, int], where: str, side: int | None) -> None:
    """Check width and height.

    Raises:
        ConfigError: not square, no power of two, or another side than the one given.
    """
    width, height = size
    remedy = f"`phema dataset convert --resolution {side or 64}` makes images of one size."
    if side is not None and size != (side, side):
        raise ConfigError(f"{where} is {width}x{height}, the others are {side}x{side}. {remedy}")
    if width != height or width & (width - 1) or width == 0:
        raise ConfigError(
            f"{where} is {width}x{height}; items must be square with a side that is a power of two. "
            f"{remedy}"
        )
