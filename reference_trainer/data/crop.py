"""Photographs of any size to squares of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

CROPS = ("adm", "center", "none")


def crop_image(image: Image, side: int, crop: str) -> Image:
    """A square of the given side.

    Args:
        image: a decoded image.
        side: side of the result in pixels.
        crop: `"adm"` (see `adm_crop`), `"center"` (the largest square in the middle, resized with a Lanczos
            filter), or `"none"` (the image must have that size already).

    Raises:
        ConfigError: the crop is unknown, or "none" and the size differs.
    """
    if crop == "adm":
        return adm_crop(image, side)
    if crop == "center":
        return center_crop(image, side)
    if crop != "none":
        raise ConfigError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}.")
    if image.size != (side, side):
        raise ConfigError(
            f"it is {image.width}x{image.height} and not {side}x{side}. Choose --crop adm or center."
        )
    return image


def adm_crop(image: Image, side: int) -> Image:
    """The crop of ADM and EDM2 (EDM2 section D.3).

    While the shorter side is at least twice the target, halve the image by box filtering; resize it
    bicubically so that the shorter side is the target; cut out the middle.
    """
    from PIL import Image

    while min(image.size) >= 2 * side:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return _middle(image.resize(size, Image.Resampling.BICUBIC), side)


def center_crop(image: Image, side: int) -> Image:
    """The largest square in the middle, resized with a Lanczos filter."""
    from PIL import Image

    square = _middle(image, min(image.size))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def _middle(image: Image, side: int) -> Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
