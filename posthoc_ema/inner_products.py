"""Inner products of profiles under the two models of how weights move, and what is built on them.

Which distance between two averages is expected? It depends on how theta(tau) moves (docs:
explanation/profiles-and-fitting.md):

- **density**: theta(tau) is white noise, E|theta_p - theta_q|^2 ~ integral of (p - q)^2 (EDM2, Algorithm 3).
- **random-walk**: increments of theta(tau) are uncorrelated with variance q per unit of time,
  E|theta_p - theta_q|^2 = q * integral of (T_p - T_q)^2, T being the tails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import (
    FloatArray,
    PointProfile,
    PowerProfile,
    Profile,
    gamma_from_sigma_rel,
)

Norm = Literal["random-walk", "density"]

_GAUSS_NODES, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(16)


def _exponents_and_times(profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
    """Profiles as a = gamma + 1 and t, shape (num_profiles,) each; a point is the limit a = inf."""
    for profile in profiles:
        if not isinstance(profile, PowerProfile | PointProfile):
            raise InvalidProfileError(
                f"profiles must be PowerProfile or PointProfile, got {type(profile).__name__}."
            )
    t = np.array([profile.t for profile in profiles], dtype=np.float64)
    a = np.full(len(profiles), np.inf)
    is_power = np.array([isinstance(profile, PowerProfile) for profile in profiles], dtype=bool)
    sigma_rels = [profile.sigma_rel for profile in profiles if isinstance(profile, PowerProfile)]
    a[is_power] = gamma_from_sigma_rel(sigma_rels) + 1
    return a, t


def random_walk_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> FloatArray:
    """Integrals of the product of two tails.

    For power profiles with a = gamma_a + 1, b = gamma_b + 1, m = min(t_a, t_b):
    m - m (m/t_a)^a/(a+1) - m (m/t_b)^b/(b+1) + m (m/t_a)^a (m/t_b)^b/(a+b+1).

    Args:
        rows: profiles, (num_rows).
        columns: profiles, (num_columns).

    Returns:
        float64, shape (num_rows, num_columns), in units of time.

    Example:
        >>> from posthoc_ema.profiles import PointProfile
        >>> random_walk_products([PointProfile(3)], [PointProfile(5)]).tolist()
        [[3.0]]
    """
    (a, t_a), (b, t_b) = _exponents_and_times(rows), _exponents_and_times(columns)
    a, t_a = a[:, None], t_a[:, None]
    m = np.minimum(t_a, t_b)
    power_a, power_b = (m / t_a) ** a, (m / t_b) ** b
    return m * (1 - power_a / (a + 1) - power_b / (b + 1) + power_a * power_b / (a + b + 1))


def displacement_products(
    rows: Sequence[Profile], columns: Sequence[Profile], horizon: float
) -> FloatArray:
    """Integrals over [0, horizon] of the product of two displacements, (1 - T_a)(1 - T_b).

    Between combinations that sum to one, 1 - T and T differ by a constant that cancels, so these may
    stand in for `random_walk_products` in a constrained fit. They are what is left after removing the
    large part that all tails share (T = 1 early on): with K = 48 the coefficients gain two digits.

    Args:
        rows: profiles, (num_rows).
        columns: profiles, (num_columns).
        horizon: end of the integral, at or after every profile's end.

    Returns:
        float64, shape (num_rows, num_columns), in units of time.
    """
    (a, t_a), (b, t_b) = _exponents_and_times(rows), _exponents_and_times(columns)
    a, t_a = a[:, None], t_a[:, None]
    m, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent_of_later = np.where(t_a <= t_b, b, a)
    both = m * (m / t_a) ** a * (m / t_b) ** b / (a + b + 1)
    between = (later - m * (m / later) ** exponent_of_later) / (exponent_of_later + 1)
    return both + between + (horizon - later)


def density_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> FloatArray:
    """Integrals of the product of two densities (EDM2, Algorithm 3).

    For t_a <= t_b: (gamma_a+1)(gamma_b+1)/(gamma_a+gamma_b+1) * (t_a/t_b)^gamma_b / t_b, written with
    ratios so that nothing overflows.

    Args:
        rows: power profiles, (num_rows).
        columns: power profiles, (num_columns).

    Returns:
        float64, shape (num_rows, num_columns), per unit of time.

    Raises:
        InvalidProfileError: a point profile is among them; it has no density.
    """
    for profile in (*rows, *columns):
        if isinstance(profile, PointProfile):
            profile.density(0.0)  # raises: a point has no density
    (a, t_a), (b, t_b) = _exponents_and_times(rows), _exponents_and_times(columns)
    a, t_a = a[:, None], t_a[:, None]
    later = np.maximum(t_a, t_b)
    gamma_of_later = np.where(t_a <= t_b, b, a) - 1
    return a * b / (a + b - 1) * (np.minimum(t_a, t_b) / later) ** gamma_of_later / later


def quadrature(profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights that integrate squares of combinations of these profiles, nodes rising.

    Gauss-Legendre between neighbouring ends, each interval cut so fine (a ratio of at most
    1 + 4/max exponent) that a power is smooth inside a piece, down to 1e-12 of the first end.
    """
    a, t = _exponents_and_times(profiles)
    ends = np.unique(t)
    steepest = float(a[np.isfinite(a)].max(initial=1.0))
    ratio = 1 + max(4 / steepest, 1e-3)
    pieces = []
    for low, high in zip(np.concatenate([[ends[0] * 1e-12], ends[:-1]]), ends, strict=True):
        # Steep powers vanish far below every end, so only shallow ones need pieces near zero;
        # a ratio of 2 is fine for them.
        fine = max(low, ends[0] * 0.01)
        if low < fine:
            pieces.append(np.geomspace(low, fine, 2 + int(np.log(fine / low) / np.log(1.5)))[:-1])
        num = 2 + int(np.log(high / fine) / np.log(ratio))
        pieces.append(np.geomspace(fine, high, num)[:-1])
    edges = np.concatenate([*pieces, ends[-1:]])
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    nodes = middle[:, None] + half[:, None] * _GAUSS_NODES
    return nodes.ravel(), (half[:, None] * _GAUSS_WEIGHTS).ravel()


