"""Pruning a store, and planning by an earlier one: what its files show decides what is worth keeping.

The choice is made by `retention.choose` with the scale and the storage noise that the store itself shows.
In a store of differences, removing an average has those that stand on it written anew as differences
to what is left (or by themselves); what that adds in bytes and noise is estimated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from posthoc_ema.chains import choose_bases, rewritten_dtype
from posthoc_ema.diagnostics import Scale, predicted_errors
from posthoc_ema.errors import ConfigError, SnapshotError, SnapshotNotFoundError
from posthoc_ema.fitting import fit
from posthoc_ema.inner_products import residual_norms
from posthoc_ema.least_squares import Density
from posthoc_ema.profiles import FloatArray, PointProfile, PowerProfile
from posthoc_ema.retention import choose, targets_of
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.snapshot_folder import LONGEST_CHAIN
from posthoc_ema.storage_costs import FILE_COSTS
from posthoc_ema.store import SnapshotStore
from posthoc_ema.subset_search import Criterion
from posthoc_ema.synthesis import Measurement, measure

KeepRaw = Literal["last", "all", "none"]

_KEY_FRAME_BYTES = 4  # per weight


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What pruning would remove, and the errors before and after.

    Attributes:
        kept: records that stay, by time; raw weights among them.
        removed: records that go, by time.
        sigma_rels: lengths over the asked range and those asked for, rising, (num_targets,).
        errors_before: predicted error of each at the last time, over the norm of the weights.
        errors: the same from what stays.
        bytes_before: size of all files.
        bytes_after: expected size of those that stay, written anew where they must be.
    """

    kept: tuple[SnapshotRecord, ...]
    removed: tuple[SnapshotRecord, ...]
    sigma_rels: FloatArray
    errors_before: FloatArray
    errors: FloatArray
    bytes_before: int
    bytes_after: int


def plan_pruning(
    store: SnapshotStore,
    sigma_rels_range: tuple[float, float] = (0.02, 0.25),
    *,
    keep: int | None = None,
    max_bytes: float | None = None,
    max_error: float | None = None,
    criterion: Criterion = "worst",
    keep_raw: KeepRaw = "last",
    lengths: Sequence[float] = (),
) -> PruningPlan:
    """Choose what stays so that the predicted error over a range of lengths grows least.

    At least one average of the last time stays, so that every length can be synthesized there.

    Args:
        store: what is to be pruned; nothing is changed.
        sigma_rels_range: lengths that will be asked for, (low, high) in (0, 0.2887].
        keep: averages that stay; raw weights do not count.
        max_bytes: size of all files that stay, raw weights included.
        max_error: worst predicted error over the range, over the norm of the weights; as few averages as
            possible stay.
        criterion: "worst" or "mean-log", see `choose`.
        lengths: further lengths whose errors are reported.
        keep_raw: raw weights of which times stay: "last" (of those that are stored), "all" or "none".

    Returns:
        The plan.

    Raises:
        ConfigError: not exactly one limit, or one that cannot be met.
        SnapshotNotFoundError: the store holds no averages.
        SnapshotFormatError: a file is damaged.
        InvalidProfileError: a length lies outside the family.
    """
    averages = [r for r in store.records if not isinstance(r.profile, PointProfile)]
    if not averages:
        raise SnapshotNotFoundError(
            f"{store.folder} holds no averages, so there is nothing to prune."
        )
    raw = _raw_that_stays(store, keep_raw)
    raw_bytes = sum(r.file_bytes for r in raw)
    measurement = measure(store, averages)
    typical = measurement.scale.typical if measurement.scale else 0.0

    def chosen(count: int | None) -> tuple[list[SnapshotRecord], FloatArray, float]:
        """What stays with `count` averages (or within the error), its noise and bytes."""
        choice = choose(
            [r.profile for r in averages],
            measurement.fit_noise,
            sigma_rels_range,
            keep=count,
            max_error=max_error,
            sizes=[max(r.file_bytes, 1) for r in averages],
            criterion=criterion,
            density=_relative(measurement.scale),
            scale=math.sqrt(typical) / (measurement.rms or 1.0),
        )
        noise, sizes = _folded(averages, choice.kept, measurement, num_elements(store))
        return [averages[i] for i in choice.kept], noise, sum(sizes) + raw_bytes

    if max_bytes is None:
        kept, noise, size = chosen(keep)
    else:
        kept, noise, size = _most_that_fit(chosen, len(averages), max_bytes)
    sigma_rels = np.unique([*targets_of(sigma_rels_range), *lengths])
    staying = {r.file for r in (*kept, *raw)}
    return PruningPlan(
        kept=tuple(r for r in store.records if r.file in staying),
        removed=tuple(r for r in store.records if r.file not in staying),
        sigma_rels=sigma_rels,
        errors_before=_errors(averages, measurement.noise, sigma_rels, measurement),
        errors=_errors(kept, noise, sigma_rels, measurement),
        bytes_before=sum(r.file_bytes for r in store.records),
        bytes_after=round(size),
    )


def prune(store: SnapshotStore, plan: PruningPlan) -> None:
    """Remove what a plan says. Crash-safe; what is needed of removed files is written anew first.

    Args:
        store: the store, open for editing (`SnapshotStore.edit`).
        plan: of this store.

    Raises:
        SnapshotError: the store has changed since it was planned.
        SnapshotWriteError: a file could not be written; the store is as it was.
    """
    if set(store.records) != {*plan.kept, *plan.removed}:
        raise SnapshotError(
            f"{store.folder} has changed since the pruning was planned. Plan it again."
        )
    store.remove(plan.removed)


