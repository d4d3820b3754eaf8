"""Samplers of EDM (arXiv 2206.00364): Heun and Euler, deterministic or with churn.

Time is the noise level itself (sigma(t) = t, no scaling), so the flow is
dx/dsigma = (x - D(x, sigma)) / sigma.
The plan, one `Step` record per step, is made in float64; the steps run in the precision of the noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema.errors import ConfigError

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""D(x `[n, c, h, w]`, sigma `[n]`, labels int64 `[n]` or None) -> denoised, shape of x."""

METHODS = ("heun", "euler")
_MAX_INCREASE = math.sqrt(2) - 1  # of churn: EDM algorithm 2


@runtime_checkable
class StepwiseDenoiser(Protocol):
    """A denoiser that may differ from step to step, as guidance in an interval does.

    Both evaluations of a Heun step use the denoiser of the step.
    """

    def per_step(self, sigmas: Sequence[float]) -> Sequence[Denoiser]:
        """One denoiser per step.

        Args:
            sigmas: the noise levels, falling, the last one 0; one more than steps.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How to get from noise to data (EDM algorithms 1 and 2).

    Attributes:
        method: "heun" (2nd order, 2 N - 1 evaluations) or "euler" (1st order, N evaluations).
        num_steps: N, at least 2; the last step is an Euler step in either case.
        sigma_min: last positive noise level.
        sigma_max: first noise level, above `sigma_min`.
        rho: how strongly the levels crowd at the low end; 1 spaces them evenly.
        churn: S_churn, at least 0; 0 is the deterministic sampler. Each step first raises the noise
            level by the factor 1 + min(S_churn / N, sqrt(2) - 1) with fresh noise.
        churn_min: S_min, the lowest level that churn acts at.
        churn_max: S_max, the highest one.
        churn_noise: S_noise, magnitude of the fresh noise, positive.
        dtype: precision of the steps, "float32" or "float64"; that of the network is another matter.

    Example:
        >>> SamplerConfig(method="euler", num_steps=8).num_evaluations
        8
    """

    method: str = "heun"
    num_steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be heun or euler, got {self.method!r}.")
        sigma_schedule(
            self.num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )
        if not 0 <= self.churn < math.inf:
            raise ConfigError(f"churn must be a number of at least 0, got {self.churn}.")
        if not 0 <= self.churn_min <= self.churn_max:
            raise ConfigError(
                "churn_min and churn_max must satisfy 0 <= churn_min <= churn_max, got "
                f"{self.churn_min} and {self.churn_max}."
            )
        if not 0 < self.churn_noise < math.inf:
            raise ConfigError(f"churn_noise must be a positive number, got {self.churn_noise}.")
        if self.dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype must be float32 or float64, got {self.dtype!r}.")

    @property
    def num_evaluations(self) -> int:
        """How often the denoiser is evaluated."""
        return 2 * self.num_steps - 1 if self.method == "heun" else self.num_steps


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the plan: raise the noise level to `sigma_hat`, then go down to `sigma_next`.

    Attributes:
        sigma: noise level at the begin.
        sigma_hat: noise level after churn, equal to `sigma` without.
        sigma_next: noise level at the end.
        fresh: magnitude of the noise that churn adds.
    """

    sigma: float
    sigma_hat: float
    sigma_next: float
    fresh: float


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


def plan_steps(config: SamplerConfig) -> tuple[Step, ...]:
    """The steps of a sampler, in plain numbers (EDM algorithm 2).

    gamma_i = min(S_churn / N, sqrt(2) - 1) for S_min <= sigma_i <= S_max, else 0;
    sigma_hat = (1 + gamma_i) sigma_i; fresh = S_noise sqrt(sigma_hat^2 - sigma_i^2).

    Example:
        >>> plan_steps(SamplerConfig(num_steps=2, sigma_min=1.0, sigma_max=4.0, rho=1.0))[0]
        Step(sigma=4.0, sigma_hat=4.0, sigma_next=1.0, fresh=0.0)
    """
    sigmas = sigma_schedule(
        config.num_steps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho
    ).tolist()
    steps = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        churned = config.churn_min <= sigma <= config.churn_max
        gamma = min(config.churn / config.num_steps, _MAX_INCREASE) if churned else 0.0
        sigma_hat = sigma * (1 + gamma)
        fresh = config.churn_noise * math.sqrt(sigma_hat**2 - sigma**2)
        steps.append(Step(sigma, sigma_hat, sigma_next, fresh))
    return tuple(steps)


def run_sampler(
    denoise: Denoiser | StepwiseDenoiser,
    noise: torch.Tensor,
    config: SamplerConfig,
    *,
    labels: torch.Tensor | None = None,
    fresh_noise: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Follow the flow from pure noise to data. Gradients are not recorded.

    Args:
        denoise: D(x, sigma, labels), see `Denoiser`; or one that changes from step to step.
        noise: standard normal, `[n, ...]`; its dtype is the precision of the steps.
        config: the sampler (its dtype is not looked at).
        labels: passed to the denoiser.
        fresh_noise: gives standard normal noise of the shape of `noise`, once for every step that
            churns; not called without churn.

    Returns:
        Samples, shape and dtype of `noise`, in the units of the network's data.

    Raises:
        ConfigError: churn without `fresh_noise`.
    """
    plan = plan_steps(config)
    if fresh_noise is None and any(step.fresh for step in plan):
        raise ConfigError("churn needs fresh_noise, a function that gives noise for each step.")
    advance = _heun_step if config.method == "heun" else _euler_step
    with torch.no_grad():
        x = noise * plan[0].sigma
        for step, step_denoise in zip(plan, denoisers_of(denoise, plan), strict=True):
            if fresh_noise is not None and step.fresh:
                x = x + step.fresh * fresh_noise().to(x.device, x.dtype)
            x = advance(step_denoise, x, step, labels)
    return x


