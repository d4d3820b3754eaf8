"""Guidance: sampling with the difference of a network and a worse one, exaggerated.

With main network D and guides D_i of weights w_i (w = 1 is no guidance)

    D_guided = D + sum_i (w_i - 1) (D - D_i),

for one guide D_guided = w D + (1 - w) D_guide. Which method it is depends on the guide:
classifier-free guidance takes a small unconditional network (EDM2 eq. 152; it is trained apart, there
is no label dropout), autoguidance a smaller and less trained network with the same labels (arXiv
2406.02507 eq. 3). Weights and averaging lengths of the networks are chosen apart.

Each guide may be limited to an interval of noise levels (arXiv 2404.07724): w for
sigma_lo < sigma <= sigma_hi, else 1. Its ends are moved to levels of the sampler and it is decided by
step, so that both evaluations of a Heun step use one weight. Where the weight is 1 the guide is not
evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from posthoc_ema.errors import ConfigError
from reference_trainer.sampling.sampler import Denoiser

EVERYWHERE = (0.0, math.inf)
"""The interval of all noise levels."""


@dataclass(frozen=True, slots=True)
class Guide:
    """A denoiser to move away from.

    Attributes:
        denoise: the guide's D(x, sigma, labels): a network or any function.
        weight: w, finite; 1 is no guidance.
        interval: (sigma_lo, sigma_hi], the noise levels where it acts.

    Raises:
        ConfigError: the weight is not finite, or the interval does not rise.

    Example:
        >>> guide = Guide(lambda x, sigma, labels: 0 * x, weight=2.0, interval=(0.28, 2.9))
        >>> guide.steps([80.0, 3.0, 1.0, 0.3, 0.0])
        range(1, 3)
    """

    denoise: Denoiser
    weight: float
    interval: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_interval(self.interval)

    def steps(self, sigmas: Sequence[float]) -> range:
        """The steps where the guide acts; see `guided_steps`."""
        return range(0) if self.weight == 1 else guided_steps(self.interval, sigmas)


def check_weight(weight: float) -> None:
    """Refuse a guidance weight that is not finite.

    Raises:
        ConfigError: it is not.
    """
    if not math.isfinite(weight):
        raise ConfigError(
            f"the guidance weight must be a finite number (1 is no guidance), got {weight}."
        )


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse an interval that does not rise.

    Raises:
        ConfigError: not 0 <= sigma_lo < sigma_hi.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ConfigError(
            "the guidance interval must be two rising noise levels, 0 <= sigma_lo < sigma_hi, as in "
            f"0.28,2.90, got {low:g},{high:g}."
        )


def guided_steps(interval: tuple[float, float], sigmas: Sequence[float]) -> range:
    """The steps of a sampler that lie in an interval of noise levels.

    Both ends are moved to the level nearest in ratio; what is below half of the last positive level
    becomes 0.
    Step i, from sigma_i to sigma_(i+1), is inside when sigma_lo < sigma_i <= sigma_hi.

    Args:
        interval: (sigma_lo, sigma_hi].
        sigmas: noise levels of the sampler, falling, the last one 0.

    Returns:
        Indices of steps, without gaps.

    Raises:
        ConfigError: no step lies inside.

    Example:
        >>> from reference_trainer.sampling import sigma_schedule
        >>> guided_steps((0.28, 2.90), sigma_schedule(32))  # EDM2-S: 7 of 32 steps
        range(15, 22)
    """
    low, high = interval
    steps = range(_nearest(high, sigmas), _nearest(low, sigmas))
    if not steps:
        raise ConfigError(
            f"the guidance interval {low:g},{high:g} holds no step of this sampler, whose "
            f"{len(sigmas) - 1} steps begin at noise levels from {sigmas[0]:g} to {sigmas[-2]:g}. "
            "Widen it or take more steps."
        )
    return steps


def _nearest(sigma: float, sigmas: Sequence[float]) -> int:
    """Index of the level nearest in ratio; that of 0 for what is below half of the positive ones."""
    positive = np.asarray(sigmas[:-1], dtype=np.float64)
    if sigma < positive[-1] / 2:
        return len(positive)
    return int(np.abs(np.log(positive / min(sigma, positive[0]))).argmin())


def guided_denoiser(main: Denoiser, guides: Sequence[Guide]) -> Denoiser:
    """D + sum_i (w_i - 1) (D - D_i), at every noise level; the main denoiser if there are no guides.

    Example:
        >>> bad = Guide(lambda x, sigma, labels: x + 1.0, weight=3.0)
        >>> denoise = guided_denoiser(lambda x, sigma, labels: x, [bad])
        >>> denoise(torch.zeros(2), torch.ones(2), None)
        tensor([-2., -2.])
    """
    if not guides:
        return main

    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        d = main(x, sigma, labels)
        guided = d
        for guide in guides:
            guided = guided + (guide.weight - 1) * (d - guide.denoise(x, sigma, labels))
        return guided

    return denoise


def guided_per_step(
    main: Denoiser, guides: Sequence[Guide], sigmas: Sequence[float]
) -> list[Denoiser]:
    """The denoiser of each step: with the guides whose interval holds it.

    Args:
        main: the main denoiser.
        guides: its guides.
        sigmas: noise levels of the sampler, falling, the last one 0.

    Returns:
        One denoiser per step; `main` itself where no guide acts.

    Raises:
        ConfigError: an interval holds no step.
    """
    inside = [(guide, guide.steps(sigmas)) for guide in guides]
    return [
        guided_denoiser(main, [guide for guide, steps in inside if i in steps])
        for i in range(len(sigmas) - 1)
    ]


def mixed_weights(weight: float, share: float) -> tuple[float, float]:
    """Weights that share guidance out between an unconditional and a weaker conditional guide.

    w_u = (1 - alpha) (w - 1) + 1 and w_c = alpha (w - 1) + 1 (arXiv 2406.02507, appendix).

    Args:
        weight: w, the guidance of both together.
        share: alpha, the part of the weaker conditional guide (autoguidance).

    Returns:
        (w_u, w_c).

    Example:
        >>> mixed_weights(2.0, 0.75)
        (1.25, 1.75)
    """
    return (1 - share) * (weight - 1) + 1, share * (weight - 1) + 1


class GuidedNetwork:
    """A network with its guides; wherever images are sampled it stands for a network.

    Args:
        network: the main network, see `reference_trainer.sampling.ImageNetwork`.
        guides: guides whose `denoise` are networks too.

    Raises:
        ConfigError: a guide does not fit the main network; the message says what differs.

    Example:
        weak = Guide(small_network, weight=2.0)
        images = sample_images(GuidedNetwork(network, [weak]), range(64))
    """

    def __init__(self, network: Any, guides: Sequence[Guide]) -> None:
        for guide in guides:
            check_guide(network, guide.denoise)
        self.network, self.guides = network, tuple(guides)
        self.img_channels: int = network.img_channels
        self.img_resolution: int = network.img_resolution
        self.label_dim: int = network.label_dim
        self.data_mean, self.data_scale = network.data_mean, network.data_scale

    @property
    def members(self) -> tuple[Any, ...]:
        """The main network, then those of the guides."""
        return (self.network, *(guide.denoise for guide in self.guides))

    def per_step(self, sigmas: Sequence[float]) -> list[Denoiser]:
        """One denoiser per step of a sampler; see `guided_per_step`."""
        return guided_per_step(self.network, self.guides, sigmas)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of the main network, whose device is the one to sample on."""
        return cast("Iterator[torch.nn.Parameter]", self.network.parameters())

    def with_members(self, members: Sequence[Any]) -> GuidedNetwork:
        """The same guidance of other networks, in the order of `members`."""
        network, *denoisers = members
        guides = [replace(g, denoise=d) for g, d in zip(self.guides, denoisers, strict=True)]
        return GuidedNetwork(network, guides)