def residual_norms(
    inputs: Sequence[Profile],
    targets: Sequence[Profile],
    coefficients: FloatArray,
    norm: Norm,
    density: Callable[[FloatArray], FloatArray] | None = None,
) -> FloatArray:
    """Distance between each target and its combination of the inputs, under `norm`.

    Integrated from the difference itself and not from inner products: those cancel and leave
    nothing below 1e-8 of the profile, where good fits live.

    Args:
        inputs: profiles, (num_inputs).
        targets: profiles, (num_targets).
        coefficients: shape (num_inputs, num_targets).
        norm: "random-walk" or "density".
        density: q(tau) >= 0 to put under the integral, for example a `diagnostics.Scale`; 1 if None.

    Returns:
        sqrt of the integral of the squared difference, float64, shape (num_targets,). Unit: sqrt(time)
        for the random walk, 1/sqrt(time) for the density; times that of sqrt(q).
    """
    nodes, weights = quadrature([*inputs, *targets])
    if density is not None:
        weights = weights * density(nodes)
    total = np.zeros(len(targets))
    for start in range(0, len(nodes), 4096):  # bounded memory: 4096 x num_inputs values at a time
        tau = nodes[start : start + 4096]
        view = _views(inputs, tau, norm) @ coefficients - _views(targets, tau, norm)
        total += weights[start : start + 4096] @ view**2
    return np.sqrt(total)


def tails(profiles: Sequence[Profile], tau: FloatArray) -> FloatArray:
    """Tails of many profiles at rising times `tau`, shape (num_tau, num_profiles)."""
    return _views(profiles, tau, "random-walk")


def _views(profiles: Sequence[Profile], tau: FloatArray, norm: Norm) -> FloatArray:
    """Tails or densities at `tau`, shape (num_tau, num_profiles)."""
    a, t = _exponents_and_times(profiles)
    x = tau[:, None] / t
    inside = x < 1
    x = np.where(inside, x, 1.0)
    if norm == "density":
        return np.where(inside, a / t * x ** (a - 1), 0.0)
    return np.where(inside, 1 - x**a, 0.0)
