"""Images from a trained denoiser: the deterministic 2nd-order sampler of EDM (arXiv 2206.00364).

Time is the noise level itself (sigma(t) = t, no scaling), so the flow is
dx/dsigma = (x - D(x, sigma)) / sigma.
The schedule is computed in float64, the steps in the precision of the noise (float32 by default).
Every image has its own seed: which images share a batch does not matter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema.errors import ConfigError

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""D(x `[n, c, h, w]`, sigma `[n]`, labels int64 `[n]` or None) -> denoised, shape of x."""


class ImageNetwork(Protocol):
    """What `sample_images` needs of a network; a preconditioned `torch.nn.Module` fits.

    Attributes:
        img_channels: channels of an image.
        img_resolution: side of an image in pixels.
        label_dim: number of classes, 0 for an unconditional network.
        data_mean: with `data_scale`, how the network sees pixels:
            x = (pixel / 127.5 - 1 - data_mean) * data_scale.
        data_scale: see `data_mean`.
        training: whether the module is in training mode.
    """

    img_channels: int
    img_resolution: int
    label_dim: int
    data_mean: Sequence[float]
    data_scale: Sequence[float]
    training: bool

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Denoise `x` at noise level `sigma` `[n]`; labels are class indices, int64 `[n]`."""
        ...

    def train(self, mode: bool = True) -> object:
        """Set the training mode, as `torch.nn.Module.train` does."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters, whose device is the one to sample on."""
        ...


def sigma_schedule(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> npt.NDArray[np.float64]:
    """Noise levels of the sampler, falling to zero (EDM eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < N;
    sigma_N = 0.

    Args:
        num_steps: N, at least 2.
        sigma_min: last positive noise level.
        sigma_max: first noise level, above `sigma_min`.
        rho: how strongly the levels crowd at the low end; 1 spaces them evenly.

    Returns:
        float64 `[num_steps + 1]`.

    Raises:
        ConfigError: num_steps < 2, rho <= 0, or not 0 < sigma_min < sigma_max.

    Example:
        >>> sigma_schedule(4, sigma_min=1.0, sigma_max=4.0, rho=1.0).tolist()
        [4.0, 3.0, 2.0, 1.0, 0.0]
    """
    if num_steps < 2:
        raise ConfigError(f"num_steps must be at least 2, got {num_steps}.")
    if not 0 < sigma_min < sigma_max < float("inf"):
        raise ConfigError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} "
            f"and {sigma_max}."
        )
    if not rho > 0:
        raise ConfigError(f"rho must be positive, got {rho}.")
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)
    return np.append(ramp**rho, 0.0)


def heun_sample(
    denoise: Denoiser,
    noise: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> torch.Tensor:
    """Follow the flow from pure noise to data with Heun steps, the last one Euler (EDM alg. 1).

    Calls `denoise` 2 * num_steps - 1 times. Gradients are not recorded.

    Args:
        denoise: D(x, sigma, labels), see `Denoiser`.
        noise: standard normal, `[n, ...]`; its dtype is the precision of the steps.
        labels: passed to `denoise`.
        num_steps: N, at least 2.
        sigma_min: see `sigma_schedule`.
        sigma_max: see `sigma_schedule`.
        rho: see `sigma_schedule`.

    Returns:
        Samples, shape and dtype of `noise`, in the units of the network's data.

    Raises:
        ConfigError: the schedule's arguments are out of range.
    """
    sigmas = sigma_schedule(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        return (x - denoise(x, levels, labels).to(x.dtype)) / sigma

    with torch.no_grad():
        x = noise * sigmas[0]
        for sigma, sigma_next in itertools.pairwise(sigmas):
            step, d = sigma_next - sigma, slope(x, sigma)
            x_next = x + step * d
            if sigma_next > 0:
                x_next = x + step * (d + slope(x_next, sigma_next)) / 2
            x = x_next
    return x


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], label_dim: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw the noise and the label of each seed from a generator of its own.

    Noise first, then the label, uniform. The generators run on the CPU, so a seed means the same
    image on every device and at any batch size.

    Args:
        seeds: one per image, 0..2^63 - 1.
        shape: of one image, `(c, h, w)`.
        label_dim: number of classes; 0 draws no labels.
        device: where the results go.

    Returns:
        noise, float32 `[n, *shape]`, and labels, int64 `[n]`, or None when label_dim is 0.

    Example:
        >>> noise, labels = seeded_noise([5, 6], (1, 8, 8), label_dim=10)
        >>> alone, label = seeded_noise([6], (1, 8, 8), label_dim=10)
        >>> torch.equal(noise[1:], alone), torch.equal(labels[1:], label)
        (True, True)
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    if label_dim == 0:
        return noise.to(device), None
    labels = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in generators])
    return noise.to(device), labels.to(device)


