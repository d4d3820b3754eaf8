"""Ways to spend disk on stored averages, each one function from a run to errors and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_ema import PowerProfile, fit
from posthoc_ema.diagnostics import predicted_errors, sampled_scale
from posthoc_ema.profiles import gamma_from_sigma_rel, power_update_weight

from .trajectory_codecs import (
    KEY_EVERY,
    Averages,
    FloatArray,
    Stored,
    store_deltas,
    store_plain,
    store_predicted,
)
from .trajectory_run import Trajectory, averages

TARGETS = (0.015, 0.02, 0.03, 0.04, 0.07, 0.13, 0.16, 0.20, 0.25)


@dataclass(frozen=True)
class Outcome:
    """What a method reaches at the end of the run.

    Attributes:
        errors: |reconstruction - true average| / |true average|, shape (num_targets,).
        predicted: the same as told beforehand from the stored averages; 0 where a method says nothing.
        bytes_per_weight: of all files together.
    """

    errors: FloatArray
    predicted: FloatArray
    bytes_per_weight: float


@dataclass(frozen=True)
class Run:
    """A trajectory, and the averages that methods are measured against."""

    trajectory: Trajectory

    @property
    def end(self) -> int:
        """Number of steps."""
        return len(self.trajectory)

    @property
    def wanted(self) -> list[PowerProfile]:
        """Target profiles, at the end of the run."""
        return [PowerProfile(self.end, sigma_rel) for sigma_rel in TARGETS]

    @cached_property
    def truth(self) -> FloatArray:
        """True averages, (num_targets, num_weights)."""
        return averages(self.trajectory, self.wanted)

    @cached_property
    def floor(self) -> FloatArray:
        """Relative errors of tracking the targets themselves in float32, (num_targets,)."""
        tracked = self.tracked(TARGETS, [self.end])
        return relative(np.array([tracked[s][0] for s in TARGETS], dtype=np.float64), self.truth)

    def tracked(self, sigma_rels: Sequence[float], times: Sequence[int]) -> Averages:
        """Averages as a float32 tracker has them: rounded after every step."""
        kept = {}
        for sigma_rel in sigma_rels:
            average = np.zeros(self.trajectory.shape[1], dtype=np.float32)
            gamma = float(gamma_from_sigma_rel(sigma_rel))
            shares = power_update_weight(gamma, np.arange(1, self.end + 1), 1)
            rows, wanted = [], set(times)
            for t, (share, theta) in enumerate(zip(shares, self.trajectory, strict=True), start=1):
                average += np.float32(share) * (theta - average)
                if t in wanted:
                    rows.append(average.copy())
            kept[sigma_rel] = rows
        return kept


Method = Callable[[Run, int], Outcome]
"""From a run and n to an outcome; the published procedure stores n times."""


def relative(found: FloatArray, truth: FloatArray) -> npt.NDArray[np.float64]:
    """|found - truth| / |truth| of each row."""
    return np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)


def even_times(run: Run, count: int) -> list[int]:
    """`count` even times, the last at the end of the run."""
    return [round(run.end * (i + 1) / count) for i in range(count)]


def times_that_fit(budget: float, key: float, other: float) -> int:
    """How many times fit `budget`, all in bytes per weight: a key time every KEY_EVERY, then others."""
    count, spent = 0, key
    while spent <= budget:
        count += 1
        spent += key if count % KEY_EVERY == 0 else other
    return count


def published(run: Run, n: int) -> Outcome:
    """EDM2's released procedure: density norm, (0.05, 0.10) in float16, free sum."""
    times = even_times(run, n)
    stored = store_plain(run.tracked((0.05, 0.10), times), times, "float16")
    x = fit(stored.profiles, run.wanted, norm="published").coefficients
    errors = relative(x.T @ np.array(stored.rows), run.truth)
    return Outcome(errors, np.zeros(len(errors)), stored.num_bytes / run.trajectory.shape[1])


def ours(run: Run, stored: Stored) -> Outcome:
    """Random-walk norm, with the storage noise in the fit and in the prediction."""
    rows, noise = np.array(stored.rows), np.array(stored.noise)
    scale = sampled_scale(stored.profiles, rows, noise)
    assert scale is not None
    result = fit(stored.profiles, run.wanted, noise=scale.noise_over_scale(noise))
    x = result.coefficients
    predicted = predicted_errors(stored.profiles, run.wanted, x, scale, noise)
    rms = np.sqrt(np.mean(run.truth**2, axis=1))
    errors = relative(x.T @ rows, run.truth)
    return Outcome(errors, predicted / rms, stored.num_bytes / run.trajectory.shape[1])


def deltas(sigma_rels: Sequence[float], codec: str = "delta-float16", share: float = 1.0) -> Method:
    """A delta codec at as many even times as fit `share` of the published bytes."""

    def method(run: Run, n: int) -> Outcome:
        k, each = len(sigma_rels), 2.0 if codec == "delta-float16" else 1 + 2 / 64
        times = even_times(run, times_that_fit(4 * n * share, 4 * k, each * k))
        return ours(run, store_deltas(run.tracked(sigma_rels, times), times, codec))

    return method


def plain(sigma_rels: Sequence[float], share: float = 1.0) -> Method:
    """float16 files, noise-aware random-walk fit: what the fit alone is worth."""

    def method(run: Run, n: int) -> Outcome:
        times = even_times(run, int(2 * n * share / len(sigma_rels)))
        return ours(run, store_plain(run.tracked(sigma_rels, times), times, "float16"))

    return method


def predicted(sigma_rels: Sequence[float], codecs: Sequence[str], share: float = 1.0) -> Method:
    """Differences to a prediction from the other profiles, at as many even times as fit."""

    def method(run: Run, n: int) -> Outcome:
        each = sum(2.0 if codec == "delta-float16" else 1 + 2 / 64 for codec in codecs)
        key = 4.0 + 2.0 * (len(sigma_rels) - 1)
        times = even_times(run, times_that_fit(4 * n * share, key, each))
        return ours(run, store_predicted(run.tracked(sigma_rels, times), times, codecs))

    return method
