"""Images to latents in the EDM2 layout: mean and standard deviation of each."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema import ConfigError
from reference_trainer.data.conversion import Written
from reference_trainer.data.dataset import Dataset
from reference_trainer.data.output import labels_table, open_output
from reference_trainer.data.reading import ItemReader
from reference_trainer.data.vae import Autoencoder


def encode(
    source: Dataset,
    path: Path,
    autoencoder: Autoencoder,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the latents of images: float32 `[2c, h, w]`, means and then standard deviations, as .npy files.

    The batches begin at the same items however often the call was interrupted, so on one machine the
    result is the same byte for byte.

    Args:
        source: images of one size.
        path: a folder, or a zip (`.zip`); it must not exist, or be the result of this very call.
        autoencoder: what encodes.
        batch_size: images at a time.
        progress: called with (done, total) items.

    Raises:
        ConfigError: the source holds no images of a size that the autoencoder takes, an image cannot be read
            (names its file), or `path` holds something else.
        SnapshotWriteError: the disk is full, for example.
    """
    _check(source, autoencoder)
    count = len(source)
    identity = {
        "kind": "latents",
        "source": source.fingerprint,
        "autoencoder": autoencoder.identity,
        "input_range": autoencoder.input_range,
        "batch_size": batch_size,
    }
    with open_output(path, latent_name, count, identity) as output:
        if output is None:
            return Written(path, count, count, source.label_dim)
        already = output.done
        first = already - already % batch_size
        chunks = [np.arange(i, min(i + batch_size, count)) for i in range(first, count, batch_size)]
        with contextlib.closing(ItemReader(source)) as reader:
            for chunk, pixels in zip(chunks, reader.ahead(chunks), strict=True):
                latents = autoencoder.encode(torch.from_numpy(pixels)).numpy()
                for values in latents[max(0, output.done - int(chunk[0])) :]:
                    output.add(npy_bytes(values))
                if progress is not None:
                    progress(output.done, count)
        names = [latent_name(i) for i in range(count)]
        labels = source.labels.tolist() if source.label_dim else None
        output.finish(labels_table(names, labels, identity))
    return Written(path, count, already, source.label_dim)


def _check(source: Dataset, autoencoder: Autoencoder) -> None:
    if source.kind != "pixels" or source.channels not in (1, 3):
        raise ConfigError(
            f"data {source.name} must hold images with 1 or 3 channels to be encoded, got {source.kind} "
            f"with {source.channels}."
        )
    if source.resolution % autoencoder.factor:
        raise ConfigError(
            f"data {source.name} has {source.resolution}x{source.resolution} images, and this autoencoder "
            f"makes one latent pixel of {autoencoder.factor}x{autoencoder.factor}. Convert to a larger "
            "resolution first."
        )


def npy_bytes(values: npt.NDArray[np.float32]) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def latent_name(index: int) -> str:
    """Name of a latent in the EDM2 layout.

    Example:
        >>> latent_name(1234567)
        '01234/img-mean-std-01234567.npy'
    """
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
