"""Averaging profiles: how much each moment of training counts in an average of the weights.

An averaged weight vector is theta_p = integral of p(tau) theta(tau) over training time, with p >= 0
integrating to one. Two views of a profile are enough for everything here: its **density** p(tau) and
its **tail** T(tau) = integral of p from tau to infinity (T(0) = 1, T = 0 after the end).

Convention: all mathematics is in float64; training time is in the run's own clock (steps or images),
and no formula depends on its unit. Source: Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2), arXiv 2312.02696 v2, section 3.1 and appendix C.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import InvalidProfileError

FloatArray = npt.NDArray[np.float64]

SIGMA_REL_MAX: float = 1 / math.sqrt(12)
"""Largest sigma_rel of the family: gamma = 0, the plain average over all of training (0.288675...)."""


DEFAULT_SIGMA_RELS: tuple[float, ...] = (0.04, 0.15)
"""Lengths that are tracked unless others are asked for: of 35 pairs the best over 0.015 to 0.25 at equal
bytes (docs/explanation/storage.md). The paper's are (0.05, 0.10)."""


def _check_sigma_rel(sigma_rel: FloatArray) -> None:
    # Written so that nan is bad. Subnormal numbers, whose inverse is not finite, count as 0.
    bad = ~((sigma_rel >= sys.float_info.min) & (sigma_rel <= SIGMA_REL_MAX))
    if bad.any():
        raise InvalidProfileError(
            f"sigma_rel must lie in (0, {SIGMA_REL_MAX:.4f}], got {sigma_rel[bad].flat[0]:g}. "
            "Typical lengths are 0.02 to 0.25; the upper limit is the plain average over all of "
            "training."
        )


def gamma_from_sigma_rel(sigma_rel: npt.ArrayLike) -> FloatArray:
    """Exponent gamma of the power profile whose relative width is `sigma_rel` (EDM2, Algorithm 2).

    Solves (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2 for its one root gamma >= 0.
    The inverse is `sigma_rel_from_gamma`.

    Args:
        sigma_rel: relative widths, any shape. Dimensionless, in (0, SIGMA_REL_MAX].

    Returns:
        gamma, float64, same shape as `sigma_rel`.

    Raises:
        InvalidProfileError: an entry lies outside (0, SIGMA_REL_MAX] or is nan.

    Example:
        >>> round(float(gamma_from_sigma_rel(0.1)), 4)
        6.9372
    """
    sigma_rel = np.asarray(sigma_rel, dtype=np.float64)
    _check_sigma_rel(sigma_rel)
    # Below 1e-9 the cubes would overflow, and 1/sigma_rel - 3 is exact to the last digit.
    tiny = sigma_rel < 1e-9
    wide = np.where(tiny, 1e-9, sigma_rel)
    s = wide**-2.0
    # f(g) = g^3 + 7 g^2 + (16 - s) g + (12 - s) is convex for g >= 0, and 1/sigma_rel lies to the
    # right of the root, so Newton's method falls onto the root without ever passing it. It converges
    # quadratically; 60 steps are plenty.
    gamma = 1 / wide
    for _ in range(60):
        f = ((gamma + 7) * gamma + (16 - s)) * gamma + (12 - s)
        step = f / ((3 * gamma + 14) * gamma + (16 - s))
        gamma = gamma - step
        if np.all(np.abs(step) <= 1e-17 + 1e-16 * np.abs(gamma)):
            break
    # 1/sqrt(12) is not a double: its root is 0 up to one rounding.
    return np.where(tiny, 1 / sigma_rel - 3, np.maximum(gamma, 0.0))


