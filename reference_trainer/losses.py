"""The training losses: EDM's static weighting and EDM2's learned one (EDM table 1; EDM2 eq. 21)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from reference_trainer.config import LossConfig
from reference_trainer.precond import Precond


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def draw_noise(
    shape: tuple[int, ...],
    config: LossConfig,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise levels ln sigma ~ N(p_mean, p_std^2), and noise of those levels.

    Args:
        shape: of the batch, `(n, c, h, w)`.
        config: distribution of the noise levels.
        generator: source of both.
        device: where they are drawn.

    Returns:
        sigma `[n]` and noise `[n, c, h, w]`, of standard deviation sigma.
    """
    normal = functools.partial(torch.randn, device=device, generator=generator)
    sigma = (normal([shape[0], 1, 1, 1]) * config.p_std + config.p_mean).exp()
    return sigma.reshape(-1), normal(shape) * sigma


def denoising_loss(
    network: nn.Module, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor
) -> Tensor:
    """lambda(sigma) |D(y + n; sigma) - y|^2, the loss with static weighting (EDM table 1).

    Args:
        network: the denoiser.
        images: clean images y in network units, `[n, c, h, w]`.
        labels: class indices `[n]` or one-hot rows, None when unconditional.
        sigma: noise levels `[n]`.
        noise: noise n of these levels, `[n, c, h, w]`.

    Returns:
        The loss of every element, `[n, c, h, w]`.
    """
    denoised = network(images + noise, sigma, labels)
    weight = loss_weight(sigma, network.sigma_data).reshape(-1, 1, 1, 1)  # type: ignore[arg-type]
    return weight * (denoised - images) ** 2


def uncertainty_loss(
    network: nn.Module, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """lambda(sigma) / e^u |D(y + n; sigma) - y|^2 + u, u = u(sigma) learned (EDM2 eq. 21).

    u is broadcast over the elements of its image. Where the loss is smallest, e^u is the mean of the
    static loss at that sigma, so every noise level has a say of equal size.

    Args:
        network: the denoiser with its uncertainty.
        images: see `denoising_loss`.
        labels: see there.
        sigma: see there.
        noise: see there.

    Returns:
        The loss of every element and the static loss of every element, both `[n, c, h, w]`.
    """
    denoised, u = network(images + noise, sigma, labels, return_logvar=True)
    weight = loss_weight(sigma, network.sigma_data).reshape(-1, 1, 1, 1)  # type: ignore[arg-type]
    static = weight * (denoised - images) ** 2
    return static / u.exp() + u, static


def edm2_loss(
    network: Precond,
    images: Tensor,
    labels: Tensor | None,
    config: LossConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The training loss of a batch with fresh noise.

    Args:
        network: the denoiser.
        images: clean images y in network units, `[n, c, h, w]`.
        labels: class indices `[n]` or one-hot rows, None when unconditional.
        config: noise levels and weighting.
        generator: source of the noise levels and the noise, on the device of `images`.

    Returns:
        The loss of every element, `[n, c, h, w]`; train on its sum over elements and mean over images.
    """
    sigma, noise = draw_noise(tuple(images.shape), config, generator, images.device)
    if config.weighting == "static":
        return denoising_loss(network, images, labels, sigma, noise)
    return uncertainty_loss(network, images, labels, sigma, noise)[0]


class TrainingLoss(nn.Module):
    """The loss of a network as a module of its own: what is compiled and replicated as a whole.

    Args:
        network: the denoiser.
        config: the weighting.
    """

    def __init__(self, network: Precond, config: LossConfig) -> None:
        super().__init__()
        self.network, self.is_static = network, config.weighting == "static"

    def forward(
        self, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses summed over the elements of each image, `[n]`: what is trained on, and the static one.

        Args:
            images: see `denoising_loss`.
            labels: see there.
            sigma: see there.
            noise: see there.
        """
        if self.is_static:
            loss = static = denoising_loss(self.network, images, labels, sigma, noise)
        else:
            loss, static = uncertainty_loss(self.network, images, labels, sigma, noise)
        return loss.sum((1, 2, 3)), static.detach().sum((1, 2, 3))
