"""Which stored averages to keep, of a finished run and of one that goes on.

Long averages need early files and short ones dense recent files, so neither the last ones nor evenly
spaced ones are a good choice: `choose` makes the predicted error over a range of lengths grow least
(`subset_search` says how), `keep_online` does so while the end is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from posthoc_ema.least_squares import Density, LeastSquares
from posthoc_ema.profiles import FloatArray, PowerProfile, Profile
from posthoc_ema.subset_search import Criterion, SubsetSearch

NUM_TARGETS = 24
"""Lengths in the asked range, evenly spaced in the logarithm, whose errors are weighed."""

_ONLINE_ENDS = (1.0, 1.03, 1.1, 1.3)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which averages stay, and what that does to the error.

    Attributes:
        kept: indices of the inputs that stay, rising.
        removed: indices of the others, rising.
        sigma_rels: lengths at which errors were weighed, (num_targets,).
        errors: predicted error of each from what stays, (num_targets,).
        errors_before: predicted error of each from all inputs, (num_targets,).
        size: sum of the sizes of what stays.
    """

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    sigma_rels: FloatArray
    errors: FloatArray
    errors_before: FloatArray
    size: float

    @property
    def worst(self) -> float:
        """Largest of `errors`."""
        return float(self.errors.max())


def choose(
    inputs: Sequence[Profile],
    noise: npt.ArrayLike = 0.0,
    sigma_rels_range: tuple[float, float] = (0.02, 0.25),
    *,
    keep: int | None = None,
    max_bytes: float | None = None,
    max_error: float | None = None,
    sizes: npt.ArrayLike = 1.0,
    end: float | None = None,
    criterion: Criterion = "worst",
    density: Density | None = None,
    scale: float = 1.0,
) -> Choice:
    """Choose which averages to keep so that the error over a range of lengths grows least.

    At least one of the averages that end last always stays: syntheses end at a stored time, and
    buffers come from there.

    Args:
        inputs: profiles of the stored averages, (num_inputs).
        noise: variance of the storage error of each over the scale q, as in `fit`: scalar or
            (num_inputs,), unit of time.
        sigma_rels_range: lengths that will be asked for, (low, high) in (0, 0.2887].
        keep: how many to keep, >= 1. One of `keep`, `max_bytes` and `max_error` must be given.
        max_bytes: sum of the sizes of what is kept, at most.
        max_error: worst error over the range, at most; as few as possible are kept.
        sizes: size of each, scalar or (num_inputs,), > 0.
        end: training time at which the averages will be asked for; the last end by default. Not
            before it.
        criterion: "worst" weighs the largest error over the range, "mean-log" all alike.
        density: q(tau) over the same scale as `noise`, where the weights do not move evenly.
        scale: what turns sqrt(time) into the unit of the errors: sqrt(q) over the norm of the weights for
            relative ones.

    Returns:
        The choice. It is a function of the arguments alone: no randomness, no clock.

    Raises:
        ConfigError: an argument lies outside its range, or the limit cannot be met.
        InvalidProfileError: a length lies outside the family.

    Example:
        >>> inputs = [PowerProfile(t, s) for t in range(1, 17) for s in (0.05, 0.10)]
        >>> choice = choose(inputs, sigma_rels_range=(0.03, 0.20), keep=8)
        >>> len(choice.kept), bool(choice.worst < 5e-2)
        (8, True)
    """
    last, variance = _check(inputs, noise, end)
    sized = np.broadcast_to(np.asarray(sizes, dtype=np.float64), (len(inputs),))
    if not np.all((sized > 0) & np.isfinite(sized)):
        raise ConfigError(f"sizes must be positive and finite, got {sized.min():g}.")
    if criterion not in get_args(Criterion):
        raise ConfigError(
            f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}."
        )
    sigma_rels = targets_of(sigma_rels_range)
    targets = [PowerProfile(last, float(s)) for s in sigma_rels]
    problem = LeastSquares(inputs, variance, targets, last, density)
    unit = scale * np.sqrt(last)
    everything = problem.solve(np.arange(len(inputs)))
    search = SubsetSearch(problem, criterion, sized, np.array([p.t for p in inputs]))
    if keep is not None and max_bytes is None and max_error is None:
        if keep < 1:
            raise ConfigError(f"keep must be at least 1, got {keep}.")
        kept = search.of_count(keep)
    elif max_bytes is not None and keep is None and max_error is None:
        kept = search.of_size(max_bytes)
    elif max_error is not None and keep is None and max_bytes is None:
        kept = search.of_error(max_error, unit)
    else:
        raise ConfigError("give exactly one of keep, max_bytes and max_error.")
    gone = np.setdiff1d(np.arange(len(inputs)), kept)
    return Choice(
        kept=tuple(kept.tolist()),
        removed=tuple(gone.tolist()),
        sigma_rels=sigma_rels,
        errors=unit * np.sqrt(problem.solve(kept).f),
        errors_before=unit * np.sqrt(everything.f),
        size=float(sized[kept].sum()),
    )


