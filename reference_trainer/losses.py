"""The training loss of EDM2 (eq. 21)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from reference_trainer.config import LossConfig
from reference_trainer.precond import Precond


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm2_loss(
    network: Precond,
    images: Tensor,
    labels: Tensor | None,
    config: LossConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uncertainty-weighted denoising loss lambda / e^u |D - y|^2 + u (EDM2 eq. 21).

    Evaluated for every element, u broadcast over the elements of its image.

    Args:
        network: the denoiser.
        images: clean images y in network units, `[n, c, h, w]`.
        labels: class indices `[n]` or one-hot rows, None when unconditional.
        config: distribution of the noise levels.
        generator: source of the noise levels and the noise, on the device of `images`.

    Returns:
        The loss of every element, `[n, c, h, w]`; train on its sum over elements and mean over images.
    """
    normal = functools.partial(torch.randn, device=images.device, generator=generator)
    sigma = (normal([images.shape[0], 1, 1, 1]) * config.p_std + config.p_mean).exp()
    noise = normal(images.shape) * sigma
    denoised, u = network(images + noise, sigma.reshape(-1), labels, return_logvar=True)
    weight = loss_weight(sigma, network.sigma_data)
    return weight / u.exp() * (denoised - images) ** 2 + u
