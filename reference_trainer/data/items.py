"""Data sets of encoded items (PNG, JPEG, npy ...), whatever holds their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

from posthoc_ema import ConfigError
from posthoc_ema.tensor_files import brief
from reference_trainer.data.dataset import ArrayDataset, Indices, Kind, Values
from reference_trainer.data.images import (
    MEAN_STD_PREFIX,
    decode_latent,
    decode_pixels,
    encode_png,
)

MAX_LABEL = 2**20


class EncodedItems(Protocol):
    """The files of a data set, by index, and their labels. Reading is thread-safe."""

    @property
    def name(self) -> str:
        """What to call the data set in messages."""
        ...

    @property
    def kind(self) -> Kind:
        """`"pixels"` or `"latents"`."""
        ...

    @property
    def labels(self) -> Indices | None:
        """Label of each item, int64 `[num_items]`; None without labels."""
        ...

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 without labels."""
        ...

    @property
    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was written down about the data set besides the labels."""
        ...

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """What to call an item in messages, for example its file."""
        ...

    def read_files(self, indices: Indices) -> list[bytes]:
        """The encoded items at `indices`.

        Raises:
            ConfigError: an item cannot be read; names it.
        """
        ...


class EncodedDataset:
    """Images or latents that are decoded when they are read; a `Dataset`.

    Args:
        items: the encoded items.

    Attributes:
        items: the encoded items.

    Raises:
        ConfigError: there are no items, or the first cannot be read; names it.
    """

    def __init__(self, items: EncodedItems) -> None:
        self.items, self.name, self.kind = items, items.name, items.kind
        self.label_dim, self.fingerprint = items.label_dim, items.fingerprint
        labels = items.labels
        self.labels: Indices = np.zeros(len(items), np.int64) if labels is None else labels
        first = self._decode(items.read_files(np.zeros(1, np.int64))[0], 0, None)
        self._stored_channels, self.resolution = int(first.shape[0]), int(first.shape[1])
        self.channels = self._stored_channels // (2 if self._has_std() else 1)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> tuple[Values, Indices]:
        """The items at `indices`; see `Dataset.read`."""
        shape = (len(indices), self._stored_channels, self.resolution, self.resolution)
        values = np.empty(shape, np.uint8 if self.kind == "pixels" else np.float32)
        for k, data in enumerate(self.items.read_files(indices)):
            values[k] = self._checked(data, int(indices[k]))
        return values, self.labels[indices]

    def _decode(self, data: bytes, index: int, side: int | None) -> Values:
        decode = decode_pixels if self.kind == "pixels" else decode_latent
        return decode(data, self.items.where(index), side)

    def _checked(self, data: bytes, index: int) -> Values:
        values = self._decode(data, index, self.resolution)
        if len(values) != self._stored_channels:
            raise ConfigError(
                f"{self.items.where(index)} has {len(values)} channels, the first item has "
                f"{self._stored_channels}. `phema dataset convert` makes all images RGB."
            )
        return values

    def _has_std(self) -> bool:
        """Whether items are latents of means and standard deviations, as the names of all say."""
        if self.kind == "pixels":
            return False
        first, *others = (
            PurePosixPath(self.items.where(i)).name.startswith(MEAN_STD_PREFIX)
            for i in range(len(self))
        )
        if any(other != first for other in others):
            raise ConfigError(
                f"data {self.name}: some files are named {MEAN_STD_PREFIX}... and some are not. Keep latents "
                "with and without standard deviations apart."
            )
        if first and self._stored_channels % 2:
            raise ConfigError(
                f"{self.items.where(0)} must hold means and as many standard deviations, got "
                f"{self._stored_channels} channels. Make it again with `phema dataset encode`."
            )
        return first


class ArrayItems:
    """The images of a data set in memory as PNG files; `EncodedItems`.

    Args:
        dataset: gray or RGB images.
    """

    kind: Kind = "pixels"

    def __init__(self, dataset: ArrayDataset) -> None:
        self._dataset, self.name = dataset, dataset.name
        self.labels: Indices | None = dataset.labels
        self.label_dim, self.fingerprint = dataset.label_dim, dataset.fingerprint
        self.metadata: Mapping[str, Any] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        """Name of the data set and index."""
        return f"{self.name}, image {index}"

    def read_files(self, indices: Indices) -> list[bytes]:
        """PNG files of the images at `indices`."""
        return [encode_png(self._dataset.images[i]) for i in indices]


def check_label(label: object, where: str) -> None:
    """Check the number of a class.

    Raises:
        ConfigError: it is no integer, negative or absurdly large.
    """
    if type(label) is not int or not 0 <= label < MAX_LABEL:
        raise ConfigError(
            f"{where}: a label must be an integer in 0..{MAX_LABEL - 1}, got {brief(label)}. "
            "Number the classes from 0."
        )
