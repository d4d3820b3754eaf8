"""What every data set offers, and the one whose images are in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Kind: TypeAlias = Literal["pixels", "latents"]
Indices: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = npt.NDArray[Any]


class Dataset(Protocol):
    """Square images, or latents of images, that are read by index. Reading is thread-safe."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def kind(self) -> Kind:
        """`"pixels"` (8-bit images) or `"latents"` (numbers of an autoencoder)."""
        ...

    @property
    def resolution(self) -> int:
        """Side of an item."""
        ...

    @property
    def channels(self) -> int:
        """Channels that a network sees: C for latents stored as C means and C standard deviations."""
        ...

    @property
    def label_dim(self) -> int:
        """Number of classes, the largest label + 1; 0 without labels."""
        ...

    @property
    def labels(self) -> Indices:
        """Label of each item, int64 `[num_items]`, 0..label_dim - 1; zeros without labels."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what is in it: names, sizes and labels, or the values.

        It does not depend on where it is stored: a folder and a zip of the same files have the same.
        """
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> tuple[Values, Indices]:
        """The items at `indices` `[n]`, in that order, and their labels, int64 `[n]`.

        Returns:
            Pixels, uint8 `[n, c, h, w]` in 0..255; latents, float32 `[n, c, h, w]`, or `[n, 2c, h, w]` of
            means and then standard deviations.

        Raises:
            ConfigError: an item cannot be read, or is of another size than the first; names its file.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayDataset:
    """Labelled 8-bit images in memory; a `Dataset`.

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
    def kind(self) -> Kind:
        """Always pixels."""
        return "pixels"

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return int(self.images.shape[-1])

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for gray, 3 for RGB."""
        return int(self.images.shape[1])

    @property
    def fingerprint(self) -> str:
        """Hash of shape, values and labels."""
        shape = integers(np.asarray(self.images.shape))
        return fingerprint(shape, self.images.tobytes(), integers(self.labels))

    def read(self, indices: Indices) -> tuple[Values, Indices]:
        """The images and labels at `indices`."""
        return self.images[indices], self.labels[indices]


def fingerprint(*parts: bytes | memoryview) -> str:
    """16 hex digits of some bytes, the same on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def integers(values: npt.NDArray[Any] | None) -> bytes:
    """The same bytes on every machine; none for None."""
    return b"" if values is None else values.astype("<i8").tobytes()
