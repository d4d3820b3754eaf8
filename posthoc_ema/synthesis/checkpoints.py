"""Averages of raw checkpoints: a profile applied to what any training run has on disk.

A checkpoint is the weights at one moment, a `PointProfile`. Between two of them nothing is known; under
the random-walk model the best that a sum of checkpoints can do for a wanted profile is the fit in the
random-walk norm, and its residual is what the gaps between the checkpoints cost. For a power profile the
coefficients come out as differences of the profile's mean tail over neighbouring gaps: all positive,
sum one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.codecs import DTYPE_CODES, FLOATING, decode
from posthoc_ema.diagnostics import predicted_errors, sampled_scale
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SynthesisError,
)
from posthoc_ema.fitting import fit
from posthoc_ema.profiles import PointProfile, PowerProfile, Profile
from posthoc_ema.snapshot import TensorEntry, TensorTable
from posthoc_ema.synthesis.checkpoint_files import Checkpoint, open_checkpoint
from posthoc_ema.synthesis.checkpoint_names import TimedCheckpoint
from posthoc_ema.synthesis.combine import Block, Group, combine
from posthoc_ema.synthesis.foreign_tensors import told
from posthoc_ema.synthesis.plan import RAW
from posthoc_ema.synthesis.recipes import Recipe, label_of, sizes_of, tool

FloatArray = npt.NDArray[np.float64]

COPIED = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Names that are statistics of the data and no weights: copied from the last checkpoint."""
_RUNS, _RUN = 64, 256  # places and elements at each that are looked at in a checkpoint


