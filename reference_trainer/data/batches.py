"""The batches of a run: which images a step sees, read ahead, in network units, on the device.

A batch is a function of the seed and of the number of images seen, so a resumed run sees what an
uninterrupted one would have seen, whatever reads ahead and however many processes share a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from posthoc_ema import ConfigError
from reference_trainer.config import TrainConfig
from reference_trainer.data.dataset import Dataset, Indices
from reference_trainer.data.reading import ItemReader, PendingItems
from reference_trainer.data.sampler import batch_indices, entropy

RESIDENT_BYTES = 2**28
"""Data sets of up to this size are read once, before the first step, and stay on the device."""

_LATENT = 2  # a use of the seed, apart from those of the trainer (reference_trainer.state)


class _Source(Protocol):
    """Stored items of a batch, on the device."""

    def take(self, nimg: int) -> tuple[Tensor, Tensor]: ...
    def close(self) -> None: ...


class Batches:
    """The batches of a run, or of one rank of it. Made by `new_batches`; close it after use.

    Args:
        dataset: the data set.
        config: the run's configuration.
        device: where batches go.
        rank: the process, 0..world_size - 1.
        world_size: number of processes that share each batch.
        resident_bytes: see `RESIDENT_BYTES`.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: TrainConfig,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self._seed, self._batch_size, self._device = config.seed, config.batch_size, device
        self._slice = rank_slice(config.batch_size, rank, world_size)
        self._kind, self._channels = dataset.kind, dataset.channels
        data = config.data
        self._mean, self._scale = (channel_values(v, device) for v in (data.mean, data.scale))
        order = _Order(len(dataset), config, self._slice)
        self._source: _Source = (
            _Resident(dataset, order, device)
            if num_bytes(dataset) <= resident_bytes
            else _Streamed(dataset, order, device)
        )

    def at(self, nimg: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the batch that is seen after `nimg` images.

        Args:
            nimg: images seen, a multiple of the batch size in a run.

        Returns:
            Images in network units, float32 `[n, c, h, w]`, and labels, int64 `[n]`, on the device.

        Raises:
            ConfigError: an image cannot be read; names its file.
        """
        stored, labels = self._source.take(nimg)
        return (self._units(stored, nimg) - self._mean) * self._scale, labels

    def close(self) -> None:
        """Stop reading ahead."""
        self._source.close()

    def _units(self, stored: Tensor, nimg: int) -> Tensor:
        """Pixels in -1..1, or one fresh sample of each latent."""
        if self._kind == "pixels":
            return stored.to(torch.float32) / 127.5 - 1
        c = self._channels
        if stored.shape[1] == c:
            return stored
        return stored[:, :c] + stored[:, c:] * self._noise(stored, nimg)

    def _noise(self, stored: Tensor, nimg: int) -> Tensor:
        """Unit noise, drawn for the whole batch, so that it does not depend on the number of ranks."""
        generator = torch.Generator(self._device)
        generator.manual_seed(entropy(self._seed, nimg, _LATENT))
        shape = (self._batch_size, self._channels, *stored.shape[2:])
        return torch.randn(shape, generator=generator, device=self._device)[self._slice]


def new_batches(
    dataset: Dataset,
    config: TrainConfig,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    resident_bytes: int = RESIDENT_BYTES,
) -> Batches:
    """The batches of a run.

    Args:
        dataset: the data set. Up to `resident_bytes` it is read now and kept on the device; a larger one
            is read ahead by threads while the network trains.
        config: the run's configuration.
        device: where batches go.
        rank: this process, 0..world_size - 1.
        world_size: number of processes; each gets an equal, contiguous part of every batch.
        resident_bytes: largest size of a data set, as stored in memory, that is kept on the device.

    Raises:
        ConfigError: the data set does not fit the network, or the batch does not divide.

    Example:
        >>> from reference_trainer.data import load_dataset
        >>> from reference_trainer.presets import PRESETS
        >>> config = PRESETS["digits-xs"]()
        >>> batches = new_batches(load_dataset("digits"), config, torch.device("cpu"))
        >>> images, labels = batches.at(0)
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """
    check_fits(dataset, config)
    return Batches(dataset, config, device, rank, world_size, resident_bytes)


def check_fits(dataset: Dataset, config: TrainConfig) -> None:
    """Check that a run can train on a data set.

    Raises:
        ConfigError: resolution, channels, labels or their mapping are not those of the network.
    """
    network, name = config.network, repr(config.data.path or dataset.name)
    if dataset.kind != config.data.kind:
        raise ConfigError(
            f"data.kind must be {dataset.kind!r} for the data set {name}, got {config.data.kind!r}."
        )
    for key, needed, given in (
        ("img_resolution", dataset.resolution, network.img_resolution),
        ("img_channels", dataset.channels, network.img_channels),
    ):
        if needed != given:
            raise ConfigError(
                f"network.{key} must be {needed} for the data set {name}, got {given}."
            )
    if network.label_dim > 0 and dataset.label_dim == 0:
        raise ConfigError(
            f"data set {name} has no labels, and network.label_dim is {network.label_dim}. Add labels "
            "to its dataset.json, or set network.label_dim to 0 for an unconditional network."
        )
    if 0 < network.label_dim < dataset.label_dim:
        raise ConfigError(
            f"network.label_dim must be {dataset.label_dim} for the data set {name} "
            f"(or 0 for an unconditional network), got {network.label_dim}."
        )


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of each batch that a rank sees.

    Raises:
        ConfigError: the batch does not divide into equal parts.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, {world_size}, got {batch_size}."
        )
    part = batch_size // world_size
    return slice(rank * part, (rank + 1) * part)


def channel_values(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of each channel (or one for all) as float32 `[1, c or 1, 1, 1]`."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


def num_bytes(dataset: Dataset) -> int:
    """Size of all items as `read` returns them, at most."""
    area = dataset.resolution**2
    per_channel = 1 if dataset.kind == "pixels" else 2 * 4
    return len(dataset) * dataset.channels * area * per_channel


class _Order:
    """Indices of a rank's part of each batch."""

    def __init__(self, num_items: int, config: TrainConfig, part: slice) -> None:
        self.num_items, self.part = num_items, part
        self.batch_size, self.seed, self.total = config.batch_size, config.seed, config.total_images

    def at(self, nimg: int) -> Indices:
        whole = batch_indices(self.num_items, nimg, self.batch_size, self.seed)
        return whole[self.part]


class _Resident:
    """All items on the device."""

    def __init__(self, dataset: Dataset, order: _Order, device: torch.device) -> None:
        self._order = order
        values, labels = read_all(dataset)
        self._values, self._labels = values.to(device), labels.to(device)

    def take(self, nimg: int) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(self._order.at(nimg))
        if (
            self._values.is_cuda
        ):  # a copy from other memory would wait for all that the GPU has to do
            index = index.pin_memory()
        index = index.to(self._values.device, non_blocking=True)
        return self._values[index], self._labels[index]

    def close(self) -> None:
        pass


class _Streamed:
    """The next batches are read by threads while the device computes; a bounded number of them."""

    _AHEAD = 4

    def __init__(self, dataset: Dataset, order: _Order, device: torch.device) -> None:
        self._order, self._device = order, device
        self._reader = ItemReader(dataset, pinned=device.type == "cuda")
        self._batches: dict[int, PendingItems] = {}

    def take(self, nimg: int) -> tuple[Tensor, Tensor]:
        wanted = [nimg + k * self._order.batch_size for k in range(self._AHEAD + 1)]
        for stale in set(self._batches) - set(wanted):
            self._batches.pop(stale).cancel()
        for start in wanted:
            if start not in self._batches and (start == nimg or start < self._order.total):
                self._batches[start] = self._reader.begin(self._order.at(start))
        values, labels = self._batches.pop(nimg).result()
        return (
            values.to(self._device, non_blocking=True),
            labels.to(self._device, non_blocking=True),
        )

    def close(self) -> None:
        self._batches.clear()
        self._reader.close()


def read_all(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All items and their labels, read by threads."""
    with contextlib.closing(ItemReader(dataset)) as reader:
        return reader.begin(np.arange(len(dataset))).result()
