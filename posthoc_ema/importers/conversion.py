"""From files of other tools to a store: which tool, which plan, and writing it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from posthoc_ema.codecs import AnyArray, Float32Array, check_codec, decode
from posthoc_ema.errors import (
    ConfigError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
    SnapshotWriteError,
)
from posthoc_ema.importers.average_folders import (
    kind_of_folder,
    plan_average_folder,
    snapshot_paths,
)
from posthoc_ema.importers.edm2 import plan_edm2
from posthoc_ema.importers.lora_files import plan_lora
from posthoc_ema.importers.plans import Contents, ImportOptions, ImportPlan
from posthoc_ema.importers.tensors import LazyTensor
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import SnapshotStore
from posthoc_ema.tensor_files import fsync_directory

_SAMPLE = 1 << 16  # elements of a tensor that tell its rounding error
KINDS = ("edm2", "ema-pytorch", "nitrous", "posthoc-ema", "kohya")
"""Tools whose files can be imported."""


def detect_kind(source: str | os.PathLike[str]) -> str:
    """Which tool wrote a file or a folder: one of `KINDS`, or "store" for a store of ours.

    Raises:
        SnapshotNotFoundError: nothing there looks like files of a known tool.
        SnapshotMismatchError: files of several tools lie there.
    """
    source = Path(source)
    if (source / MANIFEST).exists():
        return "store"
    files = sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []
    found = {
        "edm2": [path for path in files if path.suffix == ".pkl"],
        "*.pt": [path for path, _, _ in snapshot_paths(source)] if source.is_dir() else [],
        "kohya": [path for path in files if path.suffix == ".safetensors"],
    }
    kinds = [kind for kind, paths in found.items() if paths]
    if len(kinds) > 1:
        names = [found[kind][0].name for kind in kinds]
        raise SnapshotMismatchError(
            f"{source} holds files of several tools, such as {names[0]} and {names[1]}. Say which ones "
            "with --from."
        )
    if not kinds:
        raise SnapshotNotFoundError(
            f"{source} {'holds no files of a known tool' if source.exists() else 'does not exist'}: "
            "network snapshots (.pkl), INDEX.STEP.pt or LoRA .safetensors files. Check the path."
        )
    return kind_of_folder(source) if kinds == ["*.pt"] else kinds[0]


def plan_import(
    source: str | os.PathLike[str], kind: str = "auto", options: ImportOptions | None = None
) -> ImportPlan:
    """Look at every file of a source, check that they belong together, and plan the import.

    Nothing in the files is executed, also in pickles: see `restricted_pickle`.

    Args:
        source: a folder, or a single file.
        kind: one of `KINDS`, or "auto" to find out.
        options: what the files do not say.

    Returns:
        The plan, for `write_import`.

    Raises:
        SnapshotNotFoundError: there are no files of that kind.
        SnapshotMismatchError: the files do not belong together; names the file.
        SnapshotFormatError: a file is damaged; names it.
        ConfigError: an option is missing or does not fit.
    """
    source, options = Path(source), options or ImportOptions()
    if kind == "auto":
        kind = detect_kind(source)
    if not source.exists():
        raise SnapshotNotFoundError(f"{source} does not exist. Check the path.")
    if kind == "edm2":
        return plan_edm2(source, options)
    if kind == "kohya":
        return plan_lora(source, options)
    if kind in KINDS:
        return plan_average_folder(source, options, kind)
    raise ConfigError(f"files can be imported from {', '.join(KINDS)}, got {kind!r}.")


def check_new(out: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless a store can be made at `out`: nothing is there, or an empty folder."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty. Choose a new folder.")


def write_import(
    plan: ImportPlan,
    out: str | os.PathLike[str],
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SnapshotStore, list[str]]:
    """Write the store of a plan, one file and one tensor at a time.

    The store is written beside `out` under the name `out.partial` and renamed when it is complete. A
    conversion that was interrupted goes on where it stopped when it is called again.

    Args:
        plan: what to import.
        out: the store's folder; must not exist, or be empty.
        dtype: how averages are stored; by default as in the files (`ImportPlan.dtype`).
        progress: called with (done, total) averages.

    Returns:
        The store, open for reading, and what was noticed while writing, one sentence each.

    Raises:
        ConfigError: `out` holds something already.
        SnapshotWriteError: the store could not be written.
    """
    out, dtype = Path(out), dtype or plan.dtype
    check_codec(dtype)
    check_new(out)
    partial = out.with_name(f"{out.name}.partial")
    run_id = f"{plan.run_id}-{dtype}"
    notes: list[str] = []
    with _open_partial(partial, plan, run_id) as store:
        for done, file in enumerate(plan.files):
            if progress is not None:
                progress(done, len(plan.files))
            with file.open() as found:
                damaged: set[str] = set()
                average = NewAverage(file.profile, dtype, _reader(found, damaged), _noise(found))
                store.add(file.time, [average], replace_raw=False)
            if damaged and not notes:
                notes.append(
                    f"tensor {min(damaged)!r} of {file.path.name} holds infinite values or nan, as the "
                    "tool stored it; every average made of it will, too."
                )
        if progress is not None:
            progress(len(plan.files), len(plan.files))
    try:
        partial.replace(out)
        fsync_directory(out.parent)
    except OSError as error:
        raise SnapshotWriteError(
            f"{partial} is complete but cannot be renamed to {out}: {error.strerror}. Rename it yourself."
        ) from error
    return SnapshotStore.open(out), notes


def _open_partial(partial: Path, plan: ImportPlan, run_id: str) -> SnapshotStore:
    if not (partial / MANIFEST).exists():
        return SnapshotStore.create(
            partial, clock=plan.clock, table=plan.table, run_id=run_id, metadata=plan.metadata
        )
    if SnapshotStore.open(partial).run_id != run_id:
        raise ConfigError(
            f"{partial} is the rest of another conversion. Remove that folder, or choose another --out."
        )
    return SnapshotStore.resume(
        partial, run_id=run_id, clock=plan.clock, table=plan.table, time=plan.files[-1].time
    )


def _noise(found: Contents) -> float:
    """Mean square error that the file's own dtype left in its averages: ulp^2 / 12 of its elements."""
    total, count = 0.0, 0
    for name, tensor in found.tensors.items():
        if name not in found.copied:
            count += math.prod(tensor.shape)
            if tensor.dtype in ("float16", "bfloat16"):
                total += _rounding(tensor.read(), tensor.dtype)
    return total / count if count else 0.0


def _rounding(bits: AnyArray, dtype: str) -> float:
    """Sum of ulp^2 / 12 over the finite elements of a tensor, from a sample of a large one."""
    every = max(1, bits.size // _SAMPLE)
    values = bits.reshape(-1)[::every]
    if dtype == "bfloat16":
        values = (values.astype("<u4") << np.uint32(16)).view("<f4")
    ulp = np.spacing(np.abs(values[np.isfinite(values)])).astype(np.float64)
    ulp *= 2.0**16 if dtype == "bfloat16" else 1.0
    return float(np.sum(ulp**2)) / 12 * every


def _reader(found: Contents, damaged: set[str]) -> Callable[[str], AnyArray]:
    def read(name: str) -> AnyArray:
        tensor = found.tensors[name]
        if name in found.copied:
            return tensor.read()
        values = _float32(tensor)
        if not np.isfinite(values).all():
            damaged.add(name)
        return values

    return read


def _float32(tensor: LazyTensor) -> Float32Array:
    """Values of a tensor of a floating dtype."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is reported
        return decode(tensor.read(), tensor.dtype)
