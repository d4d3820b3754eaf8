"""Profiles that are no power functions: what other tools average, as inputs and as targets.

- `UniformProfile`: the mean over a window (SWA, LAWA, a mean of the last checkpoints);
- `ExponentialProfile`: the classical EMA, with or without the usual warm-up of its decay;
- `TabulatedProfile`: anything else, by the values of its tail.

Some of them keep a share of the **initial weights**, a point mass at time 0. Their tail starts below 1
there; the random-walk norm handles it, the density norm cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import FloatArray

_WARMUP_ORDER = np.arange(2, 11)
"""Factors of the warm-up: prod_{k=j+1..n} (1+k)/(10+k) = prod_{i=2..10} (j+i)/(n+i)."""


@dataclass(frozen=True)
class UniformProfile:
    """The plain mean over a window of training.

    Args:
        start: begin of the window, in the run's clock, >= 0.
        end: its end, > start.

    Raises:
        InvalidProfileError: the window is empty, or starts before 0.

    Example:
        >>> UniformProfile(start=60, end=100).tail([0, 60, 80, 100]).tolist()
        [1.0, 1.0, 0.5, 0.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end and math.isfinite(self.end)):
            raise InvalidProfileError(
                f"a window needs 0 <= start < end, got start = {self.start!r} and end = "
                f"{self.end!r}. For the weights of one moment use PointProfile."
            )

    @property
    def t(self) -> float:
        """End of the window."""
        return self.end

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau), 1/(end - start) inside the window, 0 outside."""
        tau = np.asarray(tau, dtype=np.float64)
        inside = (tau >= self.start) & (tau <= self.end)
        return np.where(inside, 1 / (self.end - self.start), 0.0)

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau): 1 before the window, falling linearly to 0 at its end."""
        left = (self.end - np.asarray(tau, dtype=np.float64)) / (self.end - self.start)
        return np.clip(left, 0.0, 1.0)


@dataclass(frozen=True)
class ExponentialProfile:
    """The classical EMA: theta_hat <- beta theta_hat + (1 - beta) theta, beta = 2^(-interval/half_life).

    The tail is exact at the times of the updates and smooth between. An average that was started from a
    copy of the initial weights keeps 2^(-t/half_life) of them: `initial_share`.

    With `warmup` the decay of update k = 1, 2, ... is min(beta, (1+k)/(10+k)), as in TensorFlow and most
    libraries since. (Some count from 0, or copy at the first update; after some tens of updates that
    is forgotten: the warm-up averages like tau^8.) The interval matters only here: it says how many
    updates t is.

    Args:
        t: end of the profile, in the run's clock, > 0; the first update was at `interval`.
        half_life: training time in which an old share halves, in the run's clock, > 0.
        interval: training time between two updates, > 0.
        warmup: whether the decay was limited to (1+k)/(10+k).

    Raises:
        InvalidProfileError: a time is not positive and finite.

    Example:
        >>> ExponentialProfile(t=1000, half_life=100).tail([800, 900, 1000]).tolist()
        [0.75, 0.5, 0.0]
    """

    t: float
    half_life: float
    interval: float = 1.0
    warmup: bool = False

    def __post_init__(self) -> None:
        for name in ("t", "half_life", "interval"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidProfileError(
                    f"{name} must be a positive, finite training time, got {value!r}."
                )
        if self.warmup and self.interval > self.t:
            raise InvalidProfileError(
                f"interval must not exceed t, got {self.interval!r} and {self.t!r}: no update "
                "would have taken place."
            )

    @classmethod
    def from_beta(
        cls, t: float, beta: float, interval: float = 1.0, *, warmup: bool = False
    ) -> ExponentialProfile:
        """The profile of an EMA with decay `beta` per update.

        Args:
            t: end of the profile, in the run's clock.
            beta: decay of one update, in (0, 1).
            interval: training time between two updates.
            warmup: whether the decay was limited to (1+k)/(10+k).

        Returns:
            The profile, its half-life being -interval ln 2 / ln(beta).

        Raises:
            InvalidProfileError: beta lies outside (0, 1), or a time is not positive.

        Example:
            >>> round(ExponentialProfile.from_beta(t=10**6, beta=0.9999).half_life)
            6931
        """
        if not 0 < beta < 1:
            raise InvalidProfileError(
                f"beta must lie in (0, 1), got {beta!r}. It is the share that one update keeps, "
                "for example 0.9999."
            )
        return cls(t, -interval * math.log(2) / math.log(beta), interval, warmup)

    @property
    def rate(self) -> float:
        """Decay per unit of time, ln 2 / half_life."""
        return math.log(2) / self.half_life

    @property
    def warmup_end(self) -> float:
        """Training time from which the decay is constant; 0 without warm-up.

        The last k with (1+k)/(10+k) <= beta is floor((10 beta - 1)/(1 - beta)).
        """
        if not self.warmup:
            return 0.0
        keep = math.exp(-self.rate * self.interval)
        lost = -math.expm1(-self.rate * self.interval)
        return min(max(math.floor((10 * keep - 1) / lost), 0) * self.interval, self.t)

    @property
    def initial_share(self) -> float:
        """Weight of the initial weights."""
        return float(self._kept(np.zeros(1))[0])

    def _kept(self, tau: FloatArray) -> FloatArray:
        """Share that had been gathered by `tau` and is left at t, 1 - T."""
        switch = self.warmup_end
        late = np.exp(-self.rate * (self.t - np.clip(tau, switch, self.t)))
        if switch == 0:
            return late
        j, n = np.clip(tau, 0.0, switch)[..., None] / self.interval, switch / self.interval
        early: FloatArray = np.prod((j + _WARMUP_ORDER) / (n + _WARMUP_ORDER), axis=-1)
        return late * early

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau) of the part that is not on the initial weights, per unit of time; 0 outside [0, t]."""
        tau = np.asarray(tau, dtype=np.float64)
        inside = (tau >= 0) & (tau <= self.t)
        rate = np.full(tau.shape, self.rate)
        j = np.clip(tau, 0.0, None)[..., None] / self.interval
        warm = np.sum(1 / (j + _WARMUP_ORDER), axis=-1) / self.interval  # derivative of log(1 - T)
        rate = np.where(tau < self.warmup_end, warm, rate)
        return np.where(inside, rate * self._kept(tau), 0.0)

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau) = 1 - 2^(-(t-tau)/half_life) without warm-up; 1 before time 0, 0 from t on."""
        tau = np.asarray(tau, dtype=np.float64)
        return np.where(tau < 0, 1.0, 1.0 - self._kept(tau))