@dataclass(frozen=True)
class Target:
    """A wanted average of checkpoints.

    Attributes:
        profile: which average; None for the last checkpoint as it is.
        name: as the user wrote it, for example "sigma_rel 0.1".
        label: its name in file names.
        sigma_rel: its length if it is a power profile, `RAW` for the last checkpoint, else None.
    """

    profile: Profile | None
    name: str
    label: str
    sigma_rel: float | None


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything that is decided before a checkpoint is opened.

    Attributes:
        targets: what is wanted, (num_targets).
        time: where all targets end: the last checkpoint's time.
        inputs: checkpoints that are combined, by time, (num_inputs).
        coefficients: shape (num_inputs, num_targets), columns sum to one.
        profile_error: relative error of each target's profile, (num_targets): how far the gaps between
            the checkpoints let the result stray, over the distance that averaging moves the weights.
        amplification: sum of |coefficients|, (num_targets).
        overrides: (pattern of tensor names, sigma_rel, coefficients), the last match counts.
        clock: unit of the times, for what is printed.
    """

    targets: tuple[Target, ...]
    time: int
    inputs: tuple[TimedCheckpoint, ...]
    coefficients: FloatArray
    profile_error: FloatArray
    amplification: FloatArray
    overrides: tuple[tuple[str, float, FloatArray], ...]
    clock: str = "steps"


# ---- planning


def power_target(sigma_rel: float, time: int) -> Target:
    """The target of a length; `RAW` is the last checkpoint itself."""
    if sigma_rel == RAW:
        return Target(None, "raw", label_of(RAW, time), RAW)
    profile = PowerProfile(time, sigma_rel)
    return Target(profile, f"sigma_rel {sigma_rel:g}", label_of(sigma_rel, time), sigma_rel)


def plan_checkpoints(
    checkpoints: Sequence[TimedCheckpoint],
    targets: Sequence[Target],
    *,
    overrides: Sequence[tuple[str, float]] = (),
    clock: str = "steps",
) -> CheckpointPlan:
    """Coefficients of the checkpoints for the wanted averages, and how well they can do.

    Args:
        checkpoints: by rising time; the last one is where the targets end.
        targets: what is wanted.
        overrides: (pattern of tensor names, sigma_rel): tensors of another length in all targets.
        clock: unit of the times.

    Raises:
        InvalidProfileError: a length lies outside the family.
    """
    if not targets:
        raise SynthesisError("a synthesis needs at least one target.")
    time = checkpoints[-1].time
    points = [PointProfile(c.time) for c in checkpoints]
    others = [power_target(s, time) for _, s in overrides]
    wanted = [t.profile or PointProfile(time) for t in (*targets, *others)]
    result = fit(points, wanted, "random-walk")
    x = result.coefficients.copy()
    for i, target in enumerate((*targets, *others)):
        if target.profile is None:  # exactly the last one, not up to rounding
            x[:, i] = [0.0] * (len(points) - 1) + [1.0]
    count = len(targets)
    error = np.where([t.profile is None for t in targets], 0.0, result.relative_residual[:count])
    return CheckpointPlan(
        tuple(targets),
        time,
        tuple(checkpoints),
        x[:, :count],
        error,
        np.abs(x[:, :count]).sum(axis=0),
        tuple((p, s, x[:, count + i]) for i, (p, s) in enumerate(overrides)),
        clock,
    )


# ---- executing


@contextlib.contextmanager
def checkpoint_recipe(
    plan: CheckpointPlan,
    *,
    key: str | None = None,
    copied: Sequence[str] = COPIED,
    device: str | None = None,
) -> Iterator[Recipe]:
    """Open the checkpoints of a plan, compare them, and give the recipe.

    Args:
        plan: from `plan_checkpoints`.
        key: where a file of torch.save keeps the model's state_dict, see `open_checkpoint`.
        copied: patterns of names that are copied from the last checkpoint instead of averaged, as are
            tensors of integers.
        device: where the arithmetic runs, see `combine`.

    Raises:
        SnapshotFormatError: a checkpoint is damaged.
        SnapshotMismatchError: names, shapes or dtypes differ between checkpoints.
        ConfigError: a pattern of `overrides` matches nothing, or there is no state_dict.
    """
    with contextlib.ExitStack() as stack:
        opened = [open_checkpoint(c.path, stack, key) for c in plan.inputs]
        table = _table(opened[-1], copied)
        for checkpoint in opened[:-1]:
            _check_same(opened[-1], checkpoint)
        groups = _overridden(plan, table)
        errors = _predicted_errors(plan, opened, table)

        def blocks(names: Sequence[str], targets: Sequence[int]) -> Iterator[Block]:
            sizes = sizes_of(table, names)
            made = []
            for mine, column in groups:
                part = {n: s for n, s in sizes.items() if n in mine}
                x = plan.coefficients[:, list(targets)]
                if column is not None:
                    x = np.tile(column[:, None], (1, len(targets)))
                if part:
                    made.append(Group(part, x.T))
            return combine(opened, made, device=device) if made else iter(())

        yield Recipe(
            table,
            tuple(t.label for t in plan.targets),
            tuple(_provenance(plan, i, error) for i, error in enumerate(errors)),
            {},
            blocks,
            opened[-1].read_copy,
            sum(c.num_bytes for c in opened),
        )


def _table(checkpoint: Checkpoint, copied: Sequence[str]) -> TensorTable:
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in DTYPE_CODES:
            raise SnapshotFormatError(
                f"{checkpoint.path}: tensor {name!r} is of dtype {tensor.dtype}, which safetensors "
                "cannot hold."
            )
        if tensor.identity in first and 0 not in tensor.shape:
            aliases[name] = first[tensor.identity]
            continue
        first[tensor.identity] = name
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in copied)
        averaged = tensor.dtype in FLOATING and not kept
        entries[name] = TensorEntry(name, tuple(tensor.shape), tensor.dtype, averaged)
    if not any(entry.averaged for entry in entries.values()):
        raise ConfigError(f"{checkpoint.path} holds no floating tensors that could be averaged.")
    return TensorTable(entries, aliases)


def _check_same(last: Checkpoint, other: Checkpoint) -> None:
    rule = "All checkpoints must be of one model; leave others out with --exclude."
    for name in [*last.tensors, *other.tensors]:
        mine, its = last.tensors.get(name), other.tensors.get(name)
        if mine is None or its is None:
            has, lacks = (last, other) if its is None else (other, last)
            raise SnapshotMismatchError(
                f"{lacks.path}: tensor {name!r} is missing, {has.path} has it. {rule}"
            )
        if (mine.shape, mine.dtype) != (its.shape, its.dtype):
            raise SnapshotMismatchError(
                f"{other.path}: tensor {name!r} is {its.dtype} {its.shape}, in {last.path} it is "
                f"{mine.dtype} {mine.shape}. {rule}"
            )


def _overridden(
    plan: CheckpointPlan, table: TensorTable
) -> list[tuple[set[str], FloatArray | None]]:
    """Tensors with the coefficients that replace the targets' own; None for no replacement."""
    averaged = [e.name for e in table.entries.values() if e.averaged]
    owner: dict[str, int] = {}
    for i, (pattern, _, _) in enumerate(plan.overrides):
        found = fnmatch.filter(averaged, pattern)
        if not found:
            raise ConfigError(
                f"--override {pattern!r} matches none of the {len(averaged)} averaged tensors (such as "
                f"{averaged[0]!r}). Patterns are those of the shell: 'decoder.*', '*.bias'."
            )
        owner |= dict.fromkeys(found, i)
    groups: list[tuple[set[str], FloatArray | None]] = [
        ({n for n in averaged if n not in owner}, None)
    ]
    groups += [
        ({n for n, o in owner.items() if o == i}, x) for i, (_, _, x) in enumerate(plan.overrides)
    ]
    return groups