def _raw_that_stays(store: SnapshotStore, keep_raw: KeepRaw) -> list[SnapshotRecord]:
    raw = [r for r in store.records if isinstance(r.profile, PointProfile)]
    if keep_raw == "none" or not raw:
        return []
    if keep_raw not in ("last", "all"):
        raise ConfigError(f"keep_raw must be last, all or none, got {keep_raw!r}.")
    last = max(r.time for r in raw)
    return [r for r in raw if keep_raw == "all" or r.time == last]


def _relative(scale: Scale | None) -> Density | None:
    """q(tau) over its typical value."""
    if scale is None or scale.typical <= 0:
        return None
    return lambda tau: scale(tau) / scale.typical


def _errors(
    records: Sequence[SnapshotRecord],
    noise: FloatArray,
    sigma_rels: FloatArray,
    measurement: Measurement,
) -> FloatArray:
    """Predicted relative errors at the last time, by the coefficients that a synthesis will use."""
    inputs = [r.profile for r in records]
    targets = [PowerProfile(records[-1].time, float(s)) for s in sigma_rels]
    scale = measurement.scale
    if scale is None:
        return np.full(len(targets), np.nan)
    x = fit(inputs, targets, noise=scale.noise_over_scale(noise)).coefficients
    return predicted_errors(inputs, targets, x, scale, noise) / (measurement.rms or 1.0)


def _most_that_fit(
    chosen: Callable[[int], tuple[list[SnapshotRecord], FloatArray, float]],
    count: int,
    max_bytes: float,
) -> tuple[list[SnapshotRecord], FloatArray, float]:
    """The largest choice within a budget; sizes are those after differences were written anew."""
    low, high, best = 1, count, None
    least = math.inf
    while low <= high:
        middle = (low + high) // 2
        kept, noise, size = chosen(middle)
        least = min(least, size)
        if size <= max_bytes:
            best, low = (kept, noise, size), middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ConfigError(
            f"the smallest store that is of use takes {least:.0f} bytes, asked for were at most "
            f"{max_bytes:.0f}. Allow more."
        )
    return best


def _folded(
    averages: Sequence[SnapshotRecord],
    kept: Sequence[int],
    measurement: Measurement,
    elements: int,
) -> tuple[FloatArray, list[float]]:
    """Noise and size of each average that stays, once differences to removed ones are written anew."""
    stays = {averages[i].file for i in kept}
    by_file = {r.file: r for r in averages}
    done: list[SnapshotRecord] = []
    added: dict[str, float] = {}
    noise, sizes = [], []
    for i in kept:
        record, size = averages[i], float(averages[i].file_bytes)
        bases = [(by_file[f], x) for f, x in record.bases if f in stays]
        more = sum(x**2 * added[base.file] for base, x in bases)
        if len(bases) < len(record.bases):
            dtype = rewritten_dtype(by_file, record)
            cost = FILE_COSTS[dtype]
            size += (cost.bytes_per_weight - FILE_COSTS[record.dtype].bytes_per_weight) * elements
            bases = choose_bases(done, record.time, record.profile, LONGEST_CHAIN)
            if bases:
                more = cost.rounding**2 * _mean_square_left(record, bases, measurement)
            else:
                more = 0.0
                size += (_KEY_FRAME_BYTES - cost.bytes_per_weight) * elements
        done.append(replace(record, bases=tuple((base.file, x) for base, x in bases)))
        added[record.file] = more
        noise.append(measurement.noise[i] + more)
        sizes.append(size)
    return np.array(noise), sizes


def _mean_square_left(
    record: SnapshotRecord, bases: Sequence[tuple[SnapshotRecord, float]], measurement: Measurement
) -> float:
    """Mean square of an average less what its bases tell of it."""
    if measurement.scale is None:
        return 0.0
    x = np.array([[x] for _, x in bases])
    inputs = [base.profile for base, _ in bases]
    norm = residual_norms(inputs, [record.profile], x, "random-walk", measurement.scale)
    return float(norm[0]) ** 2


@dataclass(frozen=True)
class Pace:
    """How the weights of an earlier run moved, stretched over a run of another length.

    Called with training times of the new run, it gives the pace there over the typical one.

    Attributes:
        drift: distance that the weights walk over the new run at the typical pace, over their norm.
        parameters: averaged weights of the model.
        scale: of the earlier run.
        stretch: length of the earlier run over that of the new one.
    """

    drift: float
    parameters: int
    scale: Scale
    stretch: float

    def __call__(self, tau: FloatArray) -> FloatArray:
        """q(tau) over its typical value, shape of `tau`."""
        return self.scale(np.asarray(tau) * self.stretch) / self.scale.typical


def pace_of(store: SnapshotStore, steps: int) -> Pace:
    """Measure an earlier run for the plan of a new one with the same clock and learning rate.

    Args:
        store: snapshots of the earlier run.
        steps: length of the new run.

    Raises:
        SnapshotNotFoundError: it has no two averages that differ, so nothing can be measured.
        SnapshotFormatError: a file is damaged.
    """
    averages = [r for r in store.records if not isinstance(r.profile, PointProfile)]
    measurement = measure(store, averages) if averages else None
    scale = measurement.scale if measurement else None
    if measurement is None or scale is None or scale.typical <= 0 or measurement.rms <= 0:
        raise SnapshotNotFoundError(
            f"{store.folder} does not show how its weights move: it needs two averages that differ. "
            "Give --drift instead."
        )
    drift = math.sqrt(scale.typical * steps) / measurement.rms
    return Pace(drift, num_elements(store), scale, averages[-1].time / steps)


def num_elements(store: SnapshotStore) -> int:
    """Averaged weights of the model."""
    return sum(math.prod(e.shape) for e in store.table.entries.values() if e.averaged)
