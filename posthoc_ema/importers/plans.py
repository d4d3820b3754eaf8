"""What an import will do, as plain records: which files, which averages, which tensors; and its checks."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from posthoc_ema.codecs import DTYPE_CODES, FLOATING, storage_dtype
from posthoc_ema.errors import ConfigError, SnapshotFormatError, SnapshotMismatchError
from posthoc_ema.importers.tensors import CountTensor, LazyTensor, PickledTensor
from posthoc_ema.profiles import (
    GammaProfile,
    PowerProfile,
    gamma_from_sigma_rel,
    sigma_rel_from_gamma,
)
from posthoc_ema.snapshot import StoredProfile, TensorEntry, TensorTable, label_of

_COPIED_ENDINGS = ("running_mean", "running_var", "num_batches_tracked")
_MOST_TIMES = 16  # bytes of tensors per byte of their file
_COMPILED = "_orig_mod."  # what torch.compile adds to names
_COUNTERS = ("num_batches_tracked",)


@dataclass(frozen=True)
class ImportOptions:
    """What the user tells about files that do not say it themselves.

    Attributes:
        sigma_rels: lengths that were tracked, in the order in which they were passed to the tool.
        update_every: steps from one update of the averages to the next, in tools that use the decay of
            one step whatever that number is.
        batch_size: images per step, for image clocks that were rounded to thousands.
        times: the snapshots' exact times, rising, one for each time that the file names tell apart.
    """

    sigma_rels: tuple[float, ...] = ()
    update_every: int | None = None
    batch_size: int | None = None
    times: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("update_every", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if any(b <= a for a, b in zip((0, *self.times), self.times, strict=False)):
            raise ConfigError(f"times must be positive and rise, got {list(self.times)}.")


@dataclass(frozen=True)
class Contents:
    """The tensors of one foreign file.

    Attributes:
        tensors: name -> tensor, in the file's order; tied ones once.
        copied: names of buffers, which are carried over bit by bit and never averaged.
        aliases: further names of tied tensors.
    """

    tensors: dict[str, LazyTensor]
    copied: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)

    def table(self) -> TensorTable:
        """Its tensor table."""
        entries = {
            name: TensorEntry(name, tensor.shape, tensor.dtype, name not in self.copied)
            for name, tensor in self.tensors.items()
        }
        return TensorTable(entries, self.aliases)


Open = Callable[[], contextlib.AbstractContextManager[Contents]]


@dataclass(frozen=True)
class SourceFile:
    """One foreign file that holds one average.

    Attributes:
        path: the file.
        time: training time, exact.
        profile: which average it holds.
        open: opens it.
    """

    path: Path
    time: int
    profile: StoredProfile
    open: Open


@dataclass(frozen=True)
class ImportPlan:
    """What an import will do.

    Attributes:
        kind: which tool wrote the files.
        clock: unit of the times.
        files: by time, then by length.
        table: the tensors, the same in every file.
        metadata: carried into the store.
        notes: what was assumed or left out, one sentence each.
    """

    kind: str
    clock: str
    files: tuple[SourceFile, ...]
    table: TensorTable
    metadata: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """Id of the imported run: the same files and options give the same."""
        digest = xxhash.xxh3_64()
        for file in self.files:
            status = file.path.stat()
            facts = (file.path.name, status.st_size, status.st_mtime_ns, file.time, file.profile)
            digest.update(repr(facts).encode("utf-8", "surrogateescape"))
        return f"{self.kind}-{digest.hexdigest()}"

    @property
    def dtype(self) -> str:
        """The dtype that keeps the files' values: their own if they agree on one, else float32."""
        dtypes = {entry.dtype for entry in self.table.entries.values() if entry.averaged}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= {"float16", "bfloat16"} else "float32"


def contents(path: Path, named: Mapping[str, object], copied: Sequence[str] = ()) -> Contents:
    """Sort named tensors into averages, copies and aliases.

    Names lose what torch.compile added to them. What is not of a floating dtype is copied, and so is what
    batch norm calls its statistics. Counters that a tool cast to a float become whole numbers again.

    Raises:
        SnapshotFormatError: a value is no tensor, or of a dtype that a store cannot hold.
    """
    tensors: dict[str, LazyTensor] = {}
    aliases: dict[str, str] = {}
    kept = {name.replace(_COMPILED, "") for name in copied}
    seen: dict[object, str] = {}
    for full_name, value in named.items():
        name = full_name.replace(_COMPILED, "")
        if name in tensors or name in aliases:
            raise SnapshotFormatError(
                f"{path}: holds {name!r} twice, with and without the {_COMPILED!r} of a compiled model. "
                "Take the one that is not wanted out of the file."
            )
        tensor = _tensor(path, name, value)
        if isinstance(value, PickledTensor) and value.size:
            first = seen.setdefault(value.view, name)
            if first != name:
                aliases[name] = first
                continue
        ending = name.rpartition(".")[2]
        if ending in _COUNTERS and tensor.dtype in FLOATING:
            tensor = CountTensor(tensor)
        if tensor.dtype not in FLOATING or ending in _COPIED_ENDINGS:
            kept.add(name)
        tensors[name] = tensor
    if sum(map(_num_bytes, tensors.values())) > _MOST_TIMES * path.stat().st_size:
        raise SnapshotFormatError(
            f"{path}: its tensors overlap so much that they hold far more than the file. No tool writes "
            "such files; get it from a source that you trust."
        )
    if not tensors:
        raise SnapshotFormatError(
            f"{path}: holds no tensors. Give the files that the tool stored its averages in."
        )
    return Contents(tensors, frozenset(kept & set(tensors)), aliases)


