"""Other names for the length of an average, and back: half-life, beta, half-life fraction.

Three rules, each exact and each with its inverse. They do not agree with one another, because a power
profile is no exponential one: sigma_rel 0.10 has a half-life of 0.0693 t by equal width and of 0.0873 t
by equal decay.

- **equal width** (`..._half_life`): the exponential and the power profile have the same standard
  deviation, half_life / ln 2 = sigma_rel t. The two averages reach equally far back.
- **equal decay** (`..._beta`, `..._half_life_fraction`): one update at time t keeps the same share. This is
  what a tracker really does at t: beta = (1 - dt/t)^(gamma+1).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import (
    SIGMA_REL_MAX,
    FloatArray,
    gamma_from_sigma_rel,
    power_beta,
    sigma_rel_from_gamma,
)


def _positive(name: str, value: npt.ArrayLike) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    bad = ~((array > 0) & np.isfinite(array))
    if bad.any():
        raise InvalidProfileError(
            f"{name} must be positive and finite, got {array[bad].flat[0]:g}."
        )
    return array


def sigma_rel_from_half_life(half_life: npt.ArrayLike, t: npt.ArrayLike) -> FloatArray:
    """sigma_rel of the power profile that is as wide as a classical EMA: half_life / (ln 2 t).

    Equal standard deviation. The inverse is `half_life_from_sigma_rel`.

    Args:
        half_life: of the classical EMA, in the run's clock, > 0.
        t: training time at which the two are compared, > 0.

    Returns:
        sigma_rel, float64, broadcast shape.

    Raises:
        InvalidProfileError: an argument is not positive, or the half-life is so long (over a fifth of t)
            that no power profile is as wide.

    Example:
        >>> round(float(sigma_rel_from_half_life(50_000, t=1_000_000)), 4)
        0.0721
    """
    half_life, t = _positive("half_life", half_life), _positive("t", t)
    sigma_rel = np.asarray(half_life / (math.log(2) * t))
    bad = sigma_rel > SIGMA_REL_MAX * (1 + 1e-12)
    if bad.any():
        raise InvalidProfileError(
            f"half_life must be at most {SIGMA_REL_MAX * math.log(2):.4f} t, got "
            f"{sigma_rel[bad].flat[0] * math.log(2):.4f} t. Longer than that, a classical EMA still "
            "holds its initial weights; no power profile is as wide."
        )
    return np.minimum(sigma_rel, SIGMA_REL_MAX)


def half_life_from_sigma_rel(sigma_rel: npt.ArrayLike, t: npt.ArrayLike) -> FloatArray:
    """Half-life of the classical EMA that is as wide as a power profile: ln 2 sigma_rel t.

    Equal standard deviation. The inverse is `sigma_rel_from_half_life`.

    Args:
        sigma_rel: relative width in (0, SIGMA_REL_MAX].
        t: training time, > 0.

    Returns:
        Half-life in the run's clock, float64, broadcast shape.

    Raises:
        InvalidProfileError: sigma_rel or t lies outside its range.

    Example:
        >>> round(float(half_life_from_sigma_rel(0.10, t=1_000_000)))
        69315
    """
    gamma_from_sigma_rel(sigma_rel)  # refuses what is no sigma_rel
    return np.asarray(math.log(2) * np.asarray(sigma_rel) * _positive("t", t))


def sigma_rel_from_beta(
    beta: npt.ArrayLike, t: npt.ArrayLike, dt: npt.ArrayLike = 1.0
) -> FloatArray:
    """sigma_rel of the power profile whose update at time t keeps the share `beta`.

    Equal decay: gamma = ln(beta) / ln(1 - dt/t) - 1. The inverse is `beta_from_sigma_rel`.

    Args:
        beta: decay of one update, in (0, 1).
        t: training time after the update, > dt.
        dt: training time between two updates, > 0.

    Returns:
        sigma_rel, float64, broadcast shape.

    Raises:
        InvalidProfileError: an argument lies outside its range, or beta is so close to 1 that it
            exceeds the plain average over all of training, 1 - dt/t.

    Example:
        >>> round(float(sigma_rel_from_beta(0.9999, t=100_000)), 4)
        0.083
    """
    beta, t, dt = np.asarray(beta, dtype=np.float64), _positive("t", t), _positive("dt", dt)
    bad = ~((beta > 0) & (beta < 1))
    if bad.any():
        raise InvalidProfileError(f"beta must lie in (0, 1), got {beta[bad].flat[0]:g}.")
    if not np.all(dt < t):
        raise InvalidProfileError("dt must be smaller than t: the first update has no beta.")
    gamma = np.log(beta) / np.log1p(-dt / t) - 1
    return _named(gamma, "beta", "1 - dt/t")


def beta_from_sigma_rel(
    sigma_rel: npt.ArrayLike, t: npt.ArrayLike, dt: npt.ArrayLike = 1.0
) -> FloatArray:
    """Decay of the tracker's update at time t, (1 - dt/t)^(gamma+1).

    The inverse is `sigma_rel_from_beta`; for the share of the new weights see `power_update_weight`.

    Args:
        sigma_rel: relative width in (0, SIGMA_REL_MAX].
        t: training time after the update, > 0.
        dt: training time since the last update, in (0, t].

    Returns:
        beta in [0, 1), float64, broadcast shape.

    Raises:
        InvalidProfileError: an argument lies outside its range.

    Example:
        >>> round(float(beta_from_sigma_rel(0.10, t=100_000)), 6)
        0.999921
    """
    return power_beta(gamma_from_sigma_rel(sigma_rel), t, dt)


def sigma_rel_from_half_life_fraction(fraction: npt.ArrayLike) -> FloatArray:
    """sigma_rel of an EMA whose half-life is a fixed fraction of the time trained: gamma = ln 2 / f - 1.

    This is torchtitan's rule, decay 2^(-1/(f n)) at step n: already a power profile, by equal decay. The
    inverse is `half_life_fraction_from_sigma_rel`.

    Args:
        fraction: half-life over training time, in (0, ln 2].

    Returns:
        sigma_rel, float64, same shape.

    Raises:
        InvalidProfileError: a fraction lies outside (0, ln 2].

    Example:
        >>> round(float(sigma_rel_from_half_life_fraction(0.05)), 4)
        0.0629
    """
    gamma = math.log(2) / _positive("fraction", fraction) - 1
    return _named(np.asarray(gamma), "fraction", "ln 2 = 0.6931")


def half_life_fraction_from_sigma_rel(sigma_rel: npt.ArrayLike) -> FloatArray:
    """Half-life over training time of a power profile, by equal decay: f = ln 2 / (gamma + 1).

    The inverse is `sigma_rel_from_half_life_fraction`.

    Args:
        sigma_rel: relative width in (0, SIGMA_REL_MAX].

    Returns:
        fraction in (0, ln 2], float64, same shape.

    Raises:
        InvalidProfileError: sigma_rel lies outside its range.

    Example:
        >>> round(float(half_life_fraction_from_sigma_rel(0.10)), 4)
        0.0873
    """
    return math.log(2) / (gamma_from_sigma_rel(sigma_rel) + 1)


def gamma_of_sparse_updates(gamma: npt.ArrayLike, every: int) -> FloatArray:
    """Exponent that was really tracked when one step's beta was applied every k-th step.

    Some trackers update every k-th step but compute beta with dt = 1. The share an update keeps is then
    (1 - 1/t)^(gamma+1) per k steps, which is the decay of gamma_eff = (gamma+1)/k - 1.

    Args:
        gamma: exponent that was asked for, > -1.
        every: steps between two updates, k >= 1.

    Returns:
        gamma_eff > -1, float64; below 0 no sigma_rel names it, use `GammaProfile`.

    Raises:
        InvalidProfileError: gamma or `every` lies outside its range.

    Example:
        >>> round(float(gamma_of_sparse_updates(6.94, every=10)), 3)
        -0.206
    """
    gamma = np.asarray(gamma, dtype=np.float64)
    if not (every >= 1 and np.all((gamma > -1) & np.isfinite(gamma))):
        raise InvalidProfileError(
            f"sparse updates need gamma > -1 and every >= 1, got every = {every}."
        )
    return (gamma + 1) / every - 1


def _named(gamma: FloatArray, name: str, limit: str) -> FloatArray:
    """sigma_rel of exponents that must be >= 0, up to rounding."""
    if np.any(gamma < -1e-9):
        raise InvalidProfileError(
            f"{name} must be at most {limit}, the plain average over all of training; got a longer "
            "one. Such an average is a GammaProfile with gamma < 0 and has no sigma_rel."
        )
    return sigma_rel_from_gamma(np.maximum(gamma, 0.0))