def _check(
    inputs: Sequence[Profile], noise: npt.ArrayLike, end: float | None
) -> tuple[float, FloatArray]:
    if not inputs:
        raise ConfigError("a choice needs at least one stored average, got none.")
    last = max(profile.t for profile in inputs)
    if end is not None and not (end >= last and np.isfinite(end)):
        raise ConfigError(
            f"end must not be before the last stored time {last:g}, got {end:g}. Leave out what is "
            "stored later."
        )
    variance = np.asarray(noise, dtype=np.float64)
    if variance.shape not in ((), (len(inputs),)):
        raise ConfigError(
            f"noise must be one number or one per input ({len(inputs)}), got shape {variance.shape}."
        )
    if not np.all((variance >= 0) & np.isfinite(variance)):
        raise ConfigError(
            f"noise must be finite and >= 0, got {variance.min():g}. It is a variance."
        )
    return float(last if end is None else end), np.broadcast_to(variance, (len(inputs),))


def targets_of(sigma_rels_range: tuple[float, float], num: int = NUM_TARGETS) -> FloatArray:
    """Lengths that stand for a range, evenly spaced in the logarithm, both ends among them.

    Raises:
        ConfigError: the range falls.
        InvalidProfileError: an end lies outside the family.
    """
    low, high = sigma_rels_range
    for sigma_rel in (low, high):
        PowerProfile(1.0, sigma_rel)  # raises outside (0, 0.2887]
    if low > high:
        raise ConfigError(f"a range of lengths must rise, got {low:g} to {high:g}.")
    if low == high:
        return np.array([low])
    return np.clip(np.geomspace(low, high, num), low, high)


def keep_online(
    inputs: Sequence[Profile],
    noise: npt.ArrayLike = 0.0,
    keep: int = 16,
    sigma_rels_range: tuple[float, float] = (0.02, 0.25),
) -> tuple[int, ...]:
    """Choose what to drop after a snapshot of a run that goes on to an unknown end.

    The end may be now or later, so the sum over the range of squared errors is weighed (as its
    logarithm) at ends 1, 1.03, 1.1 and 1.3 times the present one, where for later ends nothing is known
    but the averages of that end itself. Snapshots of the middle distance, which an end now could do
    without, are thereby kept while they are recent. Nothing depends on the interval or the unit of time.

    Args:
        inputs: profiles of the stored averages, (num_inputs).
        noise: variance of the storage error of each over the scale q, as in `fit`.
        keep: how many stay, >= 1.
        sigma_rels_range: lengths that will be asked for, (low, high).

    Returns:
        Indices of the averages to drop, rising: num_inputs - keep of them, or none. One of those that
        end last always stays.

    Raises:
        ConfigError: an argument lies outside its range.
        InvalidProfileError: a length lies outside the family.

    Example:
        >>> stored = [PowerProfile(t, 0.1) for t in (1, 2, 3, 4, 5)]
        >>> len(keep_online(stored, keep=4, sigma_rels_range=(0.05, 0.20)))
        1
    """
    now, variance = _check(inputs, noise, None)
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, got {keep}.")
    newest = [i for i, profile in enumerate(inputs) if profile.t == now]
    sigma_rels = targets_of(sigma_rels_range, NUM_TARGETS // 2)
    problems = []
    for factor in _ONLINE_ENDS if len(inputs) > keep else ():
        end = now * factor
        future = [_moved(inputs[i], end) for i in newest] if factor > 1 else []
        targets = [PowerProfile(end, float(s)) for s in sigma_rels]
        noises = np.concatenate([variance, variance[newest][: len(future)]])
        problems.append(LeastSquares([*inputs, *future], noises, targets, end, None))
    kept = list(range(len(inputs)))
    while len(kept) > keep:
        cost = np.zeros(len(kept))
        for problem in problems:
            future_rows = range(len(inputs), len(problem.gram))
            s = problem.solve(np.array([*kept, *future_rows]))
            raised = s.f + s.x**2 / np.diag(s.constrained)[:, None]
            cost += np.log(raised[: len(kept)].sum(axis=1))
        last = [k for k, i in enumerate(kept) if i in newest]
        if len(last) == 1:
            cost[last] = np.inf
        del kept[int(np.argmin(cost))]
    return tuple(sorted(set(range(len(inputs))) - set(kept)))


def _moved(profile: Profile, end: float) -> Profile:
    """The average of the same kind that a later snapshot will hold."""
    return PowerProfile(end, profile.sigma_rel) if isinstance(profile, PowerProfile) else profile