def check_guide(network: Any, guide: Any) -> None:
    """Refuse a guide whose images are not those of the main network.

    A guide may be unconditional; if it has classes they must be as many as the main network's.

    Raises:
        ConfigError: resolution, channels, mapping of the data or classes differ.
    """
    for name, what in (
        ("img_resolution", "images of resolution"),
        ("img_channels", "images of channels"),
    ):
        mine, its = getattr(network, name), getattr(guide, name)
        if mine != its:
            raise ConfigError(
                f"the guide makes {what} {its}, the main network {mine}. A guide must be trained on "
                "the main network's data."
            )
    for name in ("data_mean", "data_scale"):
        mine, its = (_numbers(getattr(n, name), n.img_channels) for n in (network, guide))
        if mine != its:
            raise ConfigError(
                f"the guide's {name.replace('_', '.')} is {_brief(its)}, the main network's "
                f"{_brief(mine)}: they see other units. A guide must be trained on the main "
                "network's data."
            )
    if guide.label_dim not in (0, network.label_dim):
        classes = f"{network.label_dim} classes" if network.label_dim else "no classes"
        raise ConfigError(
            f"the guide has {guide.label_dim} classes, the main network has {classes}. Take a guide "
            "with the same classes (autoguidance) or with none (classifier-free guidance)."
        )


def _numbers(value: Any, channels: int) -> tuple[float, ...]:
    """One number per channel, from one number for all or one for each."""
    numbers = torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()
    return tuple(numbers * channels if len(numbers) == 1 else numbers)


def _brief(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:.6g}" for number in dict.fromkeys(numbers))
