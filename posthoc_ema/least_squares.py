"""Least squares of many targets on any subset of the stored averages.

What `fit` solves once, for those who ask about thousands of subsets: which averages to keep
(`retention`), how often to store them (`planning`). Squared errors come from the quadratic form and not
from the difference of the profiles, which is faster and has a floor: relative errors below about
1e-8 are not told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from posthoc_ema.inner_products import displacement_products
from posthoc_ema.profiles import FloatArray, Profile
from posthoc_ema.quadrature import displacements, quadrature

Density = Callable[[FloatArray], FloatArray]
IntArray = npt.NDArray[np.intp]

_RELATIVE_JITTER = 1e-11
"""Noise that every average has, over the largest diagonal element: double precision sees no less."""

FLOOR = 1e-16
"""Smallest squared error, in units of the end time: below it is rounding."""


class LeastSquares:
    """The problem of `fit` (random-walk norm), in units of the end time, for subsets of its inputs.

    Args:
        inputs: profiles of the stored averages, (num_inputs).
        noise: variance of their storage errors over the scale q, (num_inputs,), unit of time.
        targets: profiles that are wanted, (num_targets).
        end: training time that serves as the unit; not before any end.
        density: q(tau) over the scale of `noise`; 1 by default.

    Attributes:
        gram: inner products of the inputs, noise included, shape (num_inputs, num_inputs).
        products: inner products of inputs and targets, shape (num_inputs, num_targets).
        squares: squared norms of the targets, shape (num_targets,).

    Example:
        >>> from posthoc_ema import PowerProfile
        >>> stored = [PowerProfile(t, 0.1) for t in (1, 2)]
        >>> problem = LeastSquares(stored, np.zeros(2), [PowerProfile(2, 0.05)], 2.0)
        >>> problem.solve(np.array([0, 1])).x.sum(axis=0).round(9).tolist()
        [1.0]
    """

    def __init__(
        self,
        inputs: Sequence[Profile],
        noise: FloatArray,
        targets: Sequence[Profile],
        end: float,
        density: Density | None = None,
    ) -> None:
        if density is None:
            # A little later than the end, so that raw weights at the end (displacement 0) do no harm.
            horizon = end * (1 + 1e-6)
            gram = displacement_products(inputs, inputs, horizon)
            products = displacement_products(inputs, targets, horizon)
            squares = np.array([displacement_products([p], [p], horizon)[0, 0] for p in targets])
        else:
            gram, products, squares = _weighted_products(inputs, targets, density)
        self.gram = gram / end
        self.products = products / end
        self.squares = squares / end
        jitter = _RELATIVE_JITTER * float(np.diag(self.gram).max())
        self.gram[np.diag_indices(len(inputs))] += np.maximum(noise / end, jitter)

    def solve(self, kept: IntArray) -> Solution:
        """Solve with the inputs `kept`, rising indices."""
        gram, products = self.gram[np.ix_(kept, kept)], self.products[kept]
        inverse = _inverse(gram)
        u = inverse.sum(axis=1)
        constrained = inverse - np.outer(u, u) / u.sum()
        mean = u / u.sum()
        x = constrained @ products + mean[:, None]
        f = self.squares - 2 * np.sum(x * products, axis=0) + np.sum(x * (gram @ x), axis=0)
        return Solution(constrained, mean, x, np.maximum(f, FLOOR))


@dataclass(frozen=True, eq=False)
class Solution:
    """Solution on a subset.

    Attributes:
        constrained: C, the inverse of the Gram matrix on sum x = 0, shape (num_kept, num_kept).
        mean: the x with sum x = 1 that makes x'Gx least, shape (num_kept,).
        x: coefficients, shape (num_kept, num_targets).
        f: squared errors, noise included, shape (num_targets,), in units of the end time.
    """

    constrained: FloatArray
    mean: FloatArray
    x: FloatArray
    f: FloatArray


def _inverse(gram: FloatArray) -> FloatArray:
    """Inverse of a positive semi-definite matrix; what cannot be told apart gets a little noise."""
    jitter = 0.0
    for _ in range(8):
        try:
            factor = scipy.linalg.cho_factor(gram + jitter * np.eye(len(gram)), lower=True)
            inverse = scipy.linalg.cho_solve(factor, np.eye(len(gram)))
            return (inverse + inverse.T) / 2
        except np.linalg.LinAlgError:
            jitter = max(100 * jitter, _RELATIVE_JITTER * float(np.diag(gram).max()))
    raise AssertionError("a Gram matrix with 1e-2 of its diagonal added is positive definite")


def _weighted_products(
    inputs: Sequence[Profile], targets: Sequence[Profile], density: Density
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Gram matrix, products with the targets and their squares under q(tau)."""
    nodes, weights = quadrature([*inputs, *targets])
    weights = weights * density(nodes)
    num = len(inputs)
    gram, products = np.zeros((num, num)), np.zeros((num, len(targets)))
    squares = np.zeros(len(targets))
    for start in range(0, len(nodes), 2048):
        part = slice(start, start + 2048)
        view, wanted = displacements(inputs, nodes[part]), displacements(targets, nodes[part])
        weighted = view * weights[part, None]
        gram += weighted.T @ view
        products += weighted.T @ wanted
        squares += weights[part] @ wanted**2
    return (gram + gram.T) / 2, products, squares
