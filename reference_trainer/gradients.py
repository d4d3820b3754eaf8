"""The gradients of a step: summed over passes, unscaled, finite."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.sampler import entropy
from reference_trainer.distributed import DistributedContext
from reference_trainer.losses import draw_noise
from reference_trainer.parallel import (
    gradient_pass,
    images_per_pass,
    local,
)
from reference_trainer.precond import Precond
from reference_trainer.seeds import DROPOUT, STEP, seeded


@dataclass(frozen=True, slots=True)
class StepInput:
    """What this process trains on in one step.

    Attributes:
        images: clean images in network units, `[n, c, h, w]`.
        labels: class indices `[n]`.
        sigma: noise levels `[n]`.
        noise: noise of these levels, `[n, c, h, w]`.
    """

    images: Tensor
    labels: Tensor
    sigma: Tensor
    noise: Tensor

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some of the images, as the arguments of the loss."""
        every = (self.images, self.labels, self.sigma, self.noise)
        images, labels, sigma, noise = (tensor[start:stop] for tensor in every)
        return images, labels, sigma, noise


def step_input(
    images: Tensor, labels: Tensor, nimg: int, config: TrainConfig, ranks: DistributedContext
) -> StepInput:
    """Add the noise of the step that follows `nimg` images.

    Drawn for the whole batch on every process, so that it does not depend on how the batch is divided.
    """
    device, share = images.device, len(images)
    generator = torch.Generator(device).manual_seed(entropy(config.seed, nimg, STEP))
    shape = (share * ranks.world_size, *images.shape[1:])
    sigma, noise = draw_noise(shape, config.loss, generator, device)
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    return StepInput(images, labels, sigma[mine], noise[mine])


def compute_gradients(
    loss: nn.Module,
    network: Precond,
    given: StepInput,
    nimg: int,
    config: TrainConfig,
    ranks: DistributedContext,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over the whole batch, in `.grad` of the parameters.

    Args:
        loss: the loss as made by `parallel.new_loss`.
        network: the network in it.
        given: what this process trains on.
        nimg: images seen before the step.
        config: the run's configuration.
        ranks: the processes.

    Returns:
        The training loss and the static loss of each image of this process, each `[n]`.
    """
    share, size = len(given.images), images_per_pass(config, ranks)
    scale = config.optim.loss_scale / share  # processes average over themselves
    losses = []
    for start in range(0, share, size):
        last = start + size == share
        with gradient_pass(loss, network, last=last), _dropout(nimg, start, config, ranks):
            each, static = loss(*given.part(start, start + size))
            (each.sum() * scale).backward()
        losses.append((each.detach(), static))
    unscale_gradients(network, config.optim.loss_scale)
    force_finite_gradients(network)
    every, statics = zip(*losses, strict=True)
    return torch.cat(every), torch.cat(statics)


def _dropout(
    nimg: int, start: int, config: TrainConfig, ranks: DistributedContext
) -> contextlib.AbstractContextManager[None]:
    """Dropout takes no generator of its own: the global one is borrowed, seeded by step and place."""
    if not config.network.dropout:
        return contextlib.nullcontext()
    first = ranks.rank * (config.batch_size // ranks.world_size) + start
    return seeded(entropy(config.seed, nimg + first, DROPOUT), ranks.device)


def unscale_gradients(module: nn.Module, loss_scale: float) -> None:
    """Take the factor of the loss out of the gradients, in place.

    Before Adam, so that its epsilon means the same at every scale; what has overflowed stays infinite.
    """
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
    if loss_scale != 1 and gradients:
        torch._foreach_mul_(gradients, 1 / loss_scale)


def force_finite_gradients(module: nn.Module) -> None:
    """Replace nan and infinities in the gradients by 0, in place (EDM2 section D.2)."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            torch.nan_to_num(gradient, nan=0, posinf=0, neginf=0, out=gradient)
