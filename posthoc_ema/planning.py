"""Before training: what a plan of snapshots costs, how good it will be, and the cheapest good enough.

A plan is the number of steps, the interval of snapshots, the tracked lengths and the codec. Its
predicted error needs one number that only training knows, the **drift**: sqrt(q steps) / |theta|, the
distance that the weights walk over the whole run (as a random walk, EDM2's averages aside) relative to their
norm. Errors of profiles are proportional to it; storage errors of differences too, storage errors of
the weights themselves not. `DEFAULT_DRIFT` comes from measured runs (docs/how-to/plan-and-prune.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_ema.errors import ConfigError
from posthoc_ema.fitting import fit
from posthoc_ema.inner_products import residual_norms
from posthoc_ema.least_squares import Density
from posthoc_ema.profiles import FloatArray, PowerProfile, gamma_from_sigma_rel
from posthoc_ema.retention import targets_of
from posthoc_ema.storage_costs import codec_files, disk_bytes, storage_noise, tracker_bytes

DEFAULT_DRIFT = 0.4
"""Assumed walk of the weights over a run, relative to their norm: 0.28 to 0.52 in measured runs."""

DEFAULT_TIMES = 64
"""Snapshot times of a plan whose interval is not given."""

_MOST_TIMES = 256  # that a search tries
_FEWEST_TIMES = 4
_STRIDE = 8
_SEARCHED = ("delta", "delta-float16", "delta-int8", "float16", "bfloat16", "float32")

PROFILE_SETS: tuple[tuple[float, ...], ...] = (
    (0.04, 0.15),
    (0.05, 0.10),
    (0.05, 0.20),
    (0.03, 0.15),
    (0.03, 0.08, 0.20),
    (0.02, 0.06, 0.20),
    (0.015, 0.05, 0.20),
)
"""Tracked lengths that a search tries: the default of the tracker, the published pair, and others."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Snapshots of a run before it starts, and what they cost and give.

    Attributes:
        steps: length of the run, in its clock.
        every: interval of snapshots, in the same clock.
        num_times: snapshots that the run takes.
        tracked: tracked lengths.
        codec: how averages are stored.
        parameters: averaged weights of the model.
        drift: assumed walk of the weights over the run, relative to their norm.
        sigma_rels: lengths for which the error is predicted, (num_targets,).
        errors: predicted error of each at the last snapshot, over the norm of the weights.
        disk: bytes of all stored averages.
        memory: bytes of the tracker.
    """

    steps: int
    every: int
    num_times: int
    tracked: tuple[float, ...]
    codec: str
    parameters: float
    drift: float
    sigma_rels: FloatArray
    errors: FloatArray
    disk: float
    memory: float

    @property
    def num_files(self) -> int:
        """Stored averages at the end of the run."""
        return self.num_times * len(self.tracked)

    @property
    def worst(self) -> float:
        """Largest of `errors`."""
        return float(self.errors.max())


def make_plan(
    steps: int,
    every: int,
    tracked: Sequence[float],
    parameters: float,
    *,
    codec: str = "delta",
    sigma_rels: Sequence[float] | FloatArray = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25),
    drift: float = DEFAULT_DRIFT,
    density: Density | None = None,
) -> Plan:
    """Predict cost and error of a plan.

    Args:
        steps: length of the run in its clock (steps or images), > 0.
        every: interval of snapshots in the same clock, 1 to `steps`; a last piece shorter than that
            gets none.
        tracked: lengths to track, at least one.
        parameters: averaged weights of the model, > 0.
        codec: how averages are stored.
        sigma_rels: lengths for which the error is predicted.
        drift: walk of the weights over the run, relative to their norm, > 0.
        density: how the walk is spread over the run, q(tau) over its typical value; even by default.

    Returns:
        The plan.

    Raises:
        ConfigError: an argument lies outside its range.
        InvalidProfileError: a length lies outside the family.

    Example:
        >>> plan = make_plan(100_000, 2_000, (0.05, 0.10), 1e9, codec="float16")
        >>> plan.num_files, plan.disk / 1e9, plan.memory / 1e9
        (100, 200.0, 8.0)
    """
    _check_plan(steps, every, tracked, parameters, drift)
    codec_files(codec)  # raises for an unknown one
    num_times = steps // every
    end = num_times * every
    targets = [PowerProfile(end, float(s)) for s in sigma_rels]
    times = [every * k for k in range(1, num_times + 1)]
    inputs = [PowerProfile(t, s) for t in times for s in tracked]
    noise = storage_noise(codec, times, tracked, drift, steps).ravel()
    q = drift**2 / steps  # per unit of time, over the mean square of the weights
    # A touch of noise, far below any storage, keeps averages that are nearly equal apart.
    found = fit(inputs, targets, noise=np.maximum(noise / q, 1e-10 * end))
    missed = residual_norms(inputs, targets, found.coefficients, "random-walk", density)
    errors = np.sqrt(q * missed**2 + noise @ found.coefficients**2)
    return Plan(
        steps=steps,
        every=every,
        num_times=num_times,
        tracked=tuple(float(s) for s in tracked),
        codec=codec,
        parameters=parameters,
        drift=drift,
        sigma_rels=np.array([float(s) for s in sigma_rels]),
        errors=errors,
        disk=disk_bytes(codec, num_times, len(tracked), parameters),
        memory=tracker_bytes(len(tracked), parameters),
    )


def _check_plan(
    steps: int, every: int, tracked: Sequence[float], parameters: float, drift: float
) -> None:
    if not 1 <= every <= steps:
        raise ConfigError(
            f"every must be 1 to the {steps} steps of the run, got {every}. A snapshot is taken each "
            "time that training reaches a multiple of it."
        )
    if not tracked:
        raise ConfigError("a plan needs at least one tracked sigma_rel, for example 0.05,0.10.")
    gamma_from_sigma_rel(list(tracked))  # raises outside (0, 0.2887]
    if len(set(tracked)) < len(tracked):
        raise ConfigError("the tracked sigma_rels must differ from each other.")
    if steps // every * len(tracked) > 4096:
        raise ConfigError(
            f"{steps // every} snapshots of {len(tracked)} averages are more than the 4096 that a plan "
            "holds; take a larger every."
        )
    if not (parameters > 0 and math.isfinite(parameters)):
        raise ConfigError(f"parameters must be positive, got {parameters:g}.")
    if not (drift > 0 and math.isfinite(drift)):
        raise ConfigError(
            f"drift must be positive, got {drift:g}. It is the distance that the weights walk during "
            "training over their norm; 0.3 to 0.5 is common."
        )


def cheapest_plan(
    steps: int,
    parameters: float,
    max_error: float,
    sigma_rels_range: tuple[float, float],
    *,
    tracked: Sequence[float] | None = None,
    codec: str | None = None,
    drift: float = DEFAULT_DRIFT,
    density: Density | None = None,
) -> Plan:
    """The plan with the least disk whose worst error over a range of lengths is small enough.

    Tries all codecs and the sets of `PROFILE_SETS`, unless told which, each with the widest interval
    that reaches the error, between 4 and 256 snapshot times. Of equally cheap ones, the one with less
    memory.

    Args:
        steps: length of the run in its clock.
        parameters: averaged weights of the model.
        max_error: largest predicted error over the range, over the norm of the weights, > 0.
        sigma_rels_range: lengths that will be asked for, (low, high).
        tracked: lengths to track, if they are given.
        codec: codec, if it is given.
        drift: see `make_plan`.
        density: see `make_plan`.

    Returns:
        The plan; its errors are those of 24 lengths over the range.

    Raises:
        ConfigError: no plan reaches the error, or an argument lies outside its range.

    Example:
        >>> plan = cheapest_plan(10_000, 1e6, 1e-2, (0.05, 0.20), codec="float16")
        >>> bool(plan.worst <= 1e-2), plan.codec
        (True, 'float16')
    """
    if not max_error > 0:
        raise ConfigError(f"error must be positive, got {max_error:g}.")
    sigma_rels = targets_of(sigma_rels_range)
    best: Plan | None = None
    closest = math.inf
    for lengths in PROFILE_SETS if tracked is None else (tuple(tracked),):

        def plan_of(every: int, name: str, lengths: Sequence[float] = lengths) -> Plan:
            return make_plan(
                steps,
                every,
                lengths,
                parameters,
                codec=name,
                sigma_rels=sigma_rels,
                drift=drift,
                density=density,
            )

        exact = plan_of(_intervals(steps)[-1], "float32").worst
        closest = min(closest, exact)
        for name in _SEARCHED if codec is None else (codec,):
            if exact > max_error:  # no other codec is better
                break
            affordable = [
                every
                for every in _intervals(steps)
                if best is None
                or disk_bytes(name, steps // every, len(lengths), parameters) <= best.disk
            ]
            plan, error = _widest(affordable, functools.partial(plan_of, name=name), max_error)
            closest = min(closest, error)
            if plan and (best is None or (plan.disk, plan.memory) < (best.disk, best.memory)):
                best = plan
    if best is None:
        raise ConfigError(
            f"no plan of up to {steps // _intervals(steps)[-1]} snapshots reaches an error of "
            f"{max_error:g} over [{sigma_rels_range[0]:g}, {sigma_rels_range[1]:g}]; the best one has "
            f"{closest:.1e}. Allow a larger error, a narrower range, other lengths or another dtype."
        )
    return best


def _intervals(steps: int) -> list[int]:
    """Intervals that a search tries, falling: about a tenth more snapshots from one to the next."""
    counts = np.unique(np.round(np.geomspace(_FEWEST_TIMES, _MOST_TIMES, 45)).astype(int))
    return sorted({steps // int(n) for n in counts if n <= steps} or {1}, reverse=True)


def _widest(
    intervals: Sequence[int], plan_of: Callable[[int], Plan], max_error: float
) -> tuple[Plan | None, float]:
    """Plan with the widest interval that is good enough, or None; and the least error seen.

    Goes up in strides and halves the last one: plans of many snapshots take longest to judge.
    """
    least = math.inf
    for low in range(0, len(intervals), _STRIDE):
        high = min(low + _STRIDE, len(intervals)) - 1
        found = plan_of(intervals[high])
        least = min(least, found.worst)
        if found.worst <= max_error:
            break
    else:
        return None, least
    while low < high:
        middle = (low + high) // 2
        plan = plan_of(intervals[middle])
        if plan.worst <= max_error:
            found, high = plan, middle
        else:
            low = middle + 1
    return found, least
