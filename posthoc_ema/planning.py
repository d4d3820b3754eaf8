"""Before training: what a plan of snapshots costs, how good it will be, and the cheapest good enough.

A plan is the number of steps, the interval of snapshots, the tracked lengths and the codec. Its
predicted error needs one number that only training knows, the **drift**: sqrt(q steps) / |theta|, the
distance that the weights walk over the whole run (as a random walk, EDM2's averages aside) relative to their
norm. Errors of profiles are proportional to it; storage errors of differences too, storage errors of
the weights themselves not. `DEFAULT_DRIFT` comes from measured runs (docs/how-to/plan-and-prune.md).

Pure numbers: codecs are known here by what a weight costs and how much of it is lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_ema.errors import ConfigError
from posthoc_ema.inner_products import displacement_products
from posthoc_ema.least_squares import Density, LeastSquares
from posthoc_ema.profiles import FloatArray, PowerProfile, gamma_from_sigma_rel
from posthoc_ema.retention import targets_of

DEFAULT_DRIFT = 0.3
"""Assumed walk of the weights over a run, relative to their norm: 0.28 and 0.32 in measured runs."""

DEFAULT_TIMES = 64
"""Snapshot times of a plan whose interval is not given."""

KEY_EVERY = 16
"""Files of a chain of differences; the first is stored by itself, in float32."""

_KEY_BYTES = 4.0
_FLOAT32_ROUNDING = 2.1e-4 * 2.0**-13
_MOST_TIMES = 256  # that a search tries
_FEWEST_TIMES = 4
_STRIDE = 8
_SEARCHED = ("delta-float16", "delta-int8", "float16", "bfloat16", "float32")

PROFILE_SETS: tuple[tuple[float, ...], ...] = (
    (0.05, 0.10),
    (0.05, 0.20),
    (0.03, 0.15),
    (0.03, 0.08, 0.20),
    (0.02, 0.06, 0.20),
    (0.015, 0.05, 0.20),
)
"""Tracked lengths that a search tries; the published pair first."""


@dataclass(frozen=True)
class CodecCost:
    """What a codec costs and loses.

    Attributes:
        bytes_per_weight: of a file that is no key frame.
        rounding: root mean square rounding error over the root mean square of what is rounded.
        is_delta: whether differences to the average before are rounded, or the weights.
    """

    bytes_per_weight: float
    rounding: float
    is_delta: bool


# Rounding to p significant bits loses 2.1e-4 * 2^(11 - p) of normally distributed numbers; a block of 64
# int8 with one scale loses max / 127 / sqrt(12), and the largest of 64 is about 2.5 rms.
CODEC_COSTS: dict[str, CodecCost] = {
    "float32": CodecCost(4.0, _FLOAT32_ROUNDING, False),
    "float16": CodecCost(2.0, 2.1e-4, False),
    "bfloat16": CodecCost(2.0, 1.7e-3, False),
    "delta-float16": CodecCost(2.0, 2.1e-4, True),
    "delta-int8": CodecCost(1.0 + 2.0 / 64, 6e-3, True),
}
"""Codec name -> cost."""


def codec_cost(codec: str) -> CodecCost:
    """Cost of a codec by its name.

    Raises:
        ConfigError: there is none of this name.

    Example:
        >>> codec_cost("delta-int8").bytes_per_weight
        1.03125
    """
    if codec not in CODEC_COSTS:
        raise ConfigError(f"dtype must be one of {', '.join(CODEC_COSTS)}, got {codec!r}.")
    return CODEC_COSTS[codec]


def disk_bytes(codec: str, num_times: int, num_profiles: int, parameters: float) -> float:
    """Bytes of all stored averages, the raw weights and headers not counted.

    Args:
        codec: name of the codec.
        num_times: snapshot times.
        num_profiles: averages of each time.
        parameters: averaged weights of the model.

    Example:
        >>> disk_bytes("float16", 64, 2, 50e6) / 1e9
        12.8
    """
    cost = codec_cost(codec)
    keys = math.ceil(num_times / KEY_EVERY) if cost.is_delta else 0
    per_weight = keys * _KEY_BYTES + (num_times - keys) * cost.bytes_per_weight
    return per_weight * num_profiles * parameters


def tracker_bytes(num_profiles: int, parameters: float) -> float:
    """Memory of the tracker beside the parameters: a float32 copy per tracked length."""
    return 4.0 * num_profiles * parameters


def storage_noise(
    codec: str,
    profiles: Sequence[PowerProfile],
    drift: float,
    steps: float,
    key_every: int = KEY_EVERY,
) -> FloatArray:
    """Variance of the storage error of each average, over the mean square of the weights.

    Args:
        codec: name of the codec.
        profiles: stored averages, (num_profiles); those of one length form a chain of differences.
        drift: walk of the weights over `steps`, relative to their norm.
        steps: length of the run, in the clock of the profiles.
        key_every: files of a chain, the key frame included.

    Returns:
        Shape (num_profiles,).

    Raises:
        ConfigError: unknown codec.

    Example:
        >>> storage_noise("float16", [PowerProfile(10, 0.1)], 0.3, 10).round(10).tolist()
        [4.41e-08]
    """
    cost = codec_cost(codec)
    if not cost.is_delta:
        return np.full(len(profiles), cost.rounding**2)
    noise = np.full(len(profiles), _FLOAT32_ROUNDING**2)
    for sigma_rel in {p.sigma_rel for p in profiles}:
        order = [i for i, p in enumerate(profiles) if p.sigma_rel == sigma_rel]
        order.sort(key=lambda i: profiles[i].t)
        for k in range(1, len(order)):
            if k % key_every:
                before, now = profiles[order[k - 1]], profiles[order[k]]
                moved = drift**2 * _squared_distance(before, now) / steps
                noise[order[k]] += cost.rounding**2 * moved
    return noise


def _squared_distance(a: PowerProfile, b: PowerProfile) -> float:
    """Integral of (T_a - T_b)^2."""
    gram = displacement_products([a, b], [a, b], max(a.t, b.t))
    return float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])


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
    codec: str = "delta-float16",
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
    num_times = steps // every
    end = num_times * every
    inputs = [PowerProfile(every * k, s) for k in range(1, num_times + 1) for s in tracked]
    targets = [PowerProfile(end, float(s)) for s in sigma_rels]
    noise = storage_noise(codec, inputs, drift, steps)
    q = drift**2 / steps  # per unit of time, over the mean square of the weights
    problem = LeastSquares(inputs, noise / q, targets, end, density)
    f = problem.solve(np.arange(len(inputs))).f
    return Plan(
        steps=steps,
        every=every,
        num_times=num_times,
        tracked=tuple(float(s) for s in tracked),
        codec=codec,
        parameters=parameters,
        drift=drift,
        sigma_rels=np.array([float(s) for s in sigma_rels]),
        errors=np.sqrt(q * end * f),
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
            "training over their norm; 0.3 is common."
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