def sigma_rel_from_gamma(gamma: npt.ArrayLike) -> FloatArray:
    """Relative width (standard deviation over end time) of a power profile (EDM2, eq. 126).

    Args:
        gamma: exponents, any shape, >= 0.

    Returns:
        sigma_rel, float64, same shape as `gamma`.

    Raises:
        InvalidProfileError: an entry is negative, infinite or nan.

    Example:
        >>> round(float(sigma_rel_from_gamma(16.97)), 4)
        0.05
    """
    gamma = np.asarray(gamma, dtype=np.float64)
    _check_gamma(gamma)
    return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _check_gamma(gamma: FloatArray) -> None:
    bad = ~((gamma >= 0) & np.isfinite(gamma))
    if bad.any():
        raise InvalidProfileError(
            f"gamma must be finite and >= 0, got {gamma[bad].flat[0]:g}. "
            "Ask by sigma_rel instead: gamma_from_sigma_rel(0.1) is 6.94."
        )


def _log_beta(gamma: npt.ArrayLike, t: npt.ArrayLike, dt: npt.ArrayLike) -> FloatArray:
    gamma, t, dt = (np.asarray(v, dtype=np.float64) for v in (gamma, t, dt))
    _check_gamma(gamma)
    bad = ~((dt > 0) & (dt <= t) & np.isfinite(t))
    if bad.any():
        raise InvalidProfileError(
            f"an update needs 0 < dt <= t, got dt = {np.broadcast_to(dt, bad.shape)[bad][0]:g} and "
            f"t = {np.broadcast_to(t, bad.shape)[bad][0]:g}. t is the time after the step, dt the "
            "time since the last update, both in the same unit."
        )
    with np.errstate(divide="ignore"):  # dt = t, the first update: log1p(-1) = -inf, beta = 0
        return (gamma + 1) * np.log1p(-dt / t)


def power_beta(gamma: npt.ArrayLike, t: npt.ArrayLike, dt: npt.ArrayLike) -> FloatArray:
    """Decay of one tracking update, beta = (1 - dt/t)^(gamma+1) (EDM2, eq. 127).

    The update is theta_hat <- beta theta_hat + (1 - beta) theta. The first one (dt = t) has
    beta = 0, so the initial copy of the weights never enters the average. For the factor of the new
    weights use `power_update_weight`, which keeps its digits when dt is much smaller than t.

    Args:
        gamma: exponents >= 0, any shape.
        t: training time after the step, > 0.
        dt: time since the last update (not since the last step), 0 < dt <= t.

    Returns:
        beta in [0, 1), float64, broadcast shape.

    Raises:
        InvalidProfileError: dt <= 0 or dt > t, or gamma is negative or not finite.

    Example:
        >>> float(power_beta(1.0, t=4, dt=1))
        0.5625
    """
    return np.exp(_log_beta(gamma, t, dt))


def power_update_weight(gamma: npt.ArrayLike, t: npt.ArrayLike, dt: npt.ArrayLike) -> FloatArray:
    """Weight of the new parameters in one tracking update, 1 - beta, to full precision.

    Computed as -expm1((gamma+1) log1p(-dt/t)): at dt/t = 1e-8 the naive 1 - beta has lost half of
    its digits in float64, and all of them in float32.

    Args:
        gamma: exponents >= 0, any shape.
        t: training time after the step, > 0.
        dt: time since the last update, 0 < dt <= t.

    Returns:
        1 - beta in (0, 1], float64, broadcast shape.

    Raises:
        InvalidProfileError: dt <= 0 or dt > t, or gamma is negative or not finite.

    Example:
        >>> float(power_update_weight(6.9, t=10, dt=10))
        1.0
    """
    return -np.expm1(_log_beta(gamma, t, dt))


