"""How large weights and activations are: the two quantities that configs D and E hold still.

The paper shows them for averaged weights (EDM2 A.6): per feature the root mean square over many
samples, then the mean over the features of a resolution. Here the inputs are noisy training images of
the run's own distribution of noise levels, and the activations are the outputs of the residual blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data import load_dataset
from reference_trainer.precond import Precond

NUM_IMAGES = 256
"""Noisy images that pass through the network."""

_BLOCK = re.compile(r"(?:^|\.)(?:enc|dec)\.(r\d+)_\w+$")


def weight_magnitude(network: nn.Module) -> float:
    """Root mean square of the stored weights, over all convolutions and linear layers.

    Each weight tensor counts once, whatever its size; gains, biases and norms do not count. Stored
    means before any normalisation in the forward pass.
    """
    weights = [p for p in network.parameters() if p.ndim in (2, 4)]
    roots = [p.detach().double().square().mean().sqrt() for p in weights]
    return float(torch.stack(roots).mean())


def activation_magnitudes(
    network: Precond, images: Tensor, sigma: Tensor, labels: Tensor | None
) -> dict[str, float]:
    """Mean over features of the root mean square of each block's output, by resolution.

    Args:
        network: in evaluation mode.
        images: noisy images, `[n, c, h, w]`.
        sigma: their noise levels, `[n]`.
        labels: their classes, `[n]`, None for an unconditional network.

    Returns:
        "r8" and so on -> magnitude.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def record(resolution: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            del module, args
            features = output.detach().double().square().mean((0, 2, 3)).sqrt()
            found[resolution].append(features.mean())

        return hook

    handles = [block.register_forward_hook(record(name)) for name, block in _blocks(network)]
    try:
        with torch.no_grad():
            network(images, sigma, labels)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The residual blocks with the resolution in their names."""
    for name, module in network.named_modules():
        match = _BLOCK.search(name)
        if match:
            yield match.group(1), module


def magnitudes(network: Precond, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """All magnitudes of a network.

    Args:
        network: in evaluation mode, on `device`.
        config: of its run: data and noise levels.
        device: where to compute.

    Returns:
        "weights", "activations" (mean over the resolutions), "activations-r8" and so on.
    """
    images, sigma, labels = probe_inputs(config, device)
    by_resolution = activation_magnitudes(network, images, sigma, labels)
    return {
        "weights": weight_magnitude(network),
        "activations": sum(by_resolution.values()) / len(by_resolution),
        **{f"activations-{name}": value for name, value in by_resolution.items()},
    }


def probe_inputs(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same noisy images for every network of a data set: images, noise levels, classes."""
    dataset = load_dataset(config.data)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(dataset), (NUM_IMAGES,), generator=generator)
    values, classes = dataset.read(index.numpy())
    shape = (-1, 1, 1)
    mean, scale = (torch.tensor(v).reshape(shape) for v in (config.data.mean, config.data.scale))
    clean = (torch.from_numpy(values).float() / 127.5 - 1 - mean) * scale
    sigma = torch.randn(NUM_IMAGES, generator=generator) * config.loss.p_std + config.loss.p_mean
    sigma = sigma.exp()
    noise = torch.randn(clean.shape, generator=generator) * sigma[:, None, None, None]
    return (clean + noise).to(device), sigma.to(device), torch.from_numpy(classes).to(device)
