"""Snapshots of sharded averages: each rank writes what it holds, the first rank makes them the store's.

Parts go through torch.distributed.checkpoint into a folder inside the store, as safetensors files that
say where each part belongs. The first rank reads them by their offsets, chunk by chunk, encodes them as
it would whole tensors, and commits; so the store is bit for bit that of a run of one process, and its
format knows nothing of ranks. No tensor travels between ranks, and no process group of the training is
used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from posthoc_ema.codecs import AnyArray, Float32Array, decode, storage_dtype
from posthoc_ema.errors import (
    SnapshotFormatError,
    SnapshotWriteError,
    TrackingError,
)
from posthoc_ema.profiles import PointProfile
from posthoc_ema.snapshot import SnapshotRecord, TensorEntry
from posthoc_ema.snapshot_files import Source
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.distributed_checkpoints import rank_shards, read_rank_shards
from posthoc_ema.synthesis.foreign_tensors import FlatTensor
from posthoc_ema.torch.distributed.ranks import Ranks
from posthoc_ema.torch.distributed.sharding import Layout
from posthoc_ema.torch.snapshots import TakenSnapshot

_PARTS = ".parts-"
"""Folders inside a store in which parts lie while a snapshot is written."""
_COPIED = "copied"


def store_parts(
    ranks: Ranks,
    folder: Path,
    store: SnapshotStore | None,
    taken: TakenSnapshot,
    dtype: str,
    *,
    replace_raw: bool,
) -> list[SnapshotRecord]:
    """Store one snapshot of sharded averages; all ranks call this, each with its parts.

    Args:
        ranks: which have met.
        folder: of the store, which all ranks see.
        store: open for writing on the first rank; None on the others.
        taken: the parts that this rank writes.
        dtype: how averages are stored.
        replace_raw: remove raw weights of earlier times.

    Returns:
        The new records, on every rank; empty if this time is stored already.

    Raises:
        SnapshotWriteError: a rank could not write its parts, or the first one the store; on all ranks.
        TrackingError: a rank has stopped tracking, or is gone; on all ranks.
    """
    parts = folder / f"{_PARTS}{taken.time:012d}"
    try:
        problem = None
        if store is not None:
            problem = _attempt(lambda: _make_room(parts))
        _agree_to_begin(ranks, problem, taken.time)
        _agree(ranks, _attempt(lambda: _write_parts(parts / f"{ranks.rank:05d}", taken, ranks)))
        records: list[SnapshotRecord] = []
        problem = None
        if store is not None:
            problem = _attempt(
                lambda: records.extend(_add(store, parts, taken, dtype, replace_raw))
            )
        told = _agree(ranks, problem, [record.to_json() for record in records])
        return [SnapshotRecord.from_json(row) for row in told[0]]
    finally:
        if store is not None:
            shutil.rmtree(parts, ignore_errors=True)


def give_notice(ranks: Ranks, problem: str) -> None:
    """Tell the other ranks, where they begin a snapshot, that this one has stopped tracking."""
    ranks.awaited = False
    ranks.group.gather({"problem": problem, "is_write": False, "value": None})


def remove_left_parts(folder: Path) -> None:
    """Remove what killed ranks left. The first rank calls this before the ranks meet."""
    for path in folder.glob(f"{_PARTS}*"):
        shutil.rmtree(path, ignore_errors=True)


# ---- agreeing


@dataclass(frozen=True)
class _Problem:
    error: Exception

    @property
    def is_write(self) -> bool:
        """Whether only this snapshot is lost, and the next one may succeed."""
        return isinstance(self.error, OSError)


def _attempt(action: Callable[[], object]) -> _Problem | None:
    """Run `action`; what it raises is kept until all ranks have heard of it."""
    try:
        action()
    except Exception as error:
        return _Problem(error)
    return None


def _agree_to_begin(ranks: Ranks, problem: _Problem | None, time: int) -> None:
    """The first agreement: the ranks are about to store the same."""
    clocks = _agree(ranks, problem, ranks.clock(time), begins=True)
    try:
        ranks.check_clocks(clocks)
    except TrackingError:
        ranks.awaited = False  # all have seen the same
        raise


def _agree(
    ranks: Ranks, problem: _Problem | None, value: Any = None, *, begins: bool = False
) -> list[Any]:
    """Hear of all ranks' problems; raises on every rank if there is one.

    Returns:
        The values of all ranks.
    """
    mine = {
        "problem": None if problem is None else str(problem.error) or type(problem.error).__name__,
        "is_write": problem is not None and problem.is_write,
        "value": value,
    }
    try:
        told = ranks.group.gather(mine, begins=begins)
    except TrackingError:
        ranks.awaited = False
        raise
    bad = {ranks.members[i]: row for i, row in enumerate(told) if row["problem"] is not None}
    ends = {rank: row for rank, row in bad.items() if not row["is_write"]}
    if ends:
        ranks.awaited = False  # all have heard that tracking ends
    if problem is not None and problem.is_write == (not ends):
        raise problem.error
    for rank, row in (ends or bad).items():
        kind = TrackingError if ends else SnapshotWriteError
        raise kind(f"rank {rank}: {row['problem']}")
    return [row["value"] for row in told]


# ---- writing parts


def _make_room(parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)


def _write_parts(folder: Path, taken: TakenSnapshot, ranks: Ranks) -> None:
    """Write this rank's parts, as files of torch.distributed.checkpoint."""
    items: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
    for index, tensors in enumerate(taken.averages.values()):
        items |= {_key(index, name): (tensors, name) for name in tensors}
    items |= {_key(_COPIED, name): (taken.copied, name) for name in taken.copied}
    if not items:
        return
    planner = _PartsPlanner(
        {key: (tensors, name, ranks.layout(name)) for key, (tensors, name) in items.items()}
    )
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        # What torch.distributed.checkpoint.save does, without its collectives: the ranks have shared
        # the work when they met, so each plans for itself, and the training's groups stay out of it.
        writer.reset()
        writer.set_up_storage_writer(is_coordinator=True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        (plan,) = writer.prepare_global_plan([plan])
        results = writer.write_data(plan, planner)
        results.wait()
        writer.finish(Metadata({}), [results.value()])
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder}: parts of a snapshot could not be written: {error.strerror or error}. Check the "
            "folder and its permissions on all nodes; what was stored before is untouched."
        ) from error


