"""What a synthesis gives: tensors in memory, or safetensors files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from posthoc_ema.codecs import FLOAT8, AnyArray, decode
from posthoc_ema.errors import ConfigError, PhemaWarning
from posthoc_ema.fitting import FitNorm
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.combine import Block
from posthoc_ema.synthesis.layouts import Layout, single_file, table_tensors
from posthoc_ema.synthesis.plan import (
    SynthesisPlan,
    TargetReport,
    out_of_reach,
    plan_synthesis,
)
from posthoc_ema.synthesis.recipes import Recipe, store_recipe
from posthoc_ema.synthesis.writing import Output, check_free, write_outputs


class Synthesized(dict[str, AnyArray]):
    """Tensors of a synthesized average, name -> array, and how good they are.

    Attributes:
        report: predicted error, amplification, files and bytes read.
    """

    def __init__(self, tensors: Mapping[str, AnyArray], report: TargetReport) -> None:
        super().__init__(tensors)
        self.report = report


@overload
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: float,
    at: int | None = ...,
    *,
    norm: FitNorm = ...,
    noise: float | None = ...,
) -> Synthesized: ...
@overload
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: Sequence[float],
    at: int | None = ...,
    *,
    norm: FitNorm = ...,
    noise: float | None = ...,
) -> list[Synthesized]: ...
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: float | Sequence[float],
    at: int | None = None,
    *,
    norm: FitNorm = "random-walk",
    noise: float | None = None,
) -> Synthesized | list[Synthesized]:
    """Average of any length, in memory.

    For results larger than memory, or to have files, use `synthesize_to_files`.

    Args:
        store: an open store, or its folder.
        sigma_rel: wanted relative length in (0, 0.2887]; 0 gives the raw weights. A sequence makes
            all of them in one pass over the files.
        at: training time at which the average ends, any stored one; the last by default.
        norm: norm of the fit, see `fit`.
        noise: noise term of the fit; by default what storage lost, see `plan_synthesis`.

    Returns:
        A dict name -> array, whose `report` says how good it is, with the names of the model's
        state_dict, tied ones included. Averaged tensors are float32; buffers and frozen parameters
        have their own dtype (bfloat16 and float8 become float32) and are those of time `at`. A list of
        such dicts for a sequence.

    Raises:
        InvalidProfileError: sigma_rel lies outside the family.
        SnapshotNotFoundError: nothing is stored at `at`.
        SnapshotFormatError: a file is damaged; the message names it.

    Warns:
        PhemaWarning: a length is out of reach of the stored averages.

    Example:
        >>> tensors = synthesize("snapshots", sigma_rel=0.07)  # doctest: +SKIP
        >>> tensors.report.predicted_error  # doctest: +SKIP
        2.1e-05
        >>> model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})  # doctest: +SKIP
    """
    if not isinstance(store, SnapshotStore):
        store = SnapshotStore.open(store)
    single = np.ndim(sigma_rel) == 0
    sigma_rels: list[float] = np.atleast_1d(np.asarray(sigma_rel, dtype=np.float64)).tolist()
    plan = plan_synthesis(store, sigma_rels, at=at, norm=norm, noise=noise)
    message = out_of_reach(plan)
    if message:
        warnings.warn(message, PhemaWarning, stacklevel=2)
    entries = store.table.entries
    results: list[dict[str, AnyArray]] = [
        {e.name: np.empty(e.shape, np.float32) for e in entries.values() if e.averaged}
        for _ in sigma_rels
    ]
    recipe = store_recipe(store, plan)
    for block in recipe.blocks(list(entries), range(len(sigma_rels))):
        for result, values in zip(results, block.values, strict=True):
            result[block.name].reshape(-1)[block.start : block.start + len(values)] = values
    for name in (e.name for e in entries.values() if not e.averaged):
        dtype, values = entries[name].dtype, recipe.copy(name)
        # NumPy has no bfloat16 and no float8: their bits would read as integers.
        plain = decode(values, dtype) if dtype in ("bfloat16", *FLOAT8) else values
        for result in results:
            result[name] = plain.copy()
    ordered = [
        Synthesized({name: result[name] for name in entries}, plan.report(i))
        for i, result in enumerate(results)
    ]
    for result in ordered:
        result.update({alias: result[name] for alias, name in store.table.aliases.items()})
    return ordered[0] if single else ordered


def synthesize_to_files(
    store: SnapshotStore,
    plan: SynthesisPlan,
    paths: Sequence[Path],
    *,
    dtype: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Execute a plan into safetensors files, one per target, in bounded memory.

    The files hold the model's own names (tied ones under each name), so that
    `model.load_state_dict(load_file(path))` works strictly, and their provenance as metadata.

    Args:
        store: where the averages are.
        plan: from `plan_synthesis` on the same store.
        paths: output files, (num_targets); they appear complete or not at all.
        dtype: "model" (each tensor's own dtype), "float32", "float16" or "bfloat16" for the averaged
            tensors. Copied ones always keep their own.
        progress: called with (elements done, elements in all).

    Raises:
        SnapshotFormatError: an input is damaged; no output is left behind.
        SnapshotWriteError: an output cannot be written; no output is left behind.
        SynthesisError: a value overflows float16.
    """
    assert len(paths) == len(plan.sigma_rels)
    tensors = table_tensors(store.table, dtype)
    outputs = [Output(p.parent, single_file(p.name, tensors), alone=True) for p in paths]
    write_outputs(store_recipe(store, plan), outputs, progress=progress)


def execute(store: SnapshotStore, plan: SynthesisPlan) -> Iterator[Block]:
    """Stream all averaged tensors of a plan, see `combine`."""
    return store_recipe(store, plan).blocks(list(store.table.entries), range(len(plan.sigma_rels)))


def synthesize_to_folders(
    recipe: Recipe,
    folders: Sequence[Path],
    layout: Layout,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Output]:
    """Execute a recipe into model folders, one per target, in bounded memory.

    Each folder gets the weights (in one file or in shards), the base's configuration files, a model
    card, phema.json with the provenance, and the index of the shards last. What an interrupted call
    left is continued: finished files are recognised by their digest.

    Args:
        recipe: from `store_recipe` or `checkpoint_recipe`.
        folders: existing folders, (num_targets).
        layout: from `like_layout` or `sharded`.
        overwrite: replace files of other content.
        progress: called with (elements done, elements in all).

    Returns:
        What was written where.

    Raises:
        ConfigError: a file of other content is there, or a folder is the base itself.
        SnapshotFormatError: an input is damaged.
        SnapshotWriteError: an output cannot be written; run again to continue.
        SynthesisError: a value overflows float16.
    """
    outputs = [beside_base(Output(folder, layout)) for folder in folders]
    if not overwrite:
        check_free(recipe, outputs)
    write_outputs(recipe, outputs, resume=not overwrite, progress=progress)
    return outputs


def beside_base(output: Output) -> Output:
    """An output in the base's own folder: its configuration is there already, its weights must stay."""
    base = output.layout.like
    if (
        base is None
        or output.folder.resolve() != (base if base.is_dir() else base.parent).resolve()
    ):
        return output
    if output.layout.variant is None:
        raise ConfigError(
            f"--out {output.folder} is the base itself, whose weights would be lost. Choose another "
            "folder, or set --variant ema to write beside them."
        )
    return replace(output, layout=replace(output.layout, copied=()))
