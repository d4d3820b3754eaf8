"""How far a reconstruction is from the true average, told from the stored averages themselves.

Between combinations that sum to one, E|theta_p - sum x_i theta_i|^2 = integral of q(tau) (T - sum x_i T_i)^2,
where q(tau) is how fast the weights wander: the variance of their movement per unit of time. Every
pair of stored averages is a measurement of it, E|theta_i - theta_j|^2 = integral of q (T_i - T_j)^2.
Neighbours in time see a short stretch of training each, so together they give q along the run.

All quantities here are per element of the weights (mean squares), so a sample of the elements will do.
Derivation and measurements: docs/explanation/profiles-and-fitting.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from posthoc_ema.fitting import fit
from posthoc_ema.inner_products import residual_norms
from posthoc_ema.profiles import FloatArray, Profile
from posthoc_ema.quadrature import quadrature, tails

_ROUNDS = 20
"""Rounds of the estimate. It settles within ten; many more would fit the scatter of single pairs."""

_ABSURD = 1e100
"""Squares of float32 weights stay below 1e77; what is larger is damage, and would overflow here."""

_LEFT_OUT = 24
"""How many stored averages are reconstructed from the others to check the scale."""

_NOISE_MARGIN = 0.25
"""A difference is never taken below this share of its rounding variance: that is known no better."""


@dataclass(frozen=True, eq=False)
class Scale:
    """How fast the weights move: q(tau), piecewise constant in training time.

    Attributes:
        edges: training times between which q is constant, rising, shape (m + 1,).
        values: variance of the movement of one element per unit of time, >= 0, shape (m,).
        num_elements: how many elements of the weights it was measured on.

    Example:
        >>> scale = Scale(np.array([0.0, 10.0, 30.0]), np.array([4.0, 1.0]), num_elements=100)
        >>> scale([5, 20, 99]).tolist(), scale.typical
        ([4.0, 1.0, 1.0], 1.0)
    """

    edges: FloatArray
    values: FloatArray
    num_elements: int

    def __post_init__(self) -> None:
        edges, values = np.asarray(self.edges), np.asarray(self.values)
        if edges.ndim != 1 or len(edges) != len(values) + 1 or len(values) == 0:
            raise ConfigError(
                f"a scale needs one value between each two edges, got {edges.shape} edges and "
                f"{values.shape} values."
            )
        if not (np.all(np.diff(edges) > 0) and np.all((values >= 0) & np.isfinite(values))):
            raise ConfigError("the edges of a scale must rise, and its values be finite and >= 0.")

    def __call__(self, tau: npt.ArrayLike) -> FloatArray:
        """q(tau); before the first edge and after the last it goes on as at the ends."""
        cell = np.searchsorted(self.edges, np.asarray(tau, dtype=np.float64), side="right") - 1
        values: FloatArray = self.values[np.clip(cell, 0, len(self.values) - 1)]
        return values

    @property
    def typical(self) -> float:
        """Median of q over training time: the one number that scales the noise of a fit."""
        order = np.argsort(self.values)
        time = np.cumsum(np.diff(self.edges)[order])
        return float(self.values[order][np.searchsorted(time, time[-1] / 2)])

    def noise_over_scale(self, noise: npt.ArrayLike) -> FloatArray:
        """The noise of `fit`: rounding variances per element over `typical`.

        Args:
            noise: s_i^2, mean-square rounding error of each stored average, any shape.

        Returns:
            s_i^2 / q, in units of time; zeros if the weights do not move at all.
        """
        noise = np.asarray(noise, dtype=np.float64)
        return noise / self.typical if self.typical > 0 else np.zeros_like(noise)


def neighbour_pairs(profiles: Sequence[Profile]) -> npt.NDArray[np.intp]:
    """Pairs of stored averages whose differences measure q: the nearest ones.

    Each average is paired with the one of the same time and with the one of the next time whose
    profile is most like its own. Averages of the same time say what no others do about training
    before the first stored time.

    Args:
        profiles: of the stored averages, (num_profiles).

    Returns:
        Indices i < j, each pair once, shape (num_pairs, 2).

    Example:
        >>> from posthoc_ema import PowerProfile
        >>> stored = [PowerProfile(t, s) for t in (10, 11) for s in (0.05, 0.20)]
        >>> neighbour_pairs(stored).tolist()
        [[0, 1], [0, 2], [1, 3], [2, 3]]
    """
    if len(profiles) < 2:
        return np.zeros((0, 2), dtype=np.intp)
    t = np.array([profile.t for profile in profiles])
    times = np.unique(t)
    # Which profile is most alike needs no accurate integral: four points between neighbouring times.
    edges = np.concatenate([[0.0], times])
    grid = (edges[:-1, None] + np.diff(edges)[:, None] * (np.arange(4) + 0.5) / 4).ravel()
    weights = np.repeat(np.diff(edges) / 4, 4)
    view = tails(profiles, grid) * np.sqrt(weights)[:, None]
    groups = [np.flatnonzero(t == time) for time in times]
    pairs: set[tuple[int, int]] = set()

    def add_nearest(i: int, others: npt.NDArray[np.intp]) -> None:
        if len(others):
            distances = np.sum((view[:, others] - view[:, [i]]) ** 2, axis=0)
            j = int(others[np.argmin(distances)])
            pairs.add((min(i, j), max(i, j)))

    for group in groups:
        for i in group:
            add_nearest(int(i), group[group != i])
    for group, following in itertools.pairwise(groups):
        for i in group:
            add_nearest(int(i), following)
    return np.array(sorted(pairs), dtype=np.intp)


def estimate_scale(
    profiles: Sequence[Profile],
    pairs: npt.ArrayLike,
    squared_differences: npt.ArrayLike,
    noise: npt.ArrayLike = 0.0,
    num_elements: int = 0,
) -> Scale | None:
    """q(tau) from the differences of stored averages.

    Solves E|theta_i - theta_j|^2 - s_i^2 - s_j^2 = integral of q (T_i - T_j)^2 for a q that is
    constant between stored times, by repeated proportional correction in the logarithm: each cell is
    scaled by the mean misfit of the pairs that see it, weighted by how much of a pair's difference
    comes from it. Before the first stored time, where only its own averages can tell, q falls as
    1/tau towards it: training starts with large, aligned steps.

    A difference below its rounding variance only bounds q from above; such pairs count less, and
    where there are no others the estimate is that bound.

    Args:
        profiles: of the stored averages, (num_profiles).
        pairs: which differ, shape (num_pairs, 2); see `neighbour_pairs`.
        squared_differences: mean over elements of (R_i - R_j)^2, shape (num_pairs,). Non-finite ones
            are left out.
        noise: mean-square rounding error of each stored average, scalar or (num_profiles,).
        num_elements: how many elements the means were taken over; kept in the result.

    Returns:
        The scale, or None if no pair differs in its profile: a single average, or copies of one.

    Raises:
        ConfigError: the shapes do not fit together.
    """
    index = np.asarray(pairs, dtype=np.intp).reshape(-1, 2)
    measured = np.asarray(squared_differences, dtype=np.float64)
    if measured.shape != (len(index),):
        raise ConfigError(
            f"one squared difference per pair is needed ({len(index)}), got shape {measured.shape}."
        )
    variance = np.broadcast_to(np.asarray(noise, dtype=np.float64), (len(profiles),))
    rounding = variance[index].sum(axis=1)
    usable = (measured >= 0) & (measured < _ABSURD) & (rounding < _ABSURD)  # False for nan
    if not usable.any():
        return None
    index, measured, rounding = index[usable], measured[usable], rounding[usable]
    edges = _cells(profiles)
    products = _pair_products(profiles, index, edges)
    reach = products.sum(axis=1)
    ends = np.array([max(profiles[i].t, profiles[j].t) for i, j in index])
    apart = reach > 1e-12 * ends
    if not apart.any():
        return None
    products, reach, ends = products[apart], reach[apart], ends[apart]
    measured, rounding = measured[apart], rounding[apart]
    moved = np.maximum(measured - rounding, _NOISE_MARGIN * rounding)
    if not moved.any():
        return Scale(edges, np.zeros(len(edges) - 1), num_elements)
    moved = np.maximum(moved, 1e-12 * moved.max())  # a stretch without any movement
    # How much a pair says: little if its difference is mostly rounding, or if it is much closer than
    # the others, as after a last save off the grid: the steps of an optimizer with momentum are
    # correlated over tens of steps, so such a pair sees less than the random walk.
    share = np.divide(rounding, measured, out=np.ones_like(measured), where=measured > 0)
    trust = np.clip(1 - share, 0.05, 1) ** 2
    trust *= np.minimum(1, reach / ends / np.median(reach / ends))
    unit = moved.max()
    return Scale(edges, _solve_scale(products, moved / unit, trust, edges) * unit, num_elements)


def _cells(profiles: Sequence[Profile]) -> FloatArray:
    """Edges of the cells of q: the stored times, and five halvings of the first."""
    times = np.unique([profile.t for profile in profiles])
    return np.concatenate([[0.0], times[0] * 2.0 ** -np.arange(5, 0, -1), times])


def _pair_products(
    profiles: Sequence[Profile], pairs: npt.NDArray[np.intp], edges: FloatArray
) -> FloatArray:
    """Integral of (T_i - T_j)^2 over each cell, shape (num_pairs, num_cells)."""
    nodes, weights = quadrature(profiles)
    products = np.zeros((len(pairs), len(edges) - 1))
    step = max(1, 2**20 // max(len(pairs), len(profiles)))  # bounded memory: 8 MB at a time
    for start in range(0, len(nodes), step):
        tau = nodes[start : start + step]
        view = tails(profiles, tau)
        squared = (view[:, pairs[:, 0]] - view[:, pairs[:, 1]]) ** 2
        squared *= weights[start : start + step, None]
        cells, first = np.unique(np.searchsorted(edges, tau) - 1, return_index=True)
        products[:, cells] += np.add.reduceat(squared, first, axis=0).T
    return products


def _solve_scale(
    products: FloatArray, moved: FloatArray, trust: FloatArray, edges: FloatArray
) -> FloatArray:
    """Values per cell such that products @ q is close to `moved` in the logarithm."""
    middle = _middle(edges)
    q = np.full(products.shape[1], np.median(moved / products.sum(axis=1)))
    for _ in range(_ROUNDS):
        predicted = products * q
        total = predicted.sum(axis=1)
        seen = trust[:, None] * predicted / total[:, None]
        weight = seen.sum(axis=0)
        known = weight > 0.05 * weight.max()
        # Two e-folds a round at most: a pair that contradicts all others pulls little harder than they.
        misfit = seen.T @ np.clip(np.log(moved / total), -2, 2)
        q = q * np.exp(np.divide(misfit, weight, out=np.zeros_like(q), where=known))
        first = int(np.argmax(weight > 0.3 * np.median(weight[known])))
        q[:first] = q[first] * middle[first] / middle[:first]
        q = _fill_unseen(q, known, middle)
    return q


def _middle(edges: FloatArray) -> FloatArray:
    """Geometric middle of each cell."""
    return np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])


def _fill_unseen(q: FloatArray, known: npt.NDArray[np.bool_], middle: FloatArray) -> FloatArray:
    """Cells that no pair sees get the value between their neighbours."""
    start = int(np.argmax(known))
    filled = np.exp(np.interp(np.log(middle), np.log(middle[known]), np.log(q[known])))
    filled[:start] = q[:start]
    return np.where(known, q, filled)


def sampled_scale(
    profiles: Sequence[Profile], samples: npt.ArrayLike, noise: npt.ArrayLike = 0.0
) -> Scale | None:
    """The scale from a sample of the elements of all stored averages: the one to use.

    `estimate_scale` from neighbouring pairs, then checked against the averages themselves: some of them
    are reconstructed from the others around them, and q is corrected by how far the errors of that were
    from the predicted ones. Pairs see movement over the length of an average, reconstructions that
    between two stored times; where training is not quite a random walk the two differ.

    Args:
        profiles: of the stored averages, (num_profiles).
        samples: the same elements of each, shape (num_profiles, num_elements). A few thousand spread
            evenly over the weights are enough. Averages that hold a non-finite one are left out.
        noise: mean-square rounding error of each stored average, scalar or (num_profiles,).

    Returns:
        The scale, or None; see `estimate_scale`.

    Raises:
        ConfigError: the shapes do not fit together.

    Example:
        >>> from posthoc_ema import PowerProfile
        >>> stored = [PowerProfile(t, 0.1) for t in (10, 20)]
        >>> sampled_scale(stored, [[0.0, 0.0], [1.0, -1.0]]).num_elements
        2
    """
    values = np.asarray(samples)
    if values.ndim != 2 or len(values) != len(profiles):
        raise ConfigError(
            f"samples must have shape ({len(profiles)}, num_elements), one row per average, got "
            f"{values.shape}."
        )
    variance = np.broadcast_to(np.asarray(noise, dtype=np.float64), (len(profiles),))
    good = np.flatnonzero(np.isfinite(values).all(axis=1) & np.isfinite(variance)).tolist()
    profiles, values, variance = [profiles[i] for i in good], values[good], variance[good]
    pairs = neighbour_pairs(profiles)
    squared = [np.mean((values[i].astype(np.float64) - values[j]) ** 2) for i, j in pairs]
    scale = estimate_scale(profiles, pairs, squared, variance, num_elements=values.shape[1])
    if scale is None or scale.typical == 0:
        return scale
    return _corrected(scale, *_left_out(profiles, values, variance, scale))


def _left_out(
    profiles: Sequence[Profile], values: npt.NDArray[Any], noise: FloatArray, scale: Scale
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Reconstructions of stored averages from the others of up to three times before and after.

    Returns:
        Times, squared error over the predicted one, and how much of it is not rounding (0 to 1).
    """
    t = np.array([profile.t for profile in profiles])
    times = np.unique(t)
    rank = np.searchsorted(times, t)
    inner = np.flatnonzero((rank >= 1) & (rank < len(times) - 1) & (scale(t) > 0))
    chosen = inner[np.arange(_LEFT_OUT) * len(inner) // _LEFT_OUT] if len(inner) else inner
    rows = []
    for i in np.unique(chosen).tolist():
        near = np.flatnonzero((np.abs(rank - rank[i]) <= 3) & (np.arange(len(t)) != i))
        others, wanted = [profiles[j] for j in near.tolist()], [profiles[i]]
        # The second term keeps copies and exact storage from making the system singular.
        x = fit(others, wanted, noise=noise[near] / scale(t[i]) + 1e-9 * t[i]).coefficients
        measured = np.mean((values[i] - x[:, 0] @ values[near].astype(np.float64)) ** 2)
        rounding = noise[i] + noise[near] @ x[:, 0] ** 2
        predicted = residual_norms(others, wanted, x, "random-walk", scale)[0] ** 2
        if predicted > 1e-20 * scale(t[i]) * t[i]:
            share = predicted / (predicted + rounding)
            rows.append((t[i], max(measured - rounding, 0.0) / predicted, share))
    table = np.array(rows).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _corrected(scale: Scale, times: FloatArray, ratio: FloatArray, share: FloatArray) -> Scale:
    """The scale times the local mean of `ratio`; 1 where little is known, and before the first time."""
    if not len(times):
        return scale
    middle = _middle(scale.edges)
    distance = np.log(middle)[:, None] - np.log(times)
    weight = np.exp(-0.5 * (distance / 0.3) ** 2) * share**2
    factor = weight @ np.log(np.clip(ratio, 0.05, 20)) / (weight.sum(axis=1) + 0.5)
    factor[middle < 0.7 * times.min()] = 0.0
    return Scale(scale.edges, scale.values * np.exp(factor), scale.num_elements)


def predicted_errors(
    inputs: Sequence[Profile],
    targets: Sequence[Profile],
    coefficients: FloatArray,
    scale: Scale,
    noise: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Expected error of every reconstruction, root mean square per element.

    sqrt(integral of q (T - sum x_i T_i)^2 + sum x_i^2 s_i^2): what the profiles miss and what storage
    lost. Divide by the root mean square of the weights for a relative error.

    Args:
        inputs: profiles of the stored averages, (num_inputs).
        targets: wanted profiles, (num_targets).
        coefficients: shape (num_inputs, num_targets), columns sum to one; from any norm.
        scale: q(tau), from `estimate_scale`.
        noise: s_i^2, mean-square rounding error of each stored average, scalar or (num_inputs,).

    Returns:
        Errors in the unit of the weights, shape (num_targets,).

    Raises:
        ConfigError: the shapes do not fit together.

    Example:
        >>> from posthoc_ema import PowerProfile, fit
        >>> stored, wanted = [PowerProfile(9, 0.1)], [PowerProfile(9, 0.1)]
        >>> still = Scale(np.array([0.0, 9.0]), np.array([1.0]), num_elements=1)
        >>> predicted_errors(stored, wanted, fit(stored, wanted).coefficients, still, 4.0).tolist()
        [2.0]
    """
    x = np.asarray(coefficients, dtype=np.float64)
    if x.shape != (len(inputs), len(targets)):
        raise ConfigError(
            f"coefficients must have shape ({len(inputs)}, {len(targets)}), got {x.shape}."
        )
    variance = np.broadcast_to(np.asarray(noise, dtype=np.float64), (len(inputs),))
    profile_part = residual_norms(inputs, targets, x, "random-walk", scale)
    return np.sqrt(profile_part**2 + variance @ x**2)