@dataclass(frozen=True)
class TabulatedProfile:
    """Any profile, by its tail at given times and linear between them.

    Args:
        times: training times, >= 0, strictly rising; the last is the end of the profile.
        tails: share of the profile after each of them, in [0, 1], falling, 0 at the last. If the
            first is below 1, the rest lies on the initial weights.

    Raises:
        InvalidProfileError: the table is too short, not monotone or not a share.

    Example:
        >>> profile = TabulatedProfile(times=(0, 50, 100), tails=(1.0, 0.8, 0.0))
        >>> profile.tail([25, 75]).tolist()
        [0.9, 0.4]
    """

    times: tuple[float, ...]
    tails: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(v) for v in self.times))
        object.__setattr__(self, "tails", tuple(float(v) for v in self.tails))
        times, tails = np.array(self.times), np.array(self.tails)
        if len(times) < 2 or len(times) != len(tails):
            raise InvalidProfileError(
                f"a table needs at least two times and one tail for each, got {len(times)} and "
                f"{len(tails)}."
            )
        if not (times[0] >= 0 and np.all(np.diff(times) > 0) and np.isfinite(times[-1])):
            raise InvalidProfileError(
                "the times of a table must be >= 0, finite and strictly rising. For a jump put two "
                "times close together."
            )
        if not (0 < tails[0] <= 1 and tails[-1] == 0 and np.all(np.diff(tails) <= 0)):
            raise InvalidProfileError(
                "the tails of a table must fall from at most 1 to 0: each is the share of the "
                "profile that lies after its time."
            )

    @classmethod
    def from_weights(cls, times: Sequence[float], weights: Sequence[float]) -> TabulatedProfile:
        """The profile of an explicit weighted mean of the weights after each update.

        The weights of the network are taken as constant over the interval that ends with an update.

        Args:
            times: training time after each update, positive, strictly rising.
            weights: what each counts, >= 0, their sum at most 1; the rest is on the initial weights.

        Returns:
            The profile; it ends with the last update that counts.

        Raises:
            InvalidProfileError: a weight is negative, or their sum exceeds 1.

        Example:
            >>> TabulatedProfile.from_weights(times=(10, 20, 30), weights=(0.0, 0.25, 0.75)).tails
            (1.0, 1.0, 0.75, 0.0)
        """
        w = np.asarray(weights, dtype=np.float64)
        if len(w) != len(times) or not np.all(w >= 0) or not 0 < w.sum() <= 1 + 1e-9:
            raise InvalidProfileError(
                f"weights must be >= 0, one per time, with a sum in (0, 1], got {len(w)} for "
                f"{len(times)} times with sum {w.sum():g}."
            )
        last = int(np.flatnonzero(w)[-1]) + 1
        after = np.append(np.cumsum(w[:last][::-1])[::-1], 0.0)
        return cls((0.0, *times[:last]), tuple(np.minimum(after, 1.0)))

    @property
    def t(self) -> float:
        """Last time of the table."""
        return self.times[-1]

    @property
    def initial_share(self) -> float:
        """Weight of the initial weights, 1 - tails[0]."""
        return 1.0 - self.tails[0]

    def density(self, tau: npt.ArrayLike) -> FloatArray:
        """p(tau), constant between the times of the table, per unit of time."""
        tau = np.asarray(tau, dtype=np.float64)
        slopes = -np.diff(self.tails) / np.diff(self.times)
        cell = np.searchsorted(self.times, tau, side="right") - 1
        inside = (cell >= 0) & (cell < len(slopes))
        return np.where(inside, slopes[np.clip(cell, 0, len(slopes) - 1)], 0.0)

    def tail(self, tau: npt.ArrayLike) -> FloatArray:
        """T(tau) by linear interpolation; 1 before time 0, 0 from t on."""
        tau = np.asarray(tau, dtype=np.float64)
        return np.where(tau < 0, 1.0, np.interp(tau, self.times, self.tails))
