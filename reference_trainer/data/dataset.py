"""The record of a data set in memory, and the table of built-in ones."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from reference_trainer.data import digits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Labelled 8-bit images in memory.

    Attributes:
        name: the name given to `load_dataset`.
        images: uint8 `[n, c, h, w]`, 0..255, square.
        labels: int64 `[n]`, 0..label_dim - 1.
        label_dim: number of classes.
    """

    name: str
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    label_dim: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return int(self.images.shape[-1])

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for gray, 3 for RGB."""
        return int(self.images.shape[1])


def _digits() -> Dataset:
    images, labels = digits.load_arrays()
    return Dataset(name="digits", images=images, labels=labels, label_dim=10)


_BUILT_IN: dict[str, Callable[[], Dataset]] = {"digits": _digits}


def load_dataset(name: str) -> Dataset:
    """Load a built-in data set by name.

    Args:
        name: `"digits"`, scikit-learn's 1797 handwritten digits, 8x8 gray (no download).

    Returns:
        The data set; every call returns new arrays.

    Raises:
        ConfigError: the name is unknown, or the package that carries the images is not installed.

    Example:
        >>> dataset = load_dataset("digits")
        >>> dataset.images.shape, dataset.label_dim
        ((1797, 1, 8, 8), 10)
    """
    if name not in _BUILT_IN:
        near = difflib.get_close_matches(name, _BUILT_IN, n=1, cutoff=0.0)[0]
        known = ", ".join(sorted(_BUILT_IN))
        raise ConfigError(f"data set must be one of: {known}; got '{name}'. Did you mean '{near}'?")
    return _BUILT_IN[name]()
