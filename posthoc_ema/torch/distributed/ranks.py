"""How the processes of a distributed run share the work of one tracker.

Replicas (DistributedDataParallel, or any plain model while a process group is up): the first rank
tracks and writes, the others count. Sharded averages (DTensors, or replicas that split the averages):
every rank tracks what it holds, and the first one keeps the store. What they tell each other goes
through a gloo group of their own, never through those of the training.
"""

from __future__ import annotations

import inspect
import logging
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posthoc_ema.errors import ConfigError, TrackingError
from posthoc_ema.torch.distributed.rank_group import RankGroup
from posthoc_ema.torch.distributed.replicas import TableCheck, other_model
from posthoc_ema.torch.distributed.sharding import (
    Layout,
    is_sharded,
    layout_of,
    local_part,
    ranks_of,
    rows_of,
    stacked,
    whole_from_part,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("posthoc_ema")

_PRIME = 2**61 - 1
_HOLDER = "posthoc_ema_rank"
"""Attribute of sharded averages: whose part they hold. It travels with torch.save, which writes the part of
one rank; all other ranks would take it for theirs."""


def is_distributed() -> bool:
    """Whether a process group of several ranks is up."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


@dataclass
class Ranks:
    """The part of this process in the work of a tracker. Make one with `of`.

    Attributes:
        members: global ranks that share the store, the first of which keeps it.
        rank: this process.
        sharded: whether each rank tracks its own part.
        rows: mesh over which the averages of whole parameters are split by rows; None if parameters
            are tracked as they are cut.
        session: a word that all ranks of a sharded run share from their first meeting on, and that no
            other start of the run has; empty otherwise.
        awaited: whether the other ranks count on this one at the next snapshot.
    """

    members: tuple[int, ...] = (0,)
    rank: int = 0
    sharded: bool = False
    rows: DeviceMesh | None = None
    session: str = ""
    awaited: bool = False
    _layouts: dict[str, Layout] = field(default_factory=dict)
    _writes: frozenset[str] = frozenset()
    _group: Any = None
    _tables: TableCheck | None = None
    _updates: int = 0
    _history: int = 0
    _taken: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        averaged: Collection[str],
        split: bool,
    ) -> Ranks:
        """The part of this process in tracking a module.

        Args:
            module: as the user has it, wrapped or not.
            tensors: name -> tensor that is stored.
            averaged: names of those that are averaged.
            split: split the averages of replicas over the ranks.

        Raises:
            ConfigError: there is nothing to split.
            TrackingError: a tensor cannot be tracked.
        """
        layouts = {name: layout_of(tensor, name) for name, tensor in tensors.items()}
        meshes = [layout.mesh for layout in layouts.values() if layout.mesh is not None]
        if meshes:
            if split:
                raise ConfigError(
                    "shard_averages=True is for replicas; this model is sharded, and its averages are "
                    "already. Leave it out."
                )
            members = tuple(sorted({rank for mesh in meshes for rank in ranks_of(mesh)}))
            _check_writer()
            return cls(members, torch.distributed.get_rank(), True, _layouts=layouts)
        if not is_distributed():
            if split:
                raise ConfigError(
                    "shard_averages=True splits the averages over the ranks of a process group, and there "
                    "is none of several ranks. Leave it out, or call init_process_group first."
                )
            return cls(_layouts=layouts)
        group = replica_group(module)
        members = tuple(torch.distributed.get_process_group_ranks(group))
        rank = torch.distributed.get_rank()
        if not split:
            tables = None if _replica(module) else TableCheck(tensors, rank, len(members))
            return cls(members, rank, _layouts=layouts, _tables=tables)
        _check_writer()
        device = next(iter(tensors.values())).device.type
        rows = _mesh_over(group, len(members), device)
        layouts |= {name: rows_of(tensors[name].shape, rows) for name in averaged}
        return cls(members, rank, True, rows, _layouts=layouts)

    @property
    def tracks(self) -> bool:
        """Whether this process holds averages."""
        return self.sharded or self.writes

    @property
    def several(self) -> bool:
        """Whether there are other ranks, or could be: the model is made for them."""
        return self.sharded or len(self.members) > 1

    @property
    def writes(self) -> bool:
        """Whether this process keeps the store."""
        return self.rank == self.members[0]

    # ---- parts of tensors

    def layout(self, name: str) -> Layout:
        """What this rank holds of a tensor: of the averages of a parameter, or of a copied tensor."""
        return self._layouts[name]

    def parts(self, parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What this rank holds of each parameter: plain tensors, views of the live ones."""
        if not self.sharded:
            return parameters
        with torch.no_grad():  # once for all: at every step, it costs more than the views
            if self.rows is not None:
                return {n: p.detach()[self._rows_of(n)] for n, p in parameters.items()}
            parts: Any = parameters
            return {n: p.to_local() if is_sharded(p) else p.detach() for n, p in parts.items()}

    def _rows_of(self, name: str) -> slice | tuple[()]:
        layout = self._layouts[name]
        if not layout.shape:
            return ()
        return slice(layout.offsets[0], layout.offsets[0] + layout.local_shape[0])

    def whole(self, name: str, part: torch.Tensor, rows: int = 0) -> torch.Tensor:
        """An average of which this rank holds `part`: a DTensor, or the part itself if it is all.

        Args:
            name: of the parameter.
            part: (*local_shape), or (rows, *local_shape) for averages on top of each other.
            rows: so many; 0 for one without that dimension.
        """
        if not self.sharded:
            return part
        layout = self.layout(name)
        tensor = whole_from_part(part, stacked(layout, rows) if rows else layout)
        setattr(tensor, _HOLDER, self.rank)
        return tensor

    def part_of_stack(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """What this rank needs of the saved averages of a parameter.

        Args:
            name: of the parameter.
            stack: (num_profiles, *shape), whole, or a DTensor that is cut as the averages here are.

        Raises:
            TrackingError: it is the part of another rank, or is cut otherwise.
        """
        wanted = stacked(self.layout(name), len(stack))
        if not is_sharded(stack):
            return stack.detach()[wanted.box]
        holder, found = getattr(stack, _HOLDER, self.rank), layout_of(stack, name)
        if holder != self.rank or found.box != wanted.box:
            raise TrackingError(
                f"the saved averages of {name!r} are the part of rank {holder}, {found.local_shape} from "
                f"{found.offsets} on; rank {self.rank} holds {wanted.local_shape} from {wanted.offsets} "
                "on. Save and load a sharded state on all ranks by torch.distributed.checkpoint, into "
                "what tracker.state_dict() gives."
            )
        return local_part(stack)

    # ---- meeting

    def arrive(self) -> None:
        """Wait until every rank of a sharded run is here: what they have read before may change now.

        Raises:
            TrackingError: a rank did not come.
        """
        if self._group is None:
            self._group = RankGroup.meet(self.members)
        else:
            self._group.gather(None)

    def meet(
        self, agreed: Mapping[str, Any], first: Mapping[str, Any], problem: str | None
    ) -> dict[str, Any]:
        """All ranks of a sharded run, who have arrived, check what must agree and share the writing.

        Args:
            agreed: what must be the same on all ranks; JSON.
            first: what the first rank tells the others; JSON.
            problem: why this rank cannot track, or None.

        Returns:
            What the first rank gave as `first`.

        Raises:
            TrackingError: a rank cannot track, or differs.
        """
        layouts = {name: self.layout(name) for name in self._layouts}
        shapes = {name: list(layout.shape) for name, layout in layouts.items()}
        mine = {
            "problem": problem,
            "agreed": {**agreed, "shapes": shapes},
            "boxes": {n: [layout.offsets, layout.local_shape] for n, layout in layouts.items()},
            "first": {**first, "session": secrets.token_hex(8)},
        }
        told = self.group.gather(mine)
        _check_agreement(self.members, told)
        self._writes = _share(self.members.index(self.rank), [row["boxes"] for row in told], shapes)
        self.session = told[0]["first"]["session"]
        self.awaited = True
        return told[0]["first"]

    @property
    def group(self) -> RankGroup:
        """The ranks' own group; there once they have arrived."""
        assert self._group is not None
        return self._group

    # ---- snapshots

    def updated(self, time: int) -> None:
        """Note that the averages here now stand at `time`; ranks whose clocks differ find out by it."""
        self._updates += 1
        self._history = (self._history * 1_000_003 + time) % _PRIME

    def begin_snapshot(self) -> None:
        """Note where a snapshot is taken: it may be stored many updates later.

        Raises:
            TrackingError: the ranks hold different models.
        """
        self._taken = self._updates, self._history
        if self._tables is not None:
            self._tables.look()

    def is_written_here(self, name: str) -> bool:
        """Whether this rank is the one that writes its part of a tensor."""
        return name in self._writes if self.sharded else self.writes

    def clock(self, time: int) -> dict[str, int]:
        """What all ranks must agree on about a snapshot that has been taken.

        Args:
            time: of the snapshot.

        Returns:
            The time, how many updates led to it, and a number for the times of all of them.
        """
        updates, history = self._taken
        return {"time": time, "updates": updates, "history": history}

    def check_clocks(self, clocks: Sequence[Mapping[str, int]]) -> None:
        """Compare what `clock` gave on each of the members.

        Raises:
            TrackingError: they differ: the shards have been averaged with different weights.
        """
        first = clocks[0]
        for rank, clock in zip(self.members, clocks, strict=True):
            key = next((key for key in first if clock[key] != first[key]), None)
            if key is None:
                continue
            pair = f"{clock[key]} on rank {rank} and {first[key]} on rank {self.members[0]}"
            found = {
                "time": f"time is {pair}",
                "updates": f"the number of updates up to time {first['time']} is {pair}",
                "history": f"rank {rank} came to time {first['time']} by other times than the first rank",
            }
            raise TrackingError(
                f"{found[key]}: give `advance` the global batch, the same on every rank, and call "
                "`snapshot` on every rank. Their averages do not fit together any more: start again "
                "from a checkpoint before they differed."
            )


def _check_writer() -> None:
    """Parts of snapshots are written by a class of PyTorch that is younger than DTensor."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError:
        found = False
    else:
        found = "save_distributed" in inspect.signature(HuggingFaceStorageWriter).parameters
    if not found:
        raise TrackingError(
            f"sharded averages need HuggingFaceStorageWriter(save_distributed=True) of "
            f"torch.distributed.checkpoint, which PyTorch {torch.__version__} lacks. Upgrade PyTorch."
        )


def replica_group(module: nn.Module) -> Any:
    """The process group over which a module is replicated; that of all ranks if nothing says it."""
    replica = _replica(module)
    return torch.distributed.group.WORLD if replica is None else replica.process_group


def _replica(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    kind = nn.parallel.DistributedDataParallel
    return next((part for part in module.modules() if isinstance(part, kind)), None)


def _mesh_over(group: Any, size: int, device: str) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if size == torch.distributed.get_world_size():
        return init_device_mesh(device, (size,))
    return DeviceMesh.from_group(group, device)


def _check_agreement(members: Sequence[int], told: Sequence[Any]) -> None:
    for rank, row in zip(members, told, strict=True):
        if row["problem"] is not None:
            raise TrackingError(
                row["problem"] if rank == members[0] else f"rank {rank}: {row['problem']}"
            )
    first = told[0]["agreed"]
    for rank, row in zip(members, told, strict=True):
        for key, value in row["agreed"].items():
            if value == first[key]:
                continue
            if key == "shapes":
                name = next(n for n in (*first[key], *value) if value.get(n) != first[key].get(n))
                raise other_model(
                    f"tensor {name!r} has shape {value.get(name)} on rank {rank} and "
                    f"{first[key].get(name)} on rank {members[0]}"
                )
            raise TrackingError(
                f"{key} is {value} on rank {rank} and {first[key]} on rank {members[0]}. Make the "
                "tracker alike on every rank, and load the same state on every rank."
            )


def _share(
    index: int, boxes: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]
) -> frozenset[str]:
    """Names of the tensors of which member `index` writes its part: of equal parts the first rank's.

    Raises:
        TrackingError: the parts do not make up the whole.
    """
    mine = set()
    for name, shape in shapes.items():
        owners: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for member, rank_boxes in enumerate(boxes):
            offsets, sizes = (tuple(numbers) for numbers in rank_boxes[name])
            if math.prod(sizes) or (member == 0 and not math.prod(shape)):
                owners.setdefault((offsets, sizes), member)
        if sum(math.prod(sizes) for _, sizes in owners) != math.prod(shape):
            raise TrackingError(
                f"the parts that the ranks hold of {name!r} do not make up its shape {tuple(shape)}. "
                "Shard it by fully_shard or distribute_tensor."
            )
        if index in owners.values():
            mine.add(name)
    return frozenset(mine)