def _tensor(path: Path, name: str, value: Any) -> LazyTensor:
    value = getattr(value, "tensor", value)  # of a NumPy array
    if not isinstance(value, LazyTensor):
        raise SnapshotFormatError(
            f"{path}: {name!r} is no tensor but {type(value).__name__}. Tensor subclasses (DTensor, "
            "quantized ones) are not read; save the plain tensors."
        )
    if value.dtype not in DTYPE_CODES:
        raise SnapshotFormatError(f"{path}: tensor {name!r} has the unknown dtype {value.dtype}.")
    return value


def plan_files(
    kind: str,
    clock: str,
    files: Sequence[SourceFile],
    metadata: Mapping[str, str],
    notes: Sequence[str],
) -> ImportPlan:
    """Check that all files are of one run, reading their descriptions one by one, and plan the import.

    Raises:
        SnapshotMismatchError: two files hold the same average, or different tensors.
        SnapshotFormatError: a file is damaged.
    """
    ordered = sorted(files, key=lambda f: (f.time, label_of(f.profile)))
    for a, b in itertools.pairwise(ordered):
        if (a.time, a.profile) == (b.time, b.profile):
            raise SnapshotMismatchError(
                f"{a.path} and {b.path.name} hold the same average, {label_of(a.profile)} at time "
                f"{a.time}: two runs in one folder? Keep the files of one run there."
            )
    table: TensorTable | None = None
    for file in ordered:
        with file.open() as found:
            given = found.table()
        if table is None:
            table = given
        difference = _difference(table, given, ordered[0].path.name)
        if difference:
            raise SnapshotMismatchError(
                f"{file.path}: {difference}. All files must come from one run and one model; keep "
                "those of another one in a folder of their own."
            )
    assert table is not None, "an importer that finds no files says so itself"
    return ImportPlan(
        kind, clock, tuple(ordered), table, metadata, (*notes, *_gaps(ordered), *_ages(ordered))
    )


def _num_bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * storage_dtype(tensor.dtype).itemsize


def _difference(first: TensorTable, given: TensorTable, name: str) -> str:
    """First difference between two files' tensors, in words."""
    for key in (*first.entries, *given.entries):
        a, b = first.entries.get(key), given.entries.get(key)
        if a is None or b is None:
            has, lacks = ("it", name) if a is None else (name, "it")
            return f"{has} holds a tensor {key!r}, which {lacks} lacks"
        if a != b:
            return f"tensor {key!r} is {b.dtype} {b.shape}, but {a.dtype} {a.shape} in {name}"
    if first.aliases != given.aliases:
        return f"other tensors are tied in it than in {name}"
    return ""


def _gaps(files: Sequence[SourceFile]) -> list[str]:
    """A note if some times hold fewer averages than others."""
    counts: dict[int, int] = {}
    for file in files:
        counts[file.time] = counts.get(file.time, 0) + 1
    most = max(counts.values())
    fewer = [time for time, count in counts.items() if count < most]
    if not fewer:
        return []
    return [f"{len(fewer)} of {len(counts)} times lack an average, the first is {fewer[0]}."]


def _ages(files: Sequence[SourceFile]) -> list[str]:
    """A note if a file of an earlier time is clearly younger than one of a later time."""
    newest = 0.0
    for time, (path, age) in sorted((f.time, (f.path, f.path.stat().st_mtime)) for f in files):
        del time
        if age < newest - 60.0:
            return [
                f"{path.name} is older than files of earlier times: if two runs wrote to this folder, "
                "the averages are mixed."
            ]
        newest = max(newest, age)
    return []


def tracked_profile(time: int, sigma_rel: float, update_every: int) -> PowerProfile | GammaProfile:
    """What a tool tracked that uses the decay of one step but updates every `update_every` steps.

    With beta = (1 - 1/t)^(gamma+1) applied once in k steps, the share of the first t' steps at t is
    (t'/t)^((gamma+1)/k): a power profile of gamma_eff = (gamma+1)/k - 1. Below 0, where no sigma_rel
    names it, early weights count most.

    Args:
        time: end of the profile, > 0.
        sigma_rel: the length that was asked for.
        update_every: k.

    Example:
        >>> tracked_profile(1000, 0.05, 1)
        PowerProfile(t=1000, sigma_rel=0.05)
        >>> label_of(tracked_profile(1000, 0.05, 10))[:16]
        'sigma_rel-0.2459'
        >>> label_of(tracked_profile(1000, 0.10, 10))[:12]
        'gamma--0.206'
    """
    if update_every == 1:
        return PowerProfile(time, sigma_rel)
    gamma = (float(gamma_from_sigma_rel(sigma_rel)) + 1) / update_every - 1
    return GammaProfile(time, gamma) if gamma < 0 else PowerProfile(time, _sigma_rel(gamma))


def _sigma_rel(gamma: float) -> float:
    return float(sigma_rel_from_gamma(gamma))
