"""Inner products of profiles under the two models of how weights move, and what is built on them.

Which distance between two averages is expected? It depends on how theta(tau) moves (docs:
explanation/profiles-and-fitting.md):

- **density**: theta(tau) is white noise, E|theta_p - theta_q|^2 ~ integral of (p - q)^2 (EDM2, Algorithm 3).
- **random-walk**: increments of theta(tau) are uncorrelated with variance q per unit of time,
  E|theta_p - theta_q|^2 = q * integral of (T_p - T_q)^2, T being the tails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np

from posthoc_ema.profiles import FloatArray, Profile
from posthoc_ema.quadrature import (
    check_density,
    combination,
    densities,
    displacements,
    exponents_and_times,
    power_mask,
    quadrature,
    tails,
)

Norm = Literal["random-walk", "density"]

_Block = Callable[[Sequence[Profile], Sequence[Profile]], FloatArray]


Precision = type[np.float64] | type[np.longdouble]


def _ratio_power(t_a: FloatArray, t_b: FloatArray, a: FloatArray) -> FloatArray:
    """(earlier/later)^a of two times; in extended precision by logarithms, ten times faster there."""
    if t_b.dtype == np.float64:
        return (np.minimum(t_a, t_b) / np.maximum(t_a, t_b)) ** a
    # A point, a = inf, stays 1 at equal times: a finite huge number times 0.
    exponent = np.abs(np.log(t_a) - np.log(t_b)) * -np.minimum(a, 1e300)
    return np.exp(exponent, out=exponent)


def _outer(
    closed: Callable[[FloatArray, FloatArray, FloatArray, FloatArray], FloatArray],
    rows: Sequence[Profile],
    columns: Sequence[Profile],
    precision: Precision,
) -> FloatArray:
    """A closed form of (a, t_a, b, t_b) for all pairs, some rows at a time: bounded memory."""
    (a, t_a), (b, t_b) = exponents_and_times(rows), exponents_and_times(columns)
    b, t_b = b.astype(precision), t_b.astype(precision)
    products: FloatArray = np.empty((len(rows), len(columns)), dtype=precision)
    symmetric = rows is columns
    step = max(1, 2**16 // max(len(columns), 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        first = start if symmetric else 0
        products[part, first:] = closed(
            a[part, None].astype(precision),
            t_a[part, None].astype(precision),
            b[first:],
            t_b[first:],
        )
        if symmetric:
            products[first:, part] = products[part, first:].T
    return products


def _by_kind(
    rows: Sequence[Profile], columns: Sequence[Profile], closed: _Block, general: _Block
) -> FloatArray:
    """Products in closed form between power functions and points, by quadrature where others are."""
    of_rows, of_columns = power_mask(rows), power_mask(columns)
    if of_rows.all() and of_columns.all():
        return closed(rows, columns)
    products = np.empty((len(rows), len(columns)))
    for row_kind in (True, False):
        for column_kind in (True, False):
            i = np.flatnonzero(of_rows == row_kind).tolist()
            j = np.flatnonzero(of_columns == column_kind).tolist()
            if i and j:
                block = closed if row_kind and column_kind else general
                products[np.ix_(i, j)] = block([rows[k] for k in i], [columns[k] for k in j])
    return products


def _integrals(
    rows: Sequence[Profile],
    columns: Sequence[Profile],
    view: Callable[[Sequence[Profile], FloatArray], FloatArray],
) -> FloatArray:
    """Integrals of products of two views over [0, last end]."""
    nodes, weights = quadrature([*rows, *columns])
    products = np.zeros((len(rows), len(columns)))
    for part in _parts(len(nodes), len(rows) + len(columns)):
        tau = nodes[part]
        products += (view(rows, tau) * weights[part, None]).T @ view(columns, tau)
    return products


def _parts(num_nodes: int, num_profiles: int) -> Iterator[slice]:
    """Runs of nodes such that their views take 8 MB: larger ones fall out of the caches."""
    step = max(1, 2**20 // max(num_profiles, 1))
    return (slice(start, start + step) for start in range(0, num_nodes, step))


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
    return _by_kind(rows, columns, _closed_tails, lambda a, b: _integrals(a, b, tails))


def _closed_tails(rows: Sequence[Profile], columns: Sequence[Profile]) -> FloatArray:
    (a, t_a), (b, t_b) = exponents_and_times(rows), exponents_and_times(columns)
    a, t_a = a[:, None], t_a[:, None]
    m = np.minimum(t_a, t_b)
    power_a, power_b = (m / t_a) ** a, (m / t_b) ** b
    return m * (1 - power_a / (a + 1) - power_b / (b + 1) + power_a * power_b / (a + b + 1))


def displacement_products(
    rows: Sequence[Profile],
    columns: Sequence[Profile],
    horizon: float,
    precision: Precision = np.float64,
) -> FloatArray:
    """Integrals over [0, horizon] of the product of two displacements, (1 - T_a)(1 - T_b).

    Between combinations that sum to one, 1 - T and T differ by a constant that cancels, so these may
    stand in for `random_walk_products` in a constrained fit. They are what is left after removing the
    large part that all tails share (T = 1 early on): with K = 48 the coefficients gain two digits.

    Args:
        rows: profiles, (num_rows).
        columns: profiles, (num_columns).
        horizon: end of the integral, at or after every profile's end.
        precision: np.longdouble keeps the digits of the closed forms that a fit of a thousand inputs
            needs (80 bits on x86; elsewhere it may be no more than float64).

    Returns:
        Array of that precision, shape (num_rows, num_columns), in units of time.
    """

    def closed(a: Sequence[Profile], b: Sequence[Profile]) -> FloatArray:
        return _outer(partial(_closed_displacement, horizon), a, b, precision)

    def general(a: Sequence[Profile], b: Sequence[Profile]) -> FloatArray:
        end = max(profile.t for profile in (*a, *b))
        return _integrals(a, b, displacements) + (horizon - end)

    products: FloatArray = _by_kind(rows, columns, closed, general).astype(precision, copy=False)
    return products


def _closed_displacement(
    horizon: float, a: FloatArray, t_a: FloatArray, b: FloatArray, t_b: FloatArray
) -> FloatArray:
    m, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent_of_later = np.where(t_a <= t_b, b, a)
    early = m * _ratio_power(t_a, t_b, exponent_of_later)
    both = early / (a + b + 1)
    between = (later - early) / (exponent_of_later + 1)
    return both + between + (horizon - later)


def density_products(
    rows: Sequence[Profile], columns: Sequence[Profile], precision: Precision = np.float64
) -> FloatArray:
    """Integrals of the product of two densities (EDM2, Algorithm 3).

    For t_a <= t_b: (gamma_a+1)(gamma_b+1)/(gamma_a+gamma_b+1) * (t_a/t_b)^gamma_b / t_b, written with
    ratios so that nothing overflows.

    Args:
        rows: profiles, (num_rows).
        columns: profiles, (num_columns).
        precision: np.float64 or np.longdouble, as in `displacement_products`.

    Returns:
        Array of that precision, shape (num_rows, num_columns), per unit of time.

    Raises:
        InvalidProfileError: one of them has a point mass (raw or initial weights): no density.
    """
    check_density([*rows, *columns])

    def closed(a: Sequence[Profile], b: Sequence[Profile]) -> FloatArray:
        return _outer(_closed_density, a, b, precision)

    def general(a: Sequence[Profile], b: Sequence[Profile]) -> FloatArray:
        return _integrals(a, b, densities)

    products: FloatArray = _by_kind(rows, columns, closed, general).astype(precision, copy=False)
    return products


def _closed_density(a: FloatArray, t_a: FloatArray, b: FloatArray, t_b: FloatArray) -> FloatArray:
    later = np.maximum(t_a, t_b)
    gamma_of_later = np.where(t_a <= t_b, b, a) - 1
    return a * b / (a + b - 1) * _ratio_power(t_a, t_b, gamma_of_later) / later


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
    # The targets as further inputs with coefficient -1: what is equal cancels exactly.
    everything = np.vstack([coefficients, -np.eye(len(targets))])
    difference = combination([*inputs, *targets], everything, nodes, of_tails=norm == "random-walk")
    return np.sqrt(weights @ difference**2)