def _predicted_errors(
    plan: CheckpointPlan, opened: Sequence[Checkpoint], table: TensorTable
) -> list[float | None]:
    """Expected error of each target over the norm of the weights; None where it cannot be told."""
    samples = np.array([_sample(checkpoint, table) for checkpoint in opened])
    samples = samples[:, np.isfinite(samples).all(axis=0)]
    points = [PointProfile(c.time) for c in plan.inputs]
    scale = sampled_scale(points, samples) if samples.size else None
    rms = float(np.sqrt(np.mean(samples[-1] ** 2))) if samples.size else 0.0
    if scale is None or rms == 0:
        return [0.0 if t.profile is None else None for t in plan.targets]
    wanted = [t.profile or points[-1] for t in plan.targets]
    errors = predicted_errors(points, wanted, plan.coefficients, scale) / rms
    return [
        0.0 if t.profile is None else float(e) for t, e in zip(plan.targets, errors, strict=True)
    ]


def _sample(checkpoint: Checkpoint, table: TensorTable) -> FloatArray:
    """Some elements, the same of each checkpoint: runs that are spread evenly over all of them."""
    sizes = {e.name: math.prod(e.shape) for e in table.entries.values() if e.averaged}
    total, passed, found = sum(sizes.values()), 0, []
    places = sorted({total * k // _RUNS for k in range(_RUNS)})
    for name, size in sizes.items():
        while places and places[0] < passed + size:
            start = places.pop(0) - passed
            stop = min(size, start + _RUN, places[0] - passed if places else size)
            with told(checkpoint.path, name):
                bits = checkpoint.tensors[name].read(start, stop)
                found.append(decode(bits, checkpoint.tensors[name].dtype).astype(np.float64))
        passed += size
    return np.concatenate(found) if found else np.empty(0)


def _provenance(plan: CheckpointPlan, target: int, predicted: float | None) -> dict[str, Any]:
    wanted = plan.targets[target]
    value: dict[str, Any] = {
        "tool": tool(),
        "kind": "synthesized from checkpoints",
        "sigma_rel": wanted.sigma_rel,
        "time": plan.time,
        "clock": plan.clock,
        "norm": "random-walk",
        "profile_error": float(plan.profile_error[target]),
        "amplification": float(plan.amplification[target]),
        "overrides": {pattern: s for pattern, s, _ in plan.overrides},
        "inputs": [
            {
                "file": "/".join(c.path.parts[-2:]),
                "time": c.time,
                "coefficient": x,
                **_fingerprint(c.path),
            }
            for c, x in zip(plan.inputs, plan.coefficients[:, target].tolist(), strict=True)
            if x != 0.0 or c is plan.inputs[-1] or plan.overrides
        ],
        "predicted_error": predicted,
    }
    if wanted.sigma_rel is None:
        value["profile"] = wanted.name
    return value


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and age of a checkpoint: tells a changed one, without reading it twice."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stats = [file.stat() for file in files]
    return {
        "bytes": sum(s.st_size for s in stats),
        "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


def gap_message(plan: CheckpointPlan, doubtful: float) -> str:
    """What the gaps between the checkpoints cost, in words, where it is much; empty if it is not."""
    names = [t.name for t, e in zip(plan.targets, plan.profile_error, strict=True) if e > doubtful]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: the {len(plan.inputs)} checkpoints are too few or too far apart for it "
        f"(the gaps between them cost more than {doubtful:.0%} of what averaging does). Save more often, "
        "track averages with `track`, or ask for a longer average."
    )
