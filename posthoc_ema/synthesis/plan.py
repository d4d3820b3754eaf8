"""Plan of a synthesis: which stored averages are combined how, before the weights are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posthoc_ema.chains import file_coefficients
from posthoc_ema.diagnostics import predicted_errors
from posthoc_ema.errors import ConfigError, SnapshotNotFoundError, SynthesisError
from posthoc_ema.fitting import Fit, FitNorm, fit
from posthoc_ema.inner_products import residual_norms
from posthoc_ema.profiles import PointProfile, PowerProfile, Profile
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.measuring import Measurement, measure

RAW = 0.0
"""The target that stands for the raw weights: no averaging."""

DOUBTFUL = 0.25
"""Share of the way that averaging moves the weights above which an error counts as out of reach."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Override:
    """Tensors that get another length than the target asks for.

    Attributes:
        pattern: shell pattern of tensor names, as in fnmatch.
        sigma_rel: their length; `RAW` is possible.
        names: the averaged tensors that it matches (and no later override does).
        coefficients: shape (num_inputs,).
        predicted_error: as in the plan, for the weights as a whole.
        reach: as in the plan.
    """

    pattern: str
    sigma_rel: float
    names: tuple[str, ...]
    coefficients: FloatArray = field(repr=False)
    predicted_error: float = 0.0
    reach: float = 0.0


@dataclass(frozen=True)
class TargetReport:
    """How good one synthesized average is, and what it cost.

    Attributes:
        sigma_rel: its length; 0 is the raw weights.
        time: training time at which it ends.
        predicted_error: expected error over the norm of the weights; nan if it cannot be told.
        profile_error: relative error of its profile, without storage errors.
        amplification: sum of |coefficients|: how much storage errors can grow.
        files_read: number of files.
        bytes_read: their size.
    """

    sigma_rel: float
    time: int
    predicted_error: float
    profile_error: float
    amplification: float
    files_read: int
    bytes_read: int


@dataclass(frozen=True)
class SynthesisPlan:
    """Everything that is decided before the weights are read.

    Attributes:
        sigma_rels: targets, (num_targets); `RAW` is the raw weights.
        time: training time at which all targets end.
        inputs: stored averages that are combined, (num_inputs).
        coefficients: shape (num_inputs, num_targets), columns sum to one.
        profile_error: relative error of each target's profile, (num_targets): the distance between
            target and combination over the distance that averaging moves the weights.
        amplification: sum of |coefficients| of each target, (num_targets).
        norm: norm of the fit.
        predicted_error: expected error of each target over the norm of the weights, (num_targets):
            what the profile misses and what storage lost. nan if it cannot be told.
        storage_share: part of `predicted_error` squared that comes from storage, (num_targets).
        reach: `predicted_error` over the relative distance that averaging moves the weights.
        files: files that are read, (num_files): those of `inputs`, and the chains that they stand on.
        file_coefficients: coefficient of each file, (num_files, num_targets).
        overrides: tensors with other lengths.
        measurement: what a sample of the stored averages showed.
        clock: unit of `time`.
    """

    sigma_rels: tuple[float, ...]
    time: int
    inputs: tuple[SnapshotRecord, ...]
    coefficients: FloatArray
    profile_error: FloatArray
    amplification: FloatArray
    norm: FitNorm
    predicted_error: FloatArray
    storage_share: FloatArray
    reach: FloatArray
    files: tuple[SnapshotRecord, ...]
    file_coefficients: FloatArray
    overrides: tuple[Override, ...]
    measurement: Measurement
    clock: str

    @property
    def bytes_read(self) -> int:
        """Size of the files that are read."""
        return sum(record.file_bytes for record in self.files)

    def report(self, target: int) -> TargetReport:
        """The figures of one target; those of all targets are read in one pass."""
        used = [r for r, x in zip(self.files, self.file_coefficients[:, target], strict=True) if x]
        return TargetReport(
            self.sigma_rels[target],
            self.time,
            float(self.predicted_error[target]),
            float(self.profile_error[target]),
            float(self.amplification[target]),
            len(used),
            sum(r.file_bytes for r in used),
        )

    def weights(
        self, sizes: Mapping[str, int], targets: Sequence[int]
    ) -> list[tuple[dict[str, int], FloatArray]]:
        """Tensors with the coefficients of the files for them.

        Args:
            sizes: tensor -> number of elements.
            targets: numbers of the wanted targets, (num_wanted).

        Returns:
            Pairs of a part of `sizes` and its coefficients, (num_wanted, num_files).
        """
        of_name = {name: o for o in self.overrides for name in o.names}
        parts: list[tuple[dict[str, int], FloatArray]] = []
        default = {n: s for n, s in sizes.items() if n not in of_name}
        if default:
            parts.append((default, self.file_coefficients.T[list(targets)]))
        for override in self.overrides:
            mine = {n: s for n, s in sizes.items() if of_name.get(n) is override}
            if mine:
                x = file_coefficients(self.files, self.inputs, override.coefficients[:, None])
                row = {r.file: v for r, v in zip(x[0], x[1][:, 0], strict=True)}
                line = np.array([row.get(r.file, 0.0) for r in self.files])
                parts.append((mine, np.tile(line, (len(targets), 1))))
        return parts


