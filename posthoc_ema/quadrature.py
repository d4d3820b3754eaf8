"""Profiles on a grid: quadrature nodes fine enough for them, and their views at these nodes.

Gauss-Legendre on pieces inside which every profile is smooth. The pieces end where a profile does (at the
end of a power function, the borders of a window, the times of a table), so that sums over the nodes
integrate products of profiles to about 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from posthoc_ema.classical_profiles import ExponentialProfile, TabulatedProfile, UniformProfile
from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import (
    FloatArray,
    GammaProfile,
    PointProfile,
    PowerProfile,
    Profile,
    gamma_from_sigma_rel,
)

_GAUSS = np.polynomial.legendre.leggauss(16)
_GAUSS_SHORT = np.polynomial.legendre.leggauss(6)

_BLOCK = 512
"""Times in one block of `combination`."""

_KNOWN = (
    PowerProfile,
    GammaProfile,
    PointProfile,
    UniformProfile,
    ExponentialProfile,
    TabulatedProfile,
)


def power_mask(profiles: Sequence[Profile]) -> npt.NDArray[np.bool_]:
    """Which profiles are power functions, points included, shape (num_profiles,).

    Raises:
        InvalidProfileError: a profile is of no known kind.
    """
    for profile in profiles:
        if not isinstance(profile, _KNOWN):
            names = ", ".join(kind.__name__ for kind in _KNOWN)
            raise InvalidProfileError(
                f"profiles must be one of {names}, got {type(profile).__name__}. Any other profile "
                "can be given as a TabulatedProfile."
            )
    power = PowerProfile | GammaProfile | PointProfile
    return np.array([isinstance(profile, power) for profile in profiles], dtype=bool)


def exponents_and_times(profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
    """Power functions as a = gamma + 1 and t, shape (num_profiles,) each; a point is the limit a = inf."""
    t = np.array([profile.t for profile in profiles], dtype=np.float64)
    a = np.full(len(profiles), np.inf)
    is_power = np.array([isinstance(profile, PowerProfile) for profile in profiles], dtype=bool)
    sigma_rels = [profile.sigma_rel for profile in profiles if isinstance(profile, PowerProfile)]
    a[is_power] = gamma_from_sigma_rel(sigma_rels) + 1
    for i, profile in enumerate(profiles):
        if isinstance(profile, GammaProfile):
            a[i] = profile.gamma + 1
    return a, t


def quadrature(profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights that integrate squares of combinations of these profiles, nodes rising.

    Args:
        profiles: of any known kind, at least one.

    Returns:
        Nodes between 0 and the last end, and their weights.
    """
    is_power = power_mask(profiles)
    powers = [p for p, power in zip(profiles, is_power, strict=True) if power]
    others = [p for p, power in zip(profiles, is_power, strict=True) if not power]
    if others:
        a, t = exponents_and_times(powers)
        edges = _power_edges(a, t) if powers else np.zeros(0)
        return _gauss(np.unique(np.concatenate([[0.0], edges, *(_edges(p) for p in others)])))
    a, t = exponents_and_times(powers)
    edges = _power_edges(a, t)
    # With a thousand ends most pieces are so short that powers hardly bend inside: w = a dt/t below
    # 0.2, and six points leave (w/2)^12/12!, nothing.
    short = np.diff(edges) * a[np.isfinite(a)].max(initial=1.0) < 0.2 * edges[:-1]
    return _gauss(edges, short)


