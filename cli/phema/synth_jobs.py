"""What `phema synth` decides: from its options to a recipe, outputs, and what is said of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phema.options import find_store
from phema.output import size
from phema.synth_options import parse_profiles, parse_time_list, parse_times
from posthoc_ema import ConfigError, SynthesisPlan, plan_synthesis
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.snapshot import is_snapshot_file_name
from posthoc_ema.sweep import label
from posthoc_ema.synthesis import (
    DOUBTFUL,
    Output,
    Recipe,
    checkpoint_recipe,
    choose_times,
    find_checkpoints,
    gap_message,
    like_layout,
    out_of_reach,
    plan_checkpoints,
    sharded,
    single_file,
    store_recipe,
    table_tensors,
)
from posthoc_ema.synthesis.checkpoint_files import is_checkpoint
from posthoc_ema.synthesis.checkpoints import Target, power_target
from posthoc_ema.synthesis.layouts import MODEL, parse_size
from posthoc_ema.synthesis.outputs import beside_base
from posthoc_ema.synthesis.writing import unfinished


@dataclass(frozen=True)
class Job:
    """A synthesis that is decided, and what is said about it.

    Attributes:
        recipe: what is executed.
        header: names of the columns of `rows`.
        rows: what the table shows of each target.
        results: what JSON shows of each target.
        facts: what JSON shows of all of them.
        source: what was read, for the last line.
        warning: a doubt about the result, or nothing.
    """

    recipe: Recipe
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    source: str
    warning: str


def store_job(
    snapshots: Sequence[Path],
    sigma_rels: Sequence[float],
    overrides: Sequence[tuple[str, float]],
    at: int | None,
    include: str | None,
    exclude: str | None,
    norm: str,
    device: str | None,
) -> Job:
    """Plan a synthesis from tracked averages."""
    if len(snapshots) != 1:
        raise ConfigError(
            f"one folder of snapshots is combined, {len(snapshots)} were given. Raw checkpoints of "
            "other trainers need --from-checkpoints."
        )
    (folder,) = snapshots
    if (
        folder.is_dir()
        and not _is_store(folder)
        and any(map(is_checkpoint, folder.iterdir()))
        and not any(is_snapshot_file_name(path.name) for path in folder.iterdir())
    ):
        raise ConfigError(
            f"{folder} holds no tracked averages, but files that may be raw checkpoints: add "
            "--from-checkpoints to average those."
        )
    store = find_store(folder)
    plan = plan_synthesis(
        store,
        sigma_rels,
        at=at,
        norm=norm,  # type: ignore[arg-type]  # checked inside
        overrides=overrides,
        include=None if include is None else parse_times("--include", include, store.times),
        exclude=parse_times("--exclude", exclude, store.times) if exclude else (),
    )
    results = [
        {
            "sigma_rel": s or None,
            "raw": s == 0,
            "predicted_error": _number(plan.predicted_error[i]),
            "profile_error": plan.profile_error[i].item(),
            "amplification": plan.amplification[i].item(),
        }
        for i, s in enumerate(plan.sigma_rels)
    ]
    facts = {
        "time": plan.time,
        "clock": store.clock,
        "norm": plan.norm,
        "inputs": len(plan.inputs),
        "files_read": len(plan.files),
        "bytes_read": plan.bytes_read,
        "sampled_elements": plan.measurement.num_elements,
        "overrides": {o.pattern: o.sigma_rel for o in plan.overrides},
    }
    return Job(
        store_recipe(store, plan, device=device),
        ["sigma_rel", "error", "profile error", "sum|x|"],
        [_row(plan, i) for i in range(len(plan.sigma_rels))],
        results,
        facts,
        f"at {plan.time} {store.clock}, from {len(plan.files)} files ({size(plan.bytes_read)}) of "
        f"{store.folder}; error: predicted, over the norm of the weights, from a sample of "
        f"{plan.measurement.num_elements} elements",
        out_of_reach(plan),
    )


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / "snapshots").is_dir()


def _row(plan: SynthesisPlan, i: int) -> list[str]:
    return [
        label(plan.sigma_rels[i]),
        _shown(_number(plan.predicted_error[i])),
        f"{plan.profile_error[i]:.1e}",
        f"{plan.amplification[i]:.1f}",
    ]


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _number(value: float) -> float | None:
    """A number for JSON, which has no nan."""
    return float(value) if value == value else None


def checkpoint_job(
    stack: contextlib.ExitStack,
    paths: Sequence[Path],
    sigma_rels: Sequence[float],
    *,
    profiles: Sequence[str],
    overrides: Sequence[tuple[str, float]],
    at: int | None,
    include: str | None,
    exclude: str | None,
    times: str | None,
    key: str | None,
    copied: Sequence[str],
    device: str | None,
) -> Job:
    """Plan an average of raw checkpoints, which stay open as long as `stack`."""
    found = find_checkpoints(paths, None if times is None else parse_time_list(times))
    known = [c.time for c in found]
    left = choose_times(
        found,
        at=at,
        include=None if include is None else parse_times("--include", include, known),
        exclude=parse_times("--exclude", exclude, known) if exclude else (),
    )
    end = left[-1].time
    targets: list[Target] = [power_target(s, end) for s in sigma_rels]
    targets += parse_profiles(profiles, end)
    plan = plan_checkpoints(left, targets, overrides=overrides)
    recipe = stack.enter_context(checkpoint_recipe(plan, key=key, copied=copied, device=device))
    results = [
        {
            "target": t.name,
            "sigma_rel": t.sigma_rel or None,
            "raw": t.profile is None,
            "predicted_error": recipe.provenance[i]["predicted_error"],
            "profile_error": plan.profile_error[i].item(),
            "amplification": plan.amplification[i].item(),
        }
        for i, t in enumerate(plan.targets)
    ]
    facts = {
        "time": plan.time,
        "clock": plan.clock,
        "norm": "random-walk",
        "inputs": len(plan.inputs),
        "bytes_read": recipe.bytes_read,
        "overrides": {pattern: s for pattern, s, _ in plan.overrides},
    }
    return Job(
        recipe,
        ["average", "error", "lost in gaps"],
        [
            [
                t.name,
                _shown(recipe.provenance[i]["predicted_error"]),
                f"{plan.profile_error[i]:.0%}",
            ]
            for i, t in enumerate(plan.targets)
        ],
        results,
        facts,
        f"at {plan.time} {plan.clock}, from {len(left)} checkpoints ({size(recipe.bytes_read)}) of "
        f"{left[0].time} to {left[-1].time}\nerror: expected, relative to the weights; lost in gaps: "
        "the same as a share of how far averaging moves the weights",
        gap_message(plan, DOUBTFUL),
    )


def make_outputs(
    recipe: Recipe,
    out: Path | None,
    like: Path | None,
    variant: str | None,
    shard_size: str | None,
    dtype: str,
) -> list[Output]:
    """Where each target goes: a file, or a model folder."""
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    folder = shard_bytes is not None or (like is not None and not like.is_file())
    if variant is not None and not folder:
        raise ConfigError(
            "--variant names the files of a model folder; add --like DIR or --shard-size."
        )
    if not folder:
        return _singlemake_outputs(recipe, out, like, dtype)
    if out is not None and out.suffix == ".safetensors":
        raise ConfigError(
            f"--out {out}: --like and --shard-size make a model folder; give a folder, not a file."
        )
    layout = (
        like_layout(like, recipe.table, dtype=dtype, variant=variant, shard_bytes=shard_bytes)
        if like is not None
        else sharded(MODEL, table_tensors(recipe.table, dtype), shard_bytes or 1, variant)
    )
    if len(recipe.labels) == 1 and out is not None:
        return [beside_base(Output(out, layout))]
    return [beside_base(Output((out or Path()) / name, layout)) for name in recipe.labels]


def _singlemake_outputs(
    recipe: Recipe, out: Path | None, like: Path | None, dtype: str
) -> list[Output]:
    """One file of each target."""
    if out is not None and out.suffix == ".safetensors":
        if len(recipe.labels) != 1:
            raise ConfigError(
                f"--out {out} is one file, but {len(recipe.labels)} lengths are asked for; give a folder."
            )
        paths = [out]
    else:
        paths = [(out or Path()) / f"{name}.safetensors" for name in recipe.labels]
    if like is None:
        tensors, metadata, base = table_tensors(recipe.table, dtype), {}, None
    else:
        (file,) = like_layout(like, recipe.table, dtype=dtype).files
        tensors, metadata, base = file.tensors, dict(file.metadata), like
        if like.resolve() in {path.resolve() for path in paths}:
            raise ConfigError(f"--out {like} is the base itself; choose another file.")
    return [
        Output(path.parent, single_file(path.name, tensors, metadata, like=base), alone=True)
        for path in paths
    ]


def finished(recipe: Recipe, outputs: Sequence[Output]) -> int:
    """Files that are there already, from the same request."""
    return sum(len(o.paths) - len(unfinished(recipe, i, o)) for i, o in enumerate(outputs))
