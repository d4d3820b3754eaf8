"""Plan of a synthesis: which stored averages are combined how, before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import SnapshotNotFoundError, SynthesisError
from posthoc_ema.fitting import FitNorm, fit
from posthoc_ema.profiles import PointProfile, PowerProfile
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.store import SnapshotStore

RAW = 0.0
"""The target that stands for the raw weights: no averaging."""


@dataclass(frozen=True)
class SynthesisPlan:
    """Everything that is decided before a byte of weights is read.

    Attributes:
        sigma_rels: targets, (num_targets); `RAW` is the raw weights.
        time: training time at which all targets end.
        inputs: stored averages that are combined, (num_inputs).
        coefficients: shape (num_inputs, num_targets), columns sum to one.
        profile_error: predicted relative error of each target's profile, (num_targets): the distance
            between target and combination over the distance that averaging moves the weights.
        amplification: sum of |coefficients| of each target, (num_targets).
        norm: norm of the fit.
    """

    sigma_rels: tuple[float, ...]
    time: int
    inputs: tuple[SnapshotRecord, ...]
    coefficients: npt.NDArray[np.float64]
    profile_error: npt.NDArray[np.float64]
    amplification: npt.NDArray[np.float64]
    norm: FitNorm

    @property
    def bytes_read(self) -> int:
        """Size of the files that are read."""
        return sum(record.file_bytes for record in self.inputs)


def plan_synthesis(
    store: SnapshotStore,
    sigma_rels: Sequence[float],
    *,
    at: int | None = None,
    norm: FitNorm = "random-walk",
    noise: float = 0.0,
) -> SynthesisPlan:
    """Decide which stored averages make the wanted ones, and how well.

    Args:
        store: where the averages are.
        sigma_rels: targets in (0, 0.2887], (num_targets); `RAW` (0.0) asks for the raw weights.
        at: training time at which the targets end; any stored time, the last by default. Later
            snapshots are ignored.
        norm: norm of the fit, see `fit`.
        noise: noise term of the fit, see `fit`.

    Returns:
        The plan.

    Raises:
        InvalidProfileError: a target lies outside the family.
        SnapshotNotFoundError: the store is empty, `at` is not stored, or raw weights are not.
    """
    times = store.times
    if not times:
        raise SnapshotNotFoundError(
            f"{store.folder} holds no snapshots yet. The first one is written when training reaches "
            "the first multiple of `every`."
        )
    time = times[-1] if at is None else at
    if time not in times:
        near = sorted(sorted(times, key=lambda t: abs(t - time))[:3])
        raise SnapshotNotFoundError(
            f"--at must be a stored time, got {time}. {store.folder} holds {len(times)} times from "
            f"{times[0]} to {times[-1]} {store.clock}; the nearest are {', '.join(map(str, near))}."
        )
    targets = [PowerProfile(time, s) if s != RAW else PointProfile(time) for s in sigma_rels]
    if not targets:
        raise SynthesisError("a synthesis needs at least one sigma_rel.")
    inputs = [r for r in store.records if r.time <= time and r.sigma_rel is not None]
    coefficients = np.zeros((len(inputs), len(targets)))
    error, amplification = np.zeros(len(targets)), np.ones(len(targets))
    power = [i for i, s in enumerate(sigma_rels) if s != RAW]
    if power:
        result = fit([r.profile for r in inputs], [targets[i] for i in power], norm, noise)
        coefficients[:, power] = result.coefficients
        error[power], amplification[power] = result.relative_residual, result.amplification
    if len(power) < len(targets):
        inputs.append(_raw_record(store, time))
        raw_row = [[1.0 if s == RAW else 0.0 for s in sigma_rels]]
        coefficients = np.vstack([coefficients, raw_row])
        if not power:
            inputs, coefficients = inputs[-1:], coefficients[-1:]
    return SynthesisPlan(
        tuple(float(s) for s in sigma_rels),
        time,
        tuple(inputs),
        coefficients,
        error,
        amplification,
        norm,
    )


DOUBTFUL = 0.25
"""Profile error above which a length counts as out of reach of the stored averages."""


def out_of_reach(plan: SynthesisPlan) -> str:
    """Which targets the stored averages cannot give well, in words; empty if they all are fine."""
    doubtful = [
        f"{s:g}" for s, e in zip(plan.sigma_rels, plan.profile_error, strict=True) if e > DOUBTFUL
    ]
    if not doubtful:
        return ""
    return (
        f"sigma_rel {', '.join(doubtful)}: the {len(plan.inputs)} snapshots are too few or too far "
        f"apart for this length (profile error above {DOUBTFUL:.0%}). Snapshot more often, or ask for "
        "a length nearer to the tracked ones."
    )


def _raw_record(store: SnapshotStore, time: int) -> SnapshotRecord:
    record = store.find(time, PointProfile(time))
    if record is None:
        raw = sorted(r.time for r in store.records if isinstance(r.profile, PointProfile))
        where = f"only at {', '.join(map(str, raw))}" if raw else "at no time"
        raise SnapshotNotFoundError(
            f"{store.folder} holds the raw weights {where}, not at {time}. By default a tracker "
            "keeps those of the last snapshot."
        )
    return record
