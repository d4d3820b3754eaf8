"""8-bit images from networks, batch by batch.

A network is evaluated as an evaluation copy of itself (`Precond.folded`): weight normalisation done
once, activations in the precision that is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema.errors import ConfigError
from reference_trainer.sampling.sampler import (
    Denoiser,
    SamplerConfig,
    StepwiseDenoiser,
    denoisers_of,
    plan_steps,
    run_sampler,
)
from reference_trainer.sampling.seeds import check_seeds, start_of

PRECISIONS = ("float32", "bfloat16", "float16")
PerChannel = float | Sequence[float] | torch.Tensor
"""One number, or one for each channel."""
Decoder = Callable[[torch.Tensor], npt.NDArray[np.uint8]]
"""Latents float32 `[n, c, h, w]`, as the autoencoder gave them -> uint8 `[n, 3, H, W]`."""


class ImageNetwork(Protocol):
    """What `sample_images` needs of a network.

    A preconditioned `torch.nn.Module` fits, called as `Denoiser` says; so does a
    `reference_trainer.guidance.GuidedNetwork`, which gives a denoiser per step.

    Attributes:
        img_channels: channels of an image.
        img_resolution: side of an image in pixels.
        label_dim: number of classes, 0 for an unconditional network.
        data_mean: with `data_scale`, how the network sees values (pixel / 127.5 - 1, or latents):
            x = (value - data_mean) * data_scale; one number, or one for each channel.
        data_scale: see `data_mean`.
    """

    img_channels: int
    img_resolution: int
    label_dim: int
    data_mean: Any
    data_scale: Any

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters, whose device is the one to sample on."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Some of the images that were asked for.

    Attributes:
        first: place of the first one in the list of seeds; the others follow it.
        seeds: their seeds.
        labels: int64 `[n]`, the classes they were asked to show; None without classes.
        images: uint8 `[n, c, h, w]`.
    """

    first: int
    seeds: tuple[int, ...]
    labels: npt.NDArray[np.int64] | None
    images: npt.NDArray[np.uint8]