def to_pixels(
    x: torch.Tensor,
    *,
    data_mean: Sequence[float] = (0.0,),
    data_scale: Sequence[float] = (1.0,),
) -> npt.NDArray[np.uint8]:
    """Map samples to 8-bit pixels: clip(127.5 (x / scale + mean) + 128, 0, 255), truncated.

    The offset is 128 and not 127.5 because truncation then rounds to the nearest pixel value.

    Args:
        x: any shape, in the units of the network's data.
        data_mean: see `ImageNetwork`.
        data_scale: see `ImageNetwork`.

    Returns:
        uint8, shape of `x`.

    Example:
        >>> to_pixels(torch.tensor([-1.0, 0.0, 1.0, 7.0])).tolist()
        [0, 128, 255, 255]
    """
    mean, scale = (torch.tensor(v, device=x.device) for v in (data_mean, data_scale))
    if x.ndim == 4:
        mean, scale = mean[:, None, None], scale[:, None, None]
    pixels = (127.5 * (x.float() / scale + mean) + 128).clamp(0, 255)
    return pixels.to(torch.uint8).cpu().numpy()


@contextlib.contextmanager
def _evaluation_mode(network: ImageNetwork) -> Iterator[None]:
    """Evaluate only: a training forward would write normalised weights back into the network."""
    was_training = network.training
    network.train(False)
    try:
        yield
    finally:
        network.train(was_training)


def sample_images(
    network: ImageNetwork,
    seeds: Sequence[int],
    *,
    batch_size: int = 256,
    num_steps: int = 32,
    labels: Sequence[int] | npt.NDArray[np.int64] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Generate one 8-bit image per seed with `heun_sample` on the network's own device.

    The same seed gives the same noise and label in any batch; the images then agree up to the
    rounding of the network's arithmetic, which may depend on the batch size.

    Args:
        network: see `ImageNetwork`; evaluated in eval mode, its mode is restored.
        seeds: one per image.
        batch_size: images at a time, at least 1.
        num_steps: steps of the sampler.
        labels: class of each image, 0..label_dim - 1; None takes the one its seed draws.
        on_batch: called after each batch with (images done, images in all).

    Returns:
        uint8 `[n, c, h, w]`.

    Raises:
        ConfigError: batch_size or num_steps is too small, there are no seeds, or the labels do not
            fit the seeds or the network.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    if len(seeds) == 0:
        raise ConfigError("seeds must name at least one image, got none.")
    given = _checked_labels(labels, len(seeds), network.label_dim)
    device = next(network.parameters()).device
    shape = (network.img_channels, network.img_resolution, network.img_resolution)
    batches = []
    with _evaluation_mode(network):
        for start in range(0, len(seeds), batch_size):
            batch = seeds[start : start + batch_size]
            noise, classes = seeded_noise(batch, shape, network.label_dim, device)
            if given is not None:
                classes = given[start : start + len(batch)].to(device)
            x = heun_sample(network, noise, labels=classes, num_steps=num_steps)
            batches.append(to_pixels(x, data_mean=network.data_mean, data_scale=network.data_scale))
            if on_batch is not None:
                on_batch(start + len(batch), len(seeds))
    return np.concatenate(batches)


def _checked_labels(
    labels: Sequence[int] | npt.NDArray[np.int64] | None, count: int, label_dim: int
) -> torch.Tensor | None:
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


def image_grid(
    images: npt.NDArray[np.uint8], columns: int, scale: int = 1, gap: int = 0
) -> npt.NDArray[np.uint8]:
    """Lay images out row by row, each pixel enlarged to a square.

    Args:
        images: uint8 `[n, c, h, w]`, c 1 (gray) or 3 (RGB), n at least 1.
        columns: images per row, at least 1; the rest of the last row is black.
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
    cells = np.zeros((rows * columns, c, h, w), np.uint8)
    cells[:n] = images.repeat(scale, axis=2).repeat(scale, axis=3)
    cells = np.pad(cells, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=255)
    grid = cells.reshape(rows, columns, c, h + gap, w + gap).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (h + gap), columns * (w + gap), c)[: -gap or None, : -gap or None]
    return grid[:, :, 0] if c == 1 else grid


def save_png(path: str | Path, array: npt.NDArray[np.uint8]) -> None:
    """Write an image, uint8 `[H, W]` or `[H, W, 3]`, as PNG."""
    from PIL import Image

    Image.fromarray(array).save(path, format="PNG")
