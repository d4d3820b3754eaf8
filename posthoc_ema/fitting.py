"""Coefficients that combine stored averages into a wanted one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import scipy.linalg

from posthoc_ema.errors import ConfigError, PhemaWarning, SynthesisError
from posthoc_ema.inner_products import (
    Norm,
    density_products,
    displacement_products,
    residual_norms,
)
from posthoc_ema.profiles import FloatArray, Profile

FitNorm = Literal["random-walk", "density", "published"]

_ROUNDS = 12
"""Rounds of refinement at most; a condition of 1e12 needs about five."""


@dataclass(frozen=True)
class Fit:
    """Result of `fit`: how to combine the inputs, and how good the combination is.

    Attributes:
        coefficients: shape (num_inputs, num_targets); every column sums to one.
        residual: distance of each target profile from its combination, shape (num_targets,), in the
            fit's norm, without the noise term.
        relative_residual: `residual` over the norm of the target's distance from the raw weights
            (random-walk) or of the target itself (density); 0 is exact. Shape (num_targets,).
        amplification: sum of |coefficients|, shape (num_targets,): how much storage errors can grow.
        norm: the norm that was asked for.
        noise_norm: sqrt(sum noise_i x_i^2), shape (num_targets,), in the unit of `residual`: what storage
            adds. sqrt(q (residual^2 + noise_norm^2)) is the expected error for a constant scale q.
    """

    coefficients: FloatArray
    residual: FloatArray
    relative_residual: FloatArray
    amplification: FloatArray
    norm: FitNorm
    noise_norm: FloatArray


def fit(
    inputs: Sequence[Profile],
    targets: Sequence[Profile],
    norm: FitNorm = "random-walk",
    noise: npt.ArrayLike = 0.0,
) -> Fit:
    """Least-squares coefficients x with sum x_i = 1 such that sum x_i input_i is close to each target.

    Minimises the integral of (T - sum x_i T_i)^2 + sum noise_i x_i^2 over tails (`"random-walk"`, the
    default: training moves weights by small increments) or over densities (`"density"`, EDM2
    Algorithm 3 with the sum constraint inside the solve). `"published"` is the procedure of EDM2 as
    released: density norm, free sum divided away afterwards, no noise.

    Args:
        inputs: profiles of the stored averages, (num_inputs), at least one.
        targets: profiles that are wanted, (num_targets), at least one.
        norm: "random-walk", "density" or "published".
        noise: variance s_i^2 of the storage error of each input over the scale q of the norm, scalar
            or shape (num_inputs,), >= 0. Unit: time for the random walk, 1/time for the density.

    Returns:
        A `Fit`.

    Raises:
        SynthesisError: no inputs or no targets.
        ConfigError: unknown norm, negative or non-finite noise, noise with norm="published".

    Example:
        >>> from posthoc_ema import PowerProfile
        >>> inputs = [PowerProfile(t, s) for t in (500, 1000) for s in (0.05, 0.10)]
        >>> result = fit(inputs, [PowerProfile(1000, 0.10)])
        >>> result.coefficients[-1].round(6).tolist()  # the stored average itself
        [1.0]
    """
    if not inputs or not targets:
        raise SynthesisError(
            f"a fit needs at least one input and one target, got {len(inputs)} and {len(targets)}."
        )
    if norm not in get_args(FitNorm):
        raise ConfigError(f"norm must be one of {', '.join(get_args(FitNorm))}, got {norm!r}.")
    noise = np.asarray(noise, dtype=np.float64)
    if noise.shape not in ((), (len(inputs),)):
        raise ConfigError(
            f"noise must be one number or one per input ({len(inputs)}), got shape {noise.shape}."
        )
    noise = np.broadcast_to(noise, (len(inputs),))
    if not np.all((noise >= 0) & np.isfinite(noise)):
        raise ConfigError(f"noise must be finite and >= 0, got {noise.min():g}. It is a variance.")
    if norm == "published" and noise.any():
        raise ConfigError(
            "norm='published' knows no noise term; use norm='density' or 'random-walk' with noise."
        )
    metric: Norm = "random-walk" if norm == "random-walk" else "density"
    if metric == "random-walk":
        # Any horizon at or after the last end will do; a little later keeps the raw weights at the
        # last time (displacement 0) from making the system singular.
        horizon = max(p.t for p in (*inputs, *targets)) * (1 + 1e-6)
        gram = displacement_products(inputs, inputs, horizon, np.longdouble)
        products = displacement_products(inputs, targets, horizon, np.longdouble)
    else:
        gram = density_products(inputs, inputs, np.longdouble)
        products = density_products(inputs, targets, np.longdouble)
    gram[np.diag_indices_from(gram)] += noise
    x = _solve_free(gram, products) if norm == "published" else _solve(gram, products)
    residual = residual_norms(inputs, targets, x, metric)
    return Fit(
        coefficients=x,
        residual=residual,
        relative_residual=residual / _target_scale(targets, metric),
        amplification=np.abs(x).sum(axis=0),
        norm=norm,
        noise_norm=np.sqrt(noise @ x**2),
    )


def _target_scale(targets: Sequence[Profile], norm: Norm) -> FloatArray:
    """What a residual is measured against, shape (num_targets,).

    Density: the norm of the target. Random walk: the distance from the raw weights at the target's
    end, sqrt of the integral of (1 - T)^2 over [0, t]: how far averaging moves the weights at all.
    """
    if norm == "density":
        norms = np.array([density_products([p], [p])[0, 0] for p in targets])
        return np.sqrt(norms)
    squared = np.array([displacement_products([p], [p], p.t)[0, 0] for p in targets])
    t = np.array([p.t for p in targets])
    return np.sqrt(
        np.where(squared > 0, squared, t)
    )  # the raw weights themselves: against all of t


class _Factor:
    """Solves gram @ x = b for a positive semi-definite gram, scaled to a unit diagonal.

    The factor is float64, the gram extended: refinement against it gives coefficients that are as good
    as the gram's digits. In float64 alone a thousand inputs with a noise of 1e-8 are right to 1e-5 only.
    """

    def __init__(self, gram: FloatArray) -> None:
        diagonal = np.diag(gram).astype(np.float64)
        self.scale = 1 / np.sqrt(diagonal)
        self.gram = gram * self.scale
        self.gram *= self.scale[:, None]
        scaled = self.gram.astype(np.float64)
        self.inverse: FloatArray | None = None
        self.cholesky: FloatArray | None = None
        try:
            self.cholesky = scipy.linalg.cholesky(scaled, lower=True)
            diagonal = np.diag(self.cholesky)
            hopeless = diagonal.min() < 1e-7 * diagonal.max()  # squared: condition beyond ~1e14
        except np.linalg.LinAlgError:
            hopeless = True
        if hopeless:
            self._truncate(scaled)

    def _truncate(self, scaled: FloatArray) -> None:
        """Pseudo-inverse on the directions that double precision can tell apart."""
        values, vectors = scipy.linalg.eigh(scaled)
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1] * 16
        warnings.warn(
            f"these {len(values)} stored averages can hardly be told apart (condition above "
            f"{values[-1] / max(float(values[kept].min()), 1e-300):.0e}): "
            f"{int((~kept).sum())} directions are left out of the fit. Equal or nearly equal times "
            "are the usual cause; pass noise > 0 to say how exactly they are stored.",
            PhemaWarning,
            stacklevel=6,
        )
        self.inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T

    def solve(self, b: FloatArray) -> FloatArray:
        """Solution for right-hand sides of shape (num_inputs, num_columns)."""
        b = b * self.scale[:, None]
        x: FloatArray = self._apply(b).astype(np.longdouble)
        last = np.inf
        # Each round gains the digits that the condition leaves to the factor. A pseudo-inverse gets
        # one: what it has left out does not come back.
        for _ in range(_ROUNDS if self.inverse is None else 1):
            step = self._apply(b - self.gram @ x)
            size = float(np.abs(step).max(initial=0.0))
            if size >= last / 2:
                break
            x += step
            if size <= 1e-11 * float(np.abs(x).max()):  # the next would be below 1e-14
                break
            last = size
        return x * self.scale[:, None]

    def _apply(self, b: FloatArray) -> FloatArray:
        b = b.astype(np.float64)
        if self.inverse is not None:
            return self.inverse @ b
        assert self.cholesky is not None
        solution: FloatArray = scipy.linalg.cho_solve((self.cholesky, True), b)
        return solution


def _solve(gram: FloatArray, products: FloatArray) -> FloatArray:
    """Minimum of x' gram x - 2 x' products under sum x = 1: one Lagrange multiplier per target."""
    factor = _Factor(gram)
    ones = np.ones((len(gram), 1))
    free, u = np.split(factor.solve(np.hstack([products, ones])), [-1], axis=1)
    x = free - u * ((free.sum(axis=0) - 1) / u.sum())
    x = (x / x.sum(axis=0)).astype(np.float64)
    return x / x.sum(axis=0)  # removes the last rounding of the sum


def _solve_free(gram: FloatArray, products: FloatArray) -> FloatArray:
    """Unconstrained minimum, divided by its sum: what EDM2's released tool does."""
    x = _Factor(gram).solve(products)
    total = x.sum(axis=0)
    if not np.all(np.abs(total) > 1e-200):
        raise SynthesisError(
            "norm='published' cannot make a target that has no share in the time of the inputs: its "
            "free coefficients are all 0. Use norm='random-walk' or 'density'."
        )
    return (x / total).astype(np.float64)