def heun_sample(
    denoise: Denoiser | StepwiseDenoiser,
    noise: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> torch.Tensor:
    """Follow the flow with deterministic Heun steps, the last one Euler (EDM algorithm 1).

    `run_sampler` without the record; evaluates the denoiser 2 * num_steps - 1 times.

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
    config = SamplerConfig(num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return run_sampler(denoise, noise, config, labels=labels)


def denoisers_of(denoise: Denoiser | StepwiseDenoiser, plan: Sequence[Step]) -> Sequence[Denoiser]:
    """The denoiser of each step of a plan.

    Raises:
        ConfigError: the denoiser does not fit the plan, such as guidance in an interval without a step.
    """
    if isinstance(denoise, StepwiseDenoiser):
        return denoise.per_step([*(step.sigma for step in plan), 0.0])
    return [denoise] * len(plan)


def _slope(
    denoise: Denoiser, x: torch.Tensor, sigma: float, labels: torch.Tensor | None
) -> torch.Tensor:
    """dx/dsigma = (x - D(x, sigma)) / sigma."""
    levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
    return (x - denoise(x, levels, labels).to(x.dtype)) / sigma


def _euler_step(
    denoise: Denoiser, x: torch.Tensor, step: Step, labels: torch.Tensor | None
) -> torch.Tensor:
    return x + (step.sigma_next - step.sigma_hat) * _slope(denoise, x, step.sigma_hat, labels)


def _heun_step(
    denoise: Denoiser, x: torch.Tensor, step: Step, labels: torch.Tensor | None
) -> torch.Tensor:
    """Euler's step with the mean of the slopes at its two ends; Euler's own one down to zero."""
    change = step.sigma_next - step.sigma_hat
    slope = _slope(denoise, x, step.sigma_hat, labels)
    x_next = x + change * slope
    if step.sigma_next == 0:
        return x_next
    return x + change * (slope + _slope(denoise, x_next, step.sigma_next, labels)) / 2