def plan_synthesis(
    store: SnapshotStore,
    sigma_rels: Sequence[float],
    *,
    at: int | None = None,
    norm: FitNorm = "random-walk",
    noise: float | None = None,
    overrides: Sequence[tuple[str, float]] = (),
    include: Collection[int] | None = None,
    exclude: Collection[int] = (),
) -> SynthesisPlan:
    """Decide which stored averages make the wanted ones, and how well.

    A sample of the elements of each file is read, to see how fast the weights move and how exactly
    they are stored.

    Args:
        store: where the averages are.
        sigma_rels: targets in (0, 0.2887], (num_targets); `RAW` (0.0) asks for the raw weights.
        at: training time at which the targets end; any stored time, the last by default. Later
            snapshots are ignored.
        norm: norm of the fit, see `fit`.
        noise: noise term of the fit, see `fit`. By default, with the random-walk norm, what storage
            lost of each average; 0 for the other norms.
        overrides: (pattern of tensor names, sigma_rel): tensors that get another length in all
            targets. The last one that matches counts.
        include: times that may be used; all by default.
        exclude: times that may not be used.

    Returns:
        The plan.

    Raises:
        InvalidProfileError: a target lies outside the family.
        SnapshotNotFoundError: the store is empty, or `at`, an included or excluded time, or the raw
            weights are not stored.
        ConfigError: a pattern matches no averaged tensor.
        SnapshotFormatError: a file is missing or damaged.
    """
    time = _end(store, at)
    wanted = [*sigma_rels, *(s for _, s in overrides)]
    targets: list[Profile] = [
        PowerProfile(time, s) if s != RAW else PointProfile(time) for s in wanted
    ]
    if not sigma_rels:
        raise SynthesisError("a synthesis needs at least one sigma_rel.")
    names = _matches(store, [pattern for pattern, _ in overrides])
    inputs = _inputs(store, time, include, exclude)
    measurement = measure(store, inputs)
    power = [i for i, s in enumerate(wanted) if s != RAW]
    coefficients = np.zeros((len(inputs), len(wanted)))
    if power:
        if noise is None and norm == "random-walk":
            terms = measurement.fit_noise
        else:
            terms = np.full(len(inputs), noise or 0.0)
        result = fit([r.profile for r in inputs], [targets[i] for i in power], norm, terms)
        coefficients[:, power] = result.coefficients
    numbers = _numbers(
        inputs, targets, coefficients, measurement, power, result if power else None, store.clock
    )
    if len(power) < len(wanted):
        raw = _raw_record(store, time)
        if raw not in inputs:
            inputs.append(raw)
            coefficients = np.vstack([coefficients, np.zeros(len(wanted))])
        chosen = np.array([s == RAW for s in wanted])
        coefficients[inputs.index(raw), chosen] = 1.0
        if measurement.rms:
            numbers["predicted_error"][chosen] = np.sqrt(raw.noise or 0.0) / measurement.rms
            numbers["storage_share"][chosen] = 1.0
        if not power:
            inputs, coefficients = [raw], coefficients[[inputs.index(raw)]]
    count = len(sigma_rels)
    files, of_files = file_coefficients(store.records, inputs, coefficients)
    return SynthesisPlan(
        sigma_rels=tuple(float(s) for s in sigma_rels),
        time=time,
        inputs=tuple(inputs),
        coefficients=coefficients[:, :count],
        norm=norm,
        files=tuple(files),
        file_coefficients=of_files[:, :count],
        overrides=tuple(
            Override(
                pattern,
                s,
                names[i],
                coefficients[:, count + i],
                float(numbers["predicted_error"][count + i]),
                float(numbers["reach"][count + i]),
            )
            for i, (pattern, s) in enumerate(overrides)
        ),
        measurement=measurement,
        clock=store.clock,
        **{key: values[:count] for key, values in numbers.items()},
    )