@runtime_checkable
class Profile(Protocol):
    """What an averaging profile must offer: its end and its two views."""

    @property
    def t(self) -> float:
        """Training time at which the profile ends, > 0."""
        ...

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau), per unit of time."""
        ...

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """Share of the profile that lies after `tau`: 1 at 0, 0 from `t` on."""
        ...


def _check_time(t: float) -> None:
    if not (t > 0 and math.isfinite(t)):
        raise InvalidProfileError(
            f"t must be a positive, finite training time, got {t!r}. "
            "An average that ends at time 0 holds no training."
        )


@dataclass(frozen=True)
class PowerProfile:
    """Power-function profile of EDM2: p(tau) = (gamma+1) tau^gamma / t^(gamma+1) on [0, t] (eq. 121).

    Args:
        t: end of the profile, in the run's clock, > 0.
        sigma_rel: standard deviation of the profile divided by t, in (0, SIGMA_REL_MAX].

    Raises:
        InvalidProfileError: t or sigma_rel lies outside its range.

    Example:
        >>> profile = PowerProfile(t=1000, sigma_rel=0.1)
        >>> round(float(profile.tail(900)), 3)  # the last tenth of training
        0.567
    """

    t: float
    sigma_rel: float

    def __post_init__(self) -> None:
        _check_time(self.t)
        _check_sigma_rel(np.asarray(self.sigma_rel, dtype=np.float64))

    @property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return float(gamma_from_sigma_rel(self.sigma_rel))

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau), per unit of time; 0 outside [0, t]."""
        x = np.asarray(tau, dtype=np.float64) / self.t
        inside = (x >= 0) & (x <= 1)
        gamma = self.gamma
        return np.where(inside, (gamma + 1) / self.t * np.where(inside, x, 1.0) ** gamma, 0.0)

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau) = 1 - (tau/t)^(gamma+1); 0 from t on."""
        x = np.clip(np.asarray(tau, dtype=np.float64) / self.t, 0.0, 1.0)
        return 1.0 - x ** (self.gamma + 1)


@dataclass(frozen=True)
class GammaProfile:
    """Power function named by its exponent, for what other trackers really tracked.

    The same as `PowerProfile` where gamma >= 0. An exponent in (-1, 0), as comes out when a tracker
    updates every k-th step with the decay of a single step, lets early weights count most; no
    sigma_rel names it.

    Args:
        t: end of the profile, in the run's clock, > 0.
        gamma: exponent, finite and > -1.

    Raises:
        InvalidProfileError: t or gamma lies outside its range.

    Example:
        >>> GammaProfile(t=100, gamma=-0.5).tail([25, 100]).tolist()
        [0.5, 0.0]
    """

    t: float
    gamma: float

    def __post_init__(self) -> None:
        _check_time(self.t)
        if not (self.gamma > -1 and math.isfinite(self.gamma)):
            raise InvalidProfileError(
                f"gamma must be finite and > -1, got {self.gamma!r}. At -1 and below all weight would "
                "lie on the initial weights."
            )

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau), per unit of time; 0 outside [0, t], infinite at 0 if gamma < 0."""
        x = np.asarray(tau, dtype=np.float64) / self.t
        inside = (x >= 0) & (x <= 1)
        with np.errstate(divide="ignore"):
            power = np.where(inside, x, 1.0) ** self.gamma
        return np.where(inside, (self.gamma + 1) / self.t * power, 0.0)

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau) = 1 - (tau/t)^(gamma+1); 0 from t on."""
        x = np.clip(np.asarray(tau, dtype=np.float64) / self.t, 0.0, 1.0)
        return 1.0 - x ** (self.gamma + 1)


@dataclass(frozen=True)
class PointProfile:
    """The raw weights at time t: all mass in one point.

    Its density is not a function, so only the random-walk norm can fit with it.

    Args:
        t: the moment, in the run's clock, > 0.

    Raises:
        InvalidProfileError: t is not positive and finite.

    Example:
        >>> PointProfile(t=10).tail([9, 10]).tolist()
        [1.0, 0.0]
    """

    t: float

    def __post_init__(self) -> None:
        _check_time(self.t)

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """Not defined: a point has no density."""
        del tau
        raise InvalidProfileError(
            "the raw weights (a point profile) have no density; use norm='random-walk', which works "
            "on tails."
        )

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau): 1 before t, 0 from t on."""
        return np.where(np.asarray(tau, dtype=np.float64) < self.t, 1.0, 0.0)
