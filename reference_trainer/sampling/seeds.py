"""Random numbers of an image: all from one generator that its seed starts.

In order: the noise that sampling starts from, the label, then the fresh noise of each step that
churns. So a seed means the same image whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posthoc_ema.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where the images of a batch start.

    Attributes:
        noise: standard normal, float32 `[n, *shape]`.
        labels: int64 `[n]`, or None without classes.
        generators: one per image, each behind its noise and label.
    """

    noise: torch.Tensor
    labels: torch.Tensor | None
    generators: tuple[torch.Generator, ...]

    def fresh_noise(self) -> torch.Tensor:
        """The next standard normal noise of every image, shape and device of `noise`."""
        return _draw(self.generators, self.noise.shape[1:]).to(self.noise.device)


def start_of(
    seeds: Sequence[int], shape: Sequence[int], label_dim: int, device: torch.device | str = "cpu"
) -> Start:
    """Draw the noise and the label of each seed from a generator of its own.

    The generators run on the CPU, so a seed means the same image on every device and at any batch
    size.

    Args:
        seeds: one per image, 0..2^63 - 1.
        shape: of one image, `(c, h, w)`.
        label_dim: number of classes; labels are uniform over them, 0 draws none.
        device: where the results go.

    Raises:
        ConfigError: there are no seeds, or one is out of range.
    """
    check_seeds(seeds)
    generators = tuple(torch.Generator().manual_seed(int(seed)) for seed in seeds)
    noise = _draw(generators, shape).to(device)
    if label_dim == 0:
        return Start(noise, None, generators)
    labels = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in generators])
    return Start(noise, labels.to(device), generators)


def seeded_labels(seeds: Sequence[int], network: Any) -> dict[int, int]:
    """The class that each seed draws for a network, by seed.

    Args:
        seeds: any number of seeds.
        network: see `reference_trainer.sampling.ImageNetwork`; it has classes.
    """
    shape = (network.img_channels, network.img_resolution, network.img_resolution)
    drawn = (start_of([seed], shape, network.label_dim).labels for seed in seeds)
    return {seed: int(label) for seed, label in zip(seeds, drawn, strict=True) if label is not None}


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that no generator takes.

    Raises:
        ConfigError: there are none, or one is out of range.
    """
    if len(seeds) == 0:
        raise ConfigError("seeds must name at least one image, got none.")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seeds must lie in 0..2^63 - 1, got {seed}.")


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], label_dim: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Noise and label of each seed; see `start_of` for arguments and errors.

    Returns:
        noise, float32 `[n, *shape]`, and labels, int64 `[n]`, or None when label_dim is 0.

    Example:
        >>> noise, labels = seeded_noise([5, 6], (1, 8, 8), label_dim=10)
        >>> alone, label = seeded_noise([6], (1, 8, 8), label_dim=10)
        >>> torch.equal(noise[1:], alone), torch.equal(labels[1:], label)
        (True, True)
    """
    start = start_of(seeds, shape, label_dim, device)
    return start.noise, start.labels


def _draw(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