def _end(store: SnapshotStore, at: int | None) -> int:
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
    return time


def _inputs(
    store: SnapshotStore, time: int, include: Collection[int] | None, exclude: Collection[int]
) -> list[SnapshotRecord]:
    averages = store.averages
    strange = sorted({*(include or ()), *exclude} - {r.time for r in averages})
    if strange:
        raise SnapshotNotFoundError(
            f"time {strange[0]}, which is to be included or excluded, is not stored in {store.folder}. "
            "`phema ls` lists the times."
        )
    inputs = [
        r
        for r in averages
        if r.time <= time and r.time not in exclude and (include is None or r.time in include)
    ]
    if not inputs:
        raise SnapshotNotFoundError(
            f"no snapshot up to {time} is left to combine: all are excluded. Exclude fewer."
        )
    return inputs


def _matches(store: SnapshotStore, patterns: Sequence[str]) -> list[tuple[str, ...]]:
    """Averaged tensors of each pattern; the last pattern that matches a name has it."""
    averaged = [e.name for e in store.table.entries.values() if e.averaged]
    owner: dict[str, int] = {}
    for i, pattern in enumerate(patterns):
        found = [name for name in averaged if fnmatch.fnmatchcase(name, pattern)]
        found += [
            name
            for alias, name in store.table.aliases.items()
            if name in averaged and fnmatch.fnmatchcase(alias, pattern)
        ]
        if not found:
            raise ConfigError(
                f"--override {pattern!r} matches none of the {len(averaged)} averaged tensors (such as "
                f"{averaged[0]!r}). Patterns are those of the shell: 'decoder.*', '*.bias'."
            )
        owner |= dict.fromkeys(found, i)
    return [tuple(n for n in averaged if owner.get(n) == i) for i in range(len(patterns))]


def _numbers(
    inputs: Sequence[SnapshotRecord],
    targets: Sequence[Profile],
    x: FloatArray,
    measurement: Measurement,
    power: Sequence[int],
    result: Fit | None,
    clock: str,
) -> dict[str, FloatArray]:
    """The figures of merit of each target; those of the raw weights are exact."""
    num = len(targets)
    numbers = {
        "profile_error": np.zeros(num),
        "amplification": np.ones(num),
        "predicted_error": np.zeros(num),
        "storage_share": np.zeros(num),
        "reach": np.zeros(num),
    }
    if result is None:
        return numbers
    index = list(power)
    numbers["profile_error"][index] = result.relative_residual
    numbers["amplification"][index] = result.amplification
    scale, noise = measurement.scale, measurement.noise
    if scale is None or measurement.rms == 0:
        numbers["predicted_error"][index] = np.nan
        numbers["reach"][index] = result.relative_residual
        return numbers
    some = [targets[i] for i in index]
    profiles = [r.profile for r in inputs]
    missed = predicted_errors(profiles, some, x[:, index], scale, noise)
    error = np.hypot(missed, np.sqrt(_tracking_noise(some, measurement, clock)))
    storage = noise @ x[:, index] ** 2
    end = [PointProfile(some[0].t)]
    moved = residual_norms(end, some, np.ones((1, len(some))), "random-walk", scale)
    numbers["predicted_error"][index] = error / measurement.rms
    numbers["storage_share"][index] = np.divide(
        storage, error**2, out=np.zeros_like(error), where=error > 0
    )
    # Weights that hardly move at all are averaged well enough by anything.
    numbers["reach"][index] = error / np.hypot(moved, 1e-4 * measurement.rms)
    return numbers


