"""The few statistics that studies need: the best length of a curve, exponents, bands over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_ema import ConfigError


@dataclass(frozen=True, slots=True)
class Optimum:
    """The lowest point of a curve over lengths.

    Attributes:
        sigma_rel: where it lies.
        value: how low it is.
        inside: False if it is an end of the measured range, so that the true one may lie beyond.
    """

    sigma_rel: float
    value: float
    inside: bool


def optimum(sigma_rels: Sequence[float], values: Sequence[float]) -> Optimum:
    """Vertex of the parabola in ln sigma_rel through the lowest point and its two neighbours.

    Args:
        sigma_rels: lengths, rising, positive, at least 3.
        values: what was measured, the lower the better.

    Raises:
        ConfigError: there are fewer than 3 lengths or not as many values.

    Example:
        >>> found = optimum([0.025, 0.05, 0.1, 0.2], [3.0, 2.0, 2.0, 3.0])
        >>> round(found.sigma_rel, 4), round(found.value, 3), found.inside
        (0.0707, 1.875, True)
    """
    if len(sigma_rels) < 3 or len(values) != len(sigma_rels):
        raise ConfigError(
            f"an optimum needs at least 3 lengths and one value for each, got {len(sigma_rels)} "
            f"lengths and {len(values)} values."
        )
    i = int(np.argmin(values))
    if i in (0, len(values) - 1):
        return Optimum(sigma_rels[i], values[i], False)
    a, b, c = np.log(sigma_rels[i - 1 : i + 2])
    ya, yb, yc = values[i - 1 : i + 2]
    left, right = (b - a) * (yc - yb), (c - b) * (ya - yb)  # both at least 0
    if left + right <= 0:  # three equal values
        return Optimum(sigma_rels[i], yb, True)
    x = b + ((c - b) * right - (b - a) * left) / (2 * (left + right))
    # Lagrange's form of the parabola.
    y = (
        ya * (x - b) * (x - c) / ((a - b) * (a - c))
        + yb * (x - a) * (x - c) / ((b - a) * (b - c))
        + yc * (x - a) * (x - b) / ((c - a) * (c - b))
    )
    return Optimum(math.exp(x), float(y), True)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of ln y against ln x, least squares: e of y ~ x^e.

    Args:
        x: positive, at least two different values.
        y: positive, one for each.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    centred = log_x - log_x.mean()
    return float((centred * log_y).sum() / (centred**2).sum())


@dataclass(frozen=True, slots=True)
class Band:
    """What the seeds gave: lowest, median, highest."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Band:
        """The band of at least one value.

        Example:
            >>> Band.of([3.0, 1.0, 2.0])
            Band(low=1.0, middle=2.0, high=3.0)
        """
        return cls(min(values), statistics.median(values), max(values))

    def text(self, digits: int = 3) -> str:
        """For a table: `0.31 (0.29 to 0.35)`."""
        low, middle, high = (f"{v:.{digits}g}" for v in (self.low, self.middle, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"