def _key(kind: int | str, name: str) -> str:
    return f"{kind}:{name}"


class _PartsPlanner(SavePlanner):
    """Plans the writing of parts whose places are known; nothing is looked up in a state_dict.

    Args:
        parts: key -> (tensors, name of the part among them, its place).
    """

    def __init__(self, parts: Mapping[str, tuple[Mapping[str, torch.Tensor], str, Layout]]) -> None:
        self._parts = parts

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to do: the parts are known."""

    def create_local_plan(self) -> SavePlan:
        """One piece for each part."""
        return SavePlan([self._item(key) for key in self._parts])

    def _item(self, key: str) -> WriteItem:
        tensors, name, layout = self._parts[key]
        offsets = torch.Size(layout.offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size(layout.local_shape)),
            properties=TensorProperties(dtype=tensors[name].dtype),
            size=torch.Size(layout.shape),
        )
        return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan of the one rank that it is made on."""
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to do."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The part itself, in host memory."""
        tensors, name, _ = self._parts[write_item.index.fqn]
        return tensors[name].detach().cpu().contiguous()


# ---- reading them into the store


def _add(
    store: SnapshotStore, parts: Path, taken: TakenSnapshot, dtype: str, replace_raw: bool
) -> list[SnapshotRecord]:
    files = [path for rank in sorted(parts.iterdir()) for path in rank_shards(rank)]
    tensors = read_rank_shards(files)
    new = [
        (NewAverage(profile, dtype, _unused), PartsSource(tensors, index))
        for index, profile in enumerate(taken.averages)
        if store.find(taken.time, profile) is None
    ]
    has_raw = any(isinstance(average.profile, PointProfile) for average, _ in new)
    replaced = [
        record.file
        for record in store.records
        if replace_raw and has_raw and isinstance(record.profile, PointProfile)
    ]
    return store.add_sources(taken.time, new, replaced)


def _unused(name: str) -> AnyArray:
    raise AssertionError(name)  # the values come from a source


class PartsSource(Source):
    """Values of one average whose parts several ranks have written.

    Args:
        tensors: what they have written, by key.
        kind: which average.
    """

    def __init__(self, tensors: Mapping[str, FlatTensor], kind: int) -> None:
        self._tensors, self._kind = tensors, kind

    def values(self, entry: TensorEntry, start: int, stop: int) -> Float32Array:
        """Elements `start` to `stop`, float32."""
        if start == stop:  # of an empty tensor the ranks write no parts, or some of them do
            return np.empty(0, np.float32)
        tensor = self._tensor(self._kind, entry)
        return decode(tensor.read(start, stop), tensor.dtype)

    def copy(self, entry: TensorEntry) -> AnyArray:
        """The whole tensor, as its own bits."""
        size = torch.Size(entry.shape).numel()
        if size == 0:
            return np.empty(entry.shape, storage_dtype(entry.dtype))
        tensor = self._tensor(_COPIED, entry)
        return tensor.read(0, size).reshape(entry.shape)

    def _tensor(self, kind: int | str, entry: TensorEntry) -> FlatTensor:
        tensor = self._tensors.get(_key(kind, entry.name))
        if tensor is None or tensor.shape != entry.shape:
            found = "no part" if tensor is None else f"parts of shape {tensor.shape}"
            raise SnapshotFormatError(
                f"the first rank finds {found} of {entry.name!r}, which has shape {entry.shape}. Put the "
                "store on a file system that all nodes share."
            )
        return tensor
