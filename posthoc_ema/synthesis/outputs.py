"""What a synthesis gives: tensors in memory, or safetensors files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from posthoc_ema.codecs import FLOAT8, FLOATING, AnyArray, Float32Array, decode, encode
from posthoc_ema.errors import ConfigError, PhemaWarning, SynthesisError
from posthoc_ema.fitting import FitNorm
from posthoc_ema.snapshot import METADATA_KEY
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.combine import Block, Group, combine
from posthoc_ema.synthesis.plan import SynthesisPlan, out_of_reach, plan_synthesis
from posthoc_ema.synthesis.reading import SnapshotSource
from posthoc_ema.tensor_files import TensorFileWriter


@overload
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: float,
    at: int | None = ...,
    *,
    norm: FitNorm = ...,
    noise: float = ...,
) -> dict[str, AnyArray]: ...
@overload
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: Sequence[float],
    at: int | None = ...,
    *,
    norm: FitNorm = ...,
    noise: float = ...,
) -> list[dict[str, AnyArray]]: ...
def synthesize(
    store: SnapshotStore | str | os.PathLike[str],
    sigma_rel: float | Sequence[float],
    at: int | None = None,
    *,
    norm: FitNorm = "random-walk",
    noise: float = 0.0,
) -> dict[str, AnyArray] | list[dict[str, AnyArray]]:
    """Average of any length, in memory.

    For results larger than memory, or to have files, use `synthesize_to_files`.

    Args:
        store: an open store, or its folder.
        sigma_rel: wanted relative length in (0, 0.2887]; 0 gives the raw weights. A sequence makes
            all of them in one pass over the files.
        at: training time at which the average ends, any stored one; the last by default.
        norm: norm of the fit, see `fit`.
        noise: noise term of the fit, see `fit`.

    Returns:
        name -> array, with the names of the model's state_dict, tied ones included. Averaged tensors
        are float32; buffers and frozen parameters have their own dtype (bfloat16 and float8 become
        float32) and are those of time `at`. A list of such dicts for a sequence.

    Raises:
        InvalidProfileError: sigma_rel lies outside the family.
        SnapshotNotFoundError: nothing is stored at `at`.
        SnapshotFormatError: a file is damaged; the message names it.

    Warns:
        PhemaWarning: a length is out of reach of the stored averages.

    Example:
        >>> tensors = synthesize("snapshots", sigma_rel=0.07)  # doctest: +SKIP
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
    results: list[dict[str, AnyArray]] = [{} for _ in sigma_rels]
    entries = store.table.entries
    for block in execute(store, plan):
        entry = entries[block.name]
        for result, values in zip(results, block.values, strict=True):
            if block.name not in result:
                result[block.name] = np.empty(entry.shape, values.dtype)
            result[block.name].reshape(-1)[block.start : block.start + len(values)] = values
    for name, values in _read_copies(store, plan):
        dtype = entries[name].dtype
        # NumPy has no bfloat16 and no float8: their bits would read as integers.
        plain = decode(values, dtype) if dtype in ("bfloat16", *FLOAT8) else values
        for result in results:
            result[name] = plain.copy()
    ordered = [{name: result[name] for name in entries} for result in results]
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
    if dtype != "model" and dtype not in FLOATING:
        raise ConfigError(f"dtype must be model, float32, float16 or bfloat16, got {dtype!r}.")
    entries, aliases = store.table.entries, store.table.aliases
    dtypes = {
        e.name: (e.dtype if dtype == "model" or not e.averaged else dtype) for e in entries.values()
    }
    names_of = {name: [name] for name in entries}
    for alias, name in aliases.items():
        names_of[name].append(alias)
    layout = [
        (name, dtypes[main], entries[main].shape)
        for main, names in names_of.items()
        for name in names
    ]
    total = sum(math.prod(e.shape) for e in entries.values() if e.averaged)
    done = 0
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(TensorFileWriter(path, layout, _provenance(store, plan, i)))
            for i, path in enumerate(paths)
        ]
        for block in execute(store, plan):
            for file, values in zip(files, block.values, strict=True):
                stored = encode(values, dtypes[block.name])
                if dtypes[block.name] == "float16" and not np.isfinite(stored).all():
                    _refuse_overflow(block.name, values)
                for name in names_of[block.name]:
                    file.write(name, stored, block.start)
            done += block.values.shape[1]
            if progress is not None:
                progress(done, total)
        for name, values in _read_copies(store, plan):
            for file in files:
                for written in names_of[name]:
                    file.write(written, values)


def _refuse_overflow(name: str, values: Float32Array) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and np.abs(finite).max() > np.finfo(np.float16).max:
        raise SynthesisError(
            f"tensor {name!r} holds {np.abs(finite).max():.3g}, float16 ends at 65504. "
            "Write it with --dtype float32 or --dtype bfloat16."
        )


def _provenance(store: SnapshotStore, plan: SynthesisPlan, target: int) -> dict[str, str]:
    from posthoc_ema import __version__

    used = [
        {"file": r.file, "time": r.time, "sigma_rel": r.sigma_rel, "coefficient": x}
        for r, x in zip(plan.inputs, plan.coefficients[:, target].tolist(), strict=True)
        if x != 0.0
    ]
    value = {
        "tool": f"posthoc-ema {__version__}",
        "kind": "synthesized",
        "sigma_rel": plan.sigma_rels[target],
        "time": plan.time,
        "clock": store.clock,
        "run_id": store.run_id,
        "norm": plan.norm,
        "profile_error": plan.profile_error[target],
        "amplification": plan.amplification[target],
        "inputs": used,
    }
    return {METADATA_KEY: json.dumps(value), **store.metadata}


def execute(store: SnapshotStore, plan: SynthesisPlan) -> Iterator[Block]:
    """Stream all averaged tensors of a plan, see `combine`."""
    sources = [SnapshotSource.open(store, record) for record in plan.inputs]
    sizes = {e.name: math.prod(e.shape) for e in store.table.entries.values() if e.averaged}
    return combine(sources, [Group(sizes, plan.coefficients.T)])


def _read_copies(store: SnapshotStore, plan: SynthesisPlan) -> Iterator[tuple[str, AnyArray]]:
    """Buffers and frozen parameters of the target's time, as stored."""
    names = [e.name for e in store.table.entries.values() if not e.averaged]
    if names:
        source = SnapshotSource.open(store, next(r for r in plan.inputs if r.time == plan.time))
        for name in names:
            yield name, source.read_copy(name)
