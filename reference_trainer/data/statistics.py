"""Mean and standard deviation of a data set, and the mapping to network units that follows from them.

v is pixel / 127.5 - 1 for images and the latent for latents; network units are (v - mean) * scale, with
mean 0 and standard deviation sigma_data in every channel (EDM2 section B.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_ema import ConfigError
from reference_trainer.config import DataConfig
from reference_trainer.data.dataset import Dataset, Indices, Values
from reference_trainer.data.loading import is_path, load_dataset
from reference_trainer.data.reading import ItemReader

SAMPLE = 50_000
"""Items of a larger data set that `standardised` and `data_config_for` look at."""

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Moments of v, channel by channel, over items and pixels.

    Attributes:
        num_items: items that were looked at.
        mean: mean of each channel.
        std: standard deviation of each channel. For latents with standard deviations it is that of fresh
            samples mean + std * noise: the variance of the means plus the mean of the variances.
    """

    num_items: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scale(self, sigma_data: float = 0.5) -> tuple[float, ...]:
        """Factor of each channel that gives the standard deviation `sigma_data`.

        Raises:
            ConfigError: a channel is constant.
        """
        for channel, std in enumerate(self.std):
            if std <= 0:
                raise ConfigError(
                    f"channel {channel} of the data is constant, so no scale brings it to sigma_data. "
                    "Leave it out, or check the data."
                )
        return tuple(sigma_data / std for std in self.std)


def channel_statistics(
    dataset: Dataset,
    num_items: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChannelStatistics:
    """Mean and standard deviation of each channel, streamed in float64.

    Args:
        dataset: images or latents.
        num_items: look at so many items, evenly spread over the data set; None for all.
        progress: called with (done, total) items.

    Raises:
        ConfigError: an item cannot be read; names its file.

    Example:
        >>> statistics = channel_statistics(load_dataset("digits"))
        >>> [round(x, 4) for x in (*statistics.mean, *statistics.std)]
        [-0.3894, 0.7518]
    """
    indices = spread(len(dataset), num_items)
    moments = np.zeros((2, dataset.channels), np.float64)
    chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    done = 0
    with contextlib.closing(ItemReader(dataset)) as reader:
        for values in reader.ahead(chunks):
            moments += _moments(dataset, values)
            done += len(values)
            if progress is not None:
                progress(done, len(indices))
    mean, square = moments / (len(indices) * dataset.resolution**2)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return ChannelStatistics(len(indices), tuple(mean.tolist()), tuple(std.tolist()))


def _moments(dataset: Dataset, values: Values) -> npt.NDArray[np.float64]:
    """Sums of E v and E v^2 over items and pixels, `[2, channels]`."""
    v = np.asarray(values, np.float64)
    if dataset.kind == "pixels":
        v = v / 127.5 - 1
    mean, std = v[:, : dataset.channels], v[:, dataset.channels :]
    square = mean**2 + (std**2 if std.shape[1] else 0)
    return np.stack([mean.sum((0, 2, 3)), square.sum((0, 2, 3))])


def spread(num_items: int, count: int | None) -> Indices:
    """`count` of `num_items` indices at even distances, or all of them."""
    if count is None or count >= num_items:
        return np.arange(num_items)
    return np.arange(count) * num_items // count


def standardised(
    dataset: Dataset, sigma_data: float = 0.5
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and scale that bring each channel to mean 0 and standard deviation `sigma_data`.

    From all items, or from `SAMPLE` evenly spread ones of a larger data set.

    Raises:
        ConfigError: an item cannot be read, or a channel is constant.
    """
    statistics = channel_statistics(dataset, SAMPLE)
    return statistics.mean, statistics.scale(sigma_data)


def data_config_for(source: str | Path, sigma_data: float = 0.5) -> DataConfig:
    """The configuration of a data set: path, kind and mapping to network units.

    Args:
        source: name of a built-in data set, or path of a folder, zip or Hugging Face data set.
        sigma_data: standard deviation in network units.

    Raises:
        ConfigError: there is no such data set, or it cannot be used.

    Example:
        >>> config = data_config_for("digits")
        >>> config.path, round(config.mean[0], 4)
        (None, -0.3894)
    """
    dataset = load_dataset(str(source))
    mean, scale = standardised(dataset, sigma_data)
    return DataConfig(
        name=dataset.name,
        path=str(source) if is_path(str(source)) else None,
        kind=dataset.kind,
        mean=mean,
        scale=scale,
        sigma_data=sigma_data,
    )