def _gauss(
    edges: FloatArray, short: npt.NDArray[np.bool_] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights on all pieces, rising; fewer on those marked short."""
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    if short is None:
        short = np.zeros(len(middle), dtype=bool)
    rules = [
        (middle[kind, None] + half[kind, None] * points, half[kind, None] * weights)
        for kind, (points, weights) in ((~short, _GAUSS), (short, _GAUSS_SHORT))
    ]
    nodes = np.concatenate([nodes.ravel() for nodes, _ in rules])
    weights = np.concatenate([weights.ravel() for _, weights in rules])
    order = np.argsort(nodes)
    return nodes[order], weights[order]


def _power_edges(a: FloatArray, t: FloatArray) -> FloatArray:
    """Pieces for power functions with exponents a ending at t.

    Each interval between neighbouring ends is cut so fine (a ratio of at most 1 + 4/max exponent) that
    a power is smooth inside a piece, down to 1e-12 of the first end.
    """
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
    return np.concatenate([*pieces, ends[-1:]])


def _edges(profile: Profile) -> FloatArray:
    """Where a profile that is no power function needs pieces to end."""
    if isinstance(profile, UniformProfile):
        return np.array([profile.start, profile.end])
    if isinstance(profile, TabulatedProfile):
        return np.array(profile.times)
    assert isinstance(profile, ExponentialProfile)
    # Four units of decay per piece, until the share is below 1e-17.
    switch, t = profile.warmup_end, profile.t
    late = t - np.arange(11) * 4 / profile.rate
    if switch == 0:
        return np.append(late[late > 0], 0.0)
    num = 2 + int(np.log(switch / profile.interval + 1) / np.log(1.4))
    early = np.geomspace(profile.interval, switch + profile.interval, num) - profile.interval
    return np.concatenate([late[late > switch], early, [switch]])


def _columns(
    profiles: Sequence[Profile],
    tau: FloatArray,
    power: Callable[[FloatArray, FloatArray, FloatArray], FloatArray],
    other: Callable[[Profile], FloatArray],
) -> FloatArray:
    """Power functions all at once from x = min(tau/t, 1), a and t; the others one by one."""
    is_power = power_mask(profiles)
    a, t = exponents_and_times([p for p, yes in zip(profiles, is_power, strict=True) if yes])
    # What ended before the first of these times is constant there.
    columns, going = np.flatnonzero(is_power), t > tau.min(initial=np.inf)
    view = np.empty((len(tau), len(profiles)))
    view[:, columns[~going]] = power(np.ones((1, (~going).sum())), a[~going], t[~going])
    view[:, columns[going]] = power(np.minimum(tau[:, None] / t[going], 1.0), a[going], t[going])
    for i in np.flatnonzero(~is_power).tolist():
        view[:, i] = other(profiles[i])
    return view


def _power(x: FloatArray, a: FloatArray) -> FloatArray:
    """x^a for x in [0, 1], by exp and log: many times faster than the general power."""
    # A point, a = inf, stays 1 at x = 1: a finite huge number times log(1) is 0.
    exponent = np.log(np.maximum(x, np.finfo(np.float64).tiny)) * np.minimum(a, 1e300)
    return np.exp(exponent, out=exponent)


def tails(profiles: Sequence[Profile], tau: FloatArray) -> FloatArray:
    """Tails of many profiles, shape (num_tau, num_profiles); tau has shape (num_tau,)."""
    return _columns(profiles, tau, lambda x, a, _: 1 - _power(x, a), lambda p: p.tail(tau))


def displacements(profiles: Sequence[Profile], tau: FloatArray) -> FloatArray:
    """1 - T of many profiles, shape (num_tau, num_profiles)."""
    return _columns(profiles, tau, lambda x, a, _: _power(x, a), lambda p: 1 - p.tail(tau))


def densities(profiles: Sequence[Profile], tau: FloatArray) -> FloatArray:
    """Densities of many profiles, shape (num_tau, num_profiles)."""

    def power(x: FloatArray, a: FloatArray, t: FloatArray) -> FloatArray:
        return np.where(x < 1, a / t * _power(x, a - 1), 0.0)

    return _columns(profiles, tau, power, lambda p: p.density(tau))


def combination(
    profiles: Sequence[Profile], coefficients: FloatArray, tau: FloatArray, *, of_tails: bool
) -> FloatArray:
    """Combinations of tails, or of densities, at rising times.

    The same as `tails(profiles, tau) @ coefficients`, but for a thousand power functions of few lengths
    many times faster: in a block of times that ends with tau_1, (tau/t)^a = (tau/tau_1)^a (tau_1/t)^a,
    and the second factor, which alone depends on the profile, is summed once per exponent.

    Args:
        profiles: (num_profiles).
        coefficients: (num_profiles, num_targets).
        tau: times > 0, rising, (num_tau,).
        of_tails: tails if true, densities if false.

    Returns:
        float64, shape (num_tau, num_targets).
    """
    is_power = power_mask(profiles)
    view = tails if of_tails else densities
    total = np.zeros((len(tau), coefficients.shape[1]))
    others = np.flatnonzero(~is_power)
    if len(others):
        total += view([profiles[i] for i in others.tolist()], tau) @ coefficients[others]
    powers = [p for p, yes in zip(profiles, is_power, strict=True) if yes]
    if not powers:
        return total
    x = coefficients[is_power]
    a, t = exponents_and_times(powers)
    # Sorted by exponent, so that sums per exponent are sums over neighbouring rows.
    order = np.argsort(a, kind="stable")
    powers, x, a, t = [powers[i] for i in order.tolist()], x[order], a[order], t[order]
    for start in range(0, len(tau), _BLOCK):
        block = tau[start : start + _BLOCK]
        last = float(block[-1])
        inside = np.flatnonzero((t > block[0]) & (t <= last))
        if len(inside):  # ends within the block
            ending = [powers[i] for i in inside.tolist()]
            total[start : start + _BLOCK] += view(ending, block) @ x[inside]
        later = np.flatnonzero(t > last)
        if not len(later):
            continue
        exponents, first = np.unique(a[later], return_index=True)
        share = x[later]
        if of_tails:
            total[start : start + _BLOCK] += share.sum(axis=0)
            share = -share
        else:
            share = share * (a[later] / t[later])[:, None]
            exponents = exponents - 1
        rest = _power(
            last / t[later], exponents[np.searchsorted(first, np.arange(len(later)), "right") - 1]
        )
        sums = np.add.reduceat(share * rest[:, None], first, axis=0)
        total[start : start + _BLOCK] += _power(block[:, None] / last, exponents) @ sums
    return total


def check_density(profiles: Sequence[Profile]) -> None:
    """Refuse profiles that the density norm cannot hold.

    Raises:
        InvalidProfileError: a profile has a point mass, or a density that is infinite at 0.
    """
    for profile in profiles:
        if isinstance(profile, PointProfile):
            profile.density(0.0)  # raises: a point has no density
        if isinstance(profile, GammaProfile) and profile.gamma < 0:
            raise InvalidProfileError(
                f"the density of a profile with gamma = {profile.gamma:g} is infinite at 0; use "
                "norm='random-walk', which works on tails."
            )
        share = getattr(profile, "initial_share", 0.0)
        if share > 1e-12:
            raise InvalidProfileError(
                f"this {type(profile).__name__} keeps {share:.2g} of the initial weights, a point "
                "that has no density; use norm='random-walk', which works on tails."
            )