def _tracking_noise(targets: Sequence[Profile], measurement: Measurement, clock: str) -> FloatArray:
    """Mean square error of tracking in float32, which no reconstruction can undo, (num_targets,).

    Each update rounds once, and what it rounds fades with the average: of n updates with
    beta_k = (1 - 1/k)^(gamma+1), sum over k of (k/n)^(2 gamma + 2) = n / (2 gamma + 3) are left. How
    many updates a clock of images stands for is not known: then it is left out.
    """
    if clock != "steps":
        return np.zeros(len(targets))
    gammas = np.array([p.gamma if isinstance(p, PowerProfile) else np.inf for p in targets])
    ends = np.array([p.t for p in targets])
    return measurement.rounding * ends / (2 * gammas + 3)


def out_of_reach(plan: SynthesisPlan) -> str:
    """Which targets the stored averages cannot give well, why, and what helps; empty if all are fine."""
    groups: dict[str, list[str]] = {}
    for i, s in enumerate(plan.sigma_rels):
        if plan.reach[i] > DOUBTFUL:
            coarse = bool(plan.storage_share[i] > 0.5)
            groups.setdefault(_reason(plan, s, coarse), []).append(f"{s:g}")
    for override in plan.overrides:
        if override.reach > DOUBTFUL:
            reason = _reason(plan, override.sigma_rel, coarse=False)
            groups.setdefault(reason, []).append(f"{override.sigma_rel:g} of {override.pattern}")
    return " ".join(
        f"sigma_rel {', '.join(lengths)}: the error is above {DOUBTFUL:.0%} of what averaging does. {reason}"
        for reason, lengths in groups.items()
    )


def _reason(plan: SynthesisPlan, s: float, coarse: bool) -> str:
    """Why a length is out of reach, and the remedy."""
    stored = sorted({r.sigma_rel for r in plan.inputs if r.sigma_rel is not None})
    if coarse:
        dtypes = ", ".join(sorted({r.dtype for r in plan.inputs}))
        return f"Storage in {dtypes} is too coarse for it: store delta-float16 or float32."
    times = np.unique([r.time for r in plan.inputs])
    steps = np.diff(times)
    if len(steps) > 2 and steps.max() > 2.5 * np.median(steps):
        gap = int(np.argmax(steps))
        return (
            f"Snapshots are missing (pruned or excluded; the widest gap is {times[gap]} to "
            f"{times[gap + 1]}). Ask for a length nearer to the tracked ones."
        )
    if stored and s < stored[0]:
        return (
            f"It lies below the tracked lengths ({', '.join(f'{v:g}' for v in stored)}), and the "
            f"{len(times)} snapshots are too far apart: snapshot more often, or track a shorter length."
        )
    if stored and s > stored[-1]:
        return (
            f"It lies above the tracked lengths ({', '.join(f'{v:g}' for v in stored)}), and the "
            f"{len(times)} snapshots are too few: snapshot more often, or track a longer length."
        )
    return (
        f"The {len(times)} snapshots are too few or too far apart: snapshot more often, or ask for a "
        "length nearer to the tracked ones."
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