def image_batches(
    network: ImageNetwork,
    seeds: Sequence[int],
    *,
    batch_size: int = 256,
    sampler: SamplerConfig | None = None,
    labels: Sequence[int] | npt.NDArray[np.int64] | None = None,
    precision: str | None = None,
    compiled: bool = False,
    decode: Decoder | None = None,
    wanted: Callable[[Sequence[int]], bool] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[ImageBatch]:
    """Generate one 8-bit image per seed, a batch at a time, on the network's own device.

    Several processes take the batches in turn: the batches, and so the images, are those of one
    process, bit for bit on equal hardware.

    Args:
        network: see `ImageNetwork`; it is not changed.
        seeds: one per image.
        batch_size: images at a time, at least 1.
        sampler: the sampler, 32 Heun steps by default.
        labels: class of each image, 0..label_dim - 1; None takes the one its seed draws.
        precision: dtype of the network's activations, "float32", "bfloat16" or "float16"; None takes
            the one it was trained in.
        compiled: run the network through `torch.compile`, which pays for thousands of images; the
            last batch is then filled up to full size.
        decode: makes images of latents; None takes the samples for pixels.
        wanted: is asked with the seeds of each batch, when the first one is taken; what it refuses is
            passed over.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ConfigError: an argument is out of range, the labels do not fit the seeds or the network, or
            the device's memory does not hold a batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    check_seeds(seeds)
    given = checked_labels(labels, len(seeds), network.label_dim)
    sampler = sampler or SamplerConfig()
    # Refuses guidance that does not fit before anything is made.
    denoisers_of(cast("Denoiser | StepwiseDenoiser", network), plan_steps(sampler))
    job = _Job(
        network=network,
        denoise=evaluated(network, precision, compiled),
        seeds=seeds,
        labels=given,
        batch_size=batch_size,
        sampler=sampler,
        decode=decode,
        full_batches=compiled,
    )

    def batches() -> Iterator[ImageBatch]:
        places = [
            first
            for first in range(0, len(seeds), batch_size)
            if wanted is None or wanted(seeds[first : first + batch_size])
        ]
        for first in places[rank::world_size]:
            yield _generate(job, first)

    return batches()


def sample_images(
    network: ImageNetwork,
    seeds: Sequence[int],
    *,
    batch_size: int = 256,
    num_steps: int = 32,
    sampler: SamplerConfig | None = None,
    labels: Sequence[int] | npt.NDArray[np.int64] | None = None,
    precision: str | None = None,
    compiled: bool = False,
    decode: Decoder | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Generate one 8-bit image per seed on the network's own device.

    The same seed gives the same noise and label in any batch; the images then agree up to the
    rounding of the network's arithmetic, which may depend on the batch size.

    Args:
        network: see `ImageNetwork`; guided if it is a `reference_trainer.guidance.GuidedNetwork`.
        seeds: one per image.
        batch_size: images at a time, at least 1.
        num_steps: steps of the sampler; not looked at when there is a `sampler`.
        sampler: the sampler, deterministic Heun by default.
        labels: class of each image, 0..label_dim - 1; None takes the one its seed draws.
        precision: see `image_batches`.
        compiled: see `image_batches`.
        decode: see `image_batches`.
        on_batch: called after each batch with (images done, images in all).

    Returns:
        uint8 `[n, c, h, w]`.

    Raises:
        ConfigError: see `image_batches`.
    """
    batches = []
    for batch in image_batches(
        network,
        seeds,
        batch_size=batch_size,
        sampler=sampler or SamplerConfig(num_steps=num_steps),
        labels=labels,
        precision=precision,
        compiled=compiled,
        decode=decode,
    ):
        batches.append(batch.images)
        if on_batch is not None:
            on_batch(batch.first + len(batch.seeds), len(seeds))
    return np.concatenate(batches)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """What all batches have in common."""

    network: ImageNetwork
    denoise: Any
    seeds: Sequence[int]
    labels: torch.Tensor | None
    batch_size: int
    sampler: SamplerConfig
    decode: Decoder | None
    full_batches: bool


def _generate(job: _Job, first: int) -> ImageBatch:
    """The batch whose first image is number `first`."""
    network = job.network
    device = next(network.parameters()).device
    places = list(range(first, min(first + job.batch_size, len(job.seeds))))
    count = len(places)
    if job.full_batches:  # another shape would be compiled anew
        places += places[-1:] * (job.batch_size - count)
    shape = (network.img_channels, network.img_resolution, network.img_resolution)
    start = start_of([int(job.seeds[i]) for i in places], shape, network.label_dim, device)
    labels = start.labels if job.labels is None else job.labels[places].to(device)
    with _evaluation_mode(job.denoise), _memory_errors(job.batch_size, device):
        x = run_sampler(
            job.denoise,
            start.noise.to(getattr(torch, job.sampler.dtype)),
            job.sampler,
            labels=labels,
            fresh_noise=start.fresh_noise,
        )[:count]
        if job.decode is None:
            images = to_pixels(x, data_mean=network.data_mean, data_scale=network.data_scale)
        else:
            images = job.decode(to_values(x, network.data_mean, network.data_scale))
    return ImageBatch(
        first=first,
        seeds=tuple(int(job.seeds[i]) for i in places[:count]),
        labels=None if labels is None else labels[:count].cpu().numpy(),
        images=images,
    )


def evaluated(network: Any, precision: str | None = None, compiled: bool = False) -> Any:
    """The form of a network that images are made with.

    Args:
        network: a network, or one with guides, of which every member is taken.
        precision: dtype of the activations; None takes that of training.
        compiled: through `torch.compile`.

    Returns:
        An evaluation copy with weight normalisation folded; the network itself if it is one already or
        of a kind that does not fold.

    Raises:
        ConfigError: the precision is unknown, or the network cannot change it.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    members = getattr(network, "members", None)
    if members is not None:
        return network.with_members([evaluated(m, precision, compiled) for m in members])
    dtype = None if precision is None else getattr(torch, precision)
    if _is_folded(network) and dtype in (None, network.dtype):
        pass
    elif hasattr(network, "folded") and not _is_folded(network):
        network = network.folded(dtype)
    elif precision is not None:
        raise ConfigError(
            f"precision {precision!r} can be chosen for a network that folds only, and this "
            f"{type(network).__name__} does not or is folded already. Leave it out."
        )
    return torch.compile(network, dynamic=False) if compiled else network


def _is_folded(network: Any) -> bool:
    """Whether it is an evaluation copy: folding twice would scale the weights twice."""
    modules: Any = getattr(network, "modules", tuple)()
    return any(getattr(module, "folded", None) is True for module in modules)


@contextlib.contextmanager
def _evaluation_mode(network: Any) -> Iterator[None]:
    """No dropout; the modes come back at the end."""
    members = getattr(network, "members", (network,))
    modes = [member.training for member in members]
    for member in members:
        member.train(False)
    try:
        yield
    finally:
        for member, mode in zip(members, modes, strict=True):
            member.train(mode)


@contextlib.contextmanager
def _memory_errors(batch_size: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = (
            f"Use a smaller one: --batch-size {batch_size // 2} (batch_size in Python)."
            if batch_size > 1
            else "Use --precision bfloat16, a smaller network or a larger device."
        )
        raise ConfigError(
            f"the memory of {device} does not hold a batch of {batch_size} images. {remedy}"
        ) from None


def to_values(x: torch.Tensor, data_mean: PerChannel, data_scale: PerChannel) -> torch.Tensor:
    """Undo the mapping of the data: x / scale + mean, in float32.

    Args:
        x: `[..., c, h, w]` in the units of the network's data; any shape if there is one number.
        data_mean: see `ImageNetwork`.
        data_scale: see `ImageNetwork`.
    """
    x = x.float()
    return x / _per_channel(data_scale, x) + _per_channel(data_mean, x)


def _per_channel(value: PerChannel, x: torch.Tensor) -> float | torch.Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
    if len(numbers) == 1:
        return float(numbers)
    return numbers.to(x.device, x.dtype)[:, None, None]


def to_pixels(
    x: torch.Tensor, *, data_mean: PerChannel = 0.0, data_scale: PerChannel = 1.0
) -> npt.NDArray[np.uint8]:
    """Map samples to 8-bit pixels: clip(127.5 (x / scale + mean) + 128, 0, 255), truncated.

    The offset is 128 and not 127.5 because truncation then rounds to the nearest pixel value.

    Args:
        x: `[..., c, h, w]` in the units of the network's data; any shape if there is one number.
        data_mean: see `ImageNetwork`.
        data_scale: see `ImageNetwork`.

    Returns:
        uint8, shape of `x`.

    Example:
        >>> to_pixels(torch.tensor([-1.0, 0.0, 1.0, 7.0])).tolist()
        [0, 128, 255, 255]
    """
    pixels = (127.5 * to_values(x, data_mean, data_scale) + 128).clamp(0, 255)
    return pixels.to(torch.uint8).cpu().numpy()


def checked_labels(
    labels: Sequence[int] | npt.NDArray[np.int64] | None, count: int, label_dim: int
) -> torch.Tensor | None:
    """Labels as int64 `[count]`; None stays None.

    Raises:
        ConfigError: they are not `count` classes of the network.
    """
    if labels is None:
        return None
    classes = np.asarray(labels, dtype=np.int64)
    if classes.shape != (count,):
        raise ConfigError(
            f"labels must be one per seed, got shape {list(classes.shape)} for {count} seeds."
        )
    if classes.min() < 0 or classes.max() >= label_dim:
        raise ConfigError(
            f"labels must lie in 0..{label_dim - 1}, the classes of this network, got "
            f"{classes.min()}..{classes.max()}."
            if label_dim
            else "labels must not be given: this network is unconditional (label_dim 0)."
        )
    return torch.from_numpy(classes)
