"""Synthesis: plan which stored averages are combined how, then stream them through once.

The plan is plain numbers (`plan_synthesis`); executing it (`synthesize`, `synthesize_to_files`) reads
every needed byte once, a tile of elements at a time from all files, and combines it into all targets.
Memory is bounded by the tile, not by the model, the number of snapshots or their size.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_ema.codecs import (
    FLOAT8,
    FLOATING,
    AnyArray,
    Float32Array,
    decode,
    encode,
    storage_dtype,
)
from posthoc_ema.errors import (
    ConfigError,
    PhemaWarning,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SynthesisError,
)
from posthoc_ema.fitting import FitNorm, fit
from posthoc_ema.profiles import PointProfile, PowerProfile
from posthoc_ema.snapshot import METADATA_KEY, SnapshotRecord
from posthoc_ema.store import SnapshotStore
from posthoc_ema.tensor_files import Header, TensorFile, TensorFileWriter, TensorInfo

TILE = 1 << 18
"""Elements that are combined at once. 2^18 keeps a tile of 31 targets in 32 MiB."""
_GROUP = 32  # files whose tiles are in memory together

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
    for block in combine(store, plan):
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
    total = sum(_size(e.shape) for e in entries.values() if e.averaged)
    done = 0
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(TensorFileWriter(path, layout, _provenance(store, plan, i)))
            for i, path in enumerate(paths)
        ]
        for block in combine(store, plan):
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


@dataclass(frozen=True)
class Block:
    """A run of elements of one averaged tensor, for all targets.

    Attributes:
        name: the tensor.
        start: index of its first element in the flattened tensor.
        values: float32, shape (num_targets, num_elements); valid until the next block.
    """

    name: str
    start: int
    values: Float32Array


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `stop` of one tensor, at `position` in the tile."""

    name: str
    start: int
    stop: int
    position: int


def combine(store: SnapshotStore, plan: SynthesisPlan) -> Iterator[Block]:
    """Stream all averaged tensors of a plan; every byte of the inputs is read once and checked.

    Args:
        store: where the averages are.
        plan: from `plan_synthesis`.

    Yields:
        Blocks in the order of the tensor table.

    Raises:
        SnapshotFormatError: a file is missing or damaged; the message names it and the tensor.
    """
    sources = [_Source.open(store, record) for record in plan.inputs]
    sizes = {e.name: _size(e.shape) for e in store.table.entries.values() if e.averaged}
    weights = np.ascontiguousarray(plan.coefficients.T, dtype=np.float32)
    raw_targets = [i for i, s in enumerate(plan.sigma_rels) if s == RAW]
    # The buffers serve all tiles: fresh ones would cost more in page faults than the arithmetic.
    num_targets, width = len(plan.sigma_rels), min(TILE, sum(sizes.values()))
    total, product = (np.empty((num_targets, width), dtype=np.float32) for _ in range(2))
    values = np.empty((min(_GROUP, len(sources)), width), dtype=np.float32)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for tile in _tiles(sizes):
            length = tile[-1].position + tile[-1].stop - tile[-1].start
            total[:, :length] = 0
            for first in range(0, len(sources), _GROUP):
                group = sources[first : first + _GROUP]
                read = values[: len(group), :length]
                list(pool.map(_Source.read, group, [tile] * len(group), read))
                with np.errstate(over="ignore", invalid="ignore"):  # inf and nan of the inputs
                    np.matmul(weights[:, first : first + len(group)], read, out=product[:, :length])
                    total[:, :length] += product[:, :length]
            # The raw weights are the last input. Copied, because 0 times an average that holds inf or
            # nan is nan.
            total[raw_targets, :length] = read[-1]
            for piece in tile:
                span = slice(piece.position, piece.position + piece.stop - piece.start)
                yield Block(piece.name, piece.start, total[:, span])


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _tiles(sizes: dict[str, int]) -> Iterator[list[_Piece]]:
    """Cut the tensors, in order, into tiles of at most TILE elements; small ones share a tile."""
    tile: list[_Piece] = []
    position = 0
    for name, size in sizes.items():
        start = 0
        while True:
            stop = min(size, start + TILE - position)
            tile.append(_Piece(name, start, stop, position))
            position, start = position + stop - start, stop
            if position == TILE:
                yield tile
                tile, position = [], 0
            if start == size:
                break
    if tile:
        yield tile


@dataclass
class _Source:
    """One input file: its header, and the running checksum of the tensor that is being read."""

    path: Path
    header: Header
    digests: dict[str, str]
    hasher: Any = field(default_factory=xxhash.xxh3_64)

    @staticmethod
    def open(store: SnapshotStore, record: SnapshotRecord) -> _Source:
        header, digests = store.header(record)
        return _Source(store.path(record), header, digests)

    def read(self, tile: list[_Piece], out: Float32Array) -> None:
        """Read a tile as float32 into `out`, shape (tile length,)."""
        with TensorFile(self.path, self.header) as file:
            for run in self._runs(tile):
                first, last = run[0], run[-1]
                begin = self._position(first[0], first[1].start)
                data = file.read_bytes(begin, self._position(last[0], last[1].stop))
                for info, piece in run:
                    at = self._position(info, piece.start) - begin
                    raw = data[at : at + (piece.stop - piece.start) * info.itemsize]
                    self._check(info, piece, raw)
                    span = slice(piece.position, piece.position + piece.stop - piece.start)
                    decode(raw.view(storage_dtype(info.dtype)), info.dtype, out[span])

    @staticmethod
    def _position(info: TensorInfo, element: int) -> int:
        return info.start + element * info.itemsize

    def _runs(self, tile: list[_Piece]) -> Iterator[list[tuple[TensorInfo, _Piece]]]:
        """Group pieces whose bytes follow on each other, so that each group is one read."""
        run: list[tuple[TensorInfo, _Piece]] = []
        end = -1
        for piece in tile:
            info = self.header.tensors[piece.name]
            if run and self._position(info, piece.start) != end:
                yield run
                run = []
            run.append((info, piece))
            end = self._position(info, piece.stop)
        if run:
            yield run

    def _check(self, info: TensorInfo, piece: _Piece, raw: AnyArray) -> None:
        if piece.start == 0:
            self.hasher.reset()
        self.hasher.update(raw.data)
        if piece.stop == info.size and self.hasher.hexdigest() != self.digests[info.name]:
            raise SnapshotFormatError(
                f"{self.path}: the data of tensor {info.name!r} is damaged (checksum). Restore the "
                "file from a copy; `phema verify` lists all damaged files, `phema verify --drop` "
                "goes on without them."
            )


def _read_copies(store: SnapshotStore, plan: SynthesisPlan) -> Iterator[tuple[str, AnyArray]]:
    """Buffers and frozen parameters of the target's time, as stored."""
    names = [e.name for e in store.table.entries.values() if not e.averaged]
    if not names:
        return
    source = _Source.open(store, next(r for r in plan.inputs if r.time == plan.time))
    with TensorFile(source.path, source.header) as file:
        for name in names:
            info = source.header.tensors[name]
            values = file.read(name)
            source._check(info, _Piece(name, 0, info.size, 0), values.reshape(-1).view(np.uint8))
            yield name, values
