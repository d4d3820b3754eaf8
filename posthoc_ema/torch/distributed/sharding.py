"""Tensors of which each rank holds a part: DTensors of FSDP2, HSDP and tensor parallelism.

A `Layout` says in plain numbers which box of a whole tensor this rank holds; everything else (updating,
storing, resuming) works on local tensors and boxes. Where a box lies is told by
`torch.distributed.tensor`, so uneven shards, empty ones and meshes of several dimensions come out as
PyTorch has cut them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from posthoc_ema.errors import TrackingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Which part of a tensor this rank holds.

    Attributes:
        shape: of the whole tensor.
        offsets: where the part begins in each dimension; the end of the tensor for some empty parts.
        local_shape: of the part; a dimension may be 0.
        mesh: devices that the tensor is spread over; None if this rank holds all of it.
        placements: how, one for each dimension of the mesh.
    """

    shape: Shape
    offsets: Shape
    local_shape: Shape
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements that this rank holds."""
        return math.prod(self.local_shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """The part as an index into the whole tensor."""
        return tuple(
            slice(offset, offset + length)
            for offset, length in zip(self.offsets, self.local_shape, strict=True)
        )

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank comes first among those of the mesh that hold the same part."""
        if self.mesh is None:
            return True
        place = self.mesh.get_coordinate()
        return place is not None and all(
            number == 0
            for number, placement in zip(place, self.placements, strict=True)
            if placement.is_replicate()
        )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor; the module that defines them is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def layout_of(tensor: torch.Tensor, name: str = "a tensor") -> Layout:
    """The layout of a tensor of any kind.

    Args:
        tensor: a plain tensor, or a DTensor.
        name: its name, for the message.

    Raises:
        TrackingError: the DTensor holds partial sums, or a part that is no box.
    """
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Layout(shape, (0,) * len(shape), shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise TrackingError(
            f"{name!r} is a DTensor of partial sums ({placements}), which is no weight yet. Redistribute "
            "it to Shard or Replicate before tracking."
        )
    local_shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    layout = Layout(shape, tuple(offsets), tuple(local_shape), mesh, placements)
    if tuple(local_part(tensor).shape) != layout.local_shape:
        raise TrackingError(
            f"{name!r} is cut as no placement says: this rank holds {tuple(local_part(tensor).shape)} of "
            f"{shape}, {placements} means {layout.local_shape}. Build it by distribute_tensor or "
            "fully_shard, which cut uneven shapes as DTensor does."
        )
    return layout


def ranks_of(mesh: DeviceMesh) -> list[int]:
    """Global ranks of the mesh that this one is a slice of: its other slices may hold copies of a model."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    ranks: list[int] = root.mesh.flatten().tolist()
    return ranks


def own_rank(mesh: DeviceMesh) -> int:
    """Global rank of this process, which the mesh knows when the process group is gone as well."""
    return int(mesh.mesh[tuple(mesh.get_coordinate() or ())])


def rows_of(shape: Sequence[int], mesh: DeviceMesh) -> Layout:
    """The layout that spreads a tensor over a mesh of one dimension, by rows as fully_shard does.

    Args:
        shape: of the whole tensor; a scalar stays whole on every rank.
        mesh: of one dimension.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = (Shard(0),) if len(shape) else (Replicate(),)
    local_shape, offsets = compute_local_shape_and_global_offset(
        torch.Size(shape), mesh, placements
    )
    return Layout(tuple(shape), tuple(offsets), tuple(local_shape), mesh, placements)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that this rank holds of a tensor: a view, outside autograd."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # under autograd to_local would make a node that nobody needs
        return tensor.to_local().detach()  # type: ignore[attr-defined]


def stacked(layout: Layout, rows: int) -> Layout:
    """The layout of `rows` tensors on top of each other, of which all parts are cut alike."""
    return Layout(
        (rows, *layout.shape),
        (0, *layout.offsets),
        (rows, *layout.local_shape),
        layout.mesh,
        tuple(_one_dimension_on(placement) for placement in layout.placements),
    )


def _one_dimension_on(placement: Placement) -> Placement:
    """The same cut of a tensor that has one more dimension in front."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def whole_from_part(part: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The tensor of which `part` is this rank's: a DTensor, or `part` itself if that is all of it.

    No rank talks to another. Unlike `DTensor.from_local` the part stays on its device, so averages in
    the host's memory can belong to a mesh of GPUs.

    Args:
        part: plain tensor, layout.local_shape.
        layout: where it belongs.
    """
    if layout.mesh is None:
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    assert tuple(part.shape) == layout.local_shape, (part.shape, layout)
    if part.storage_offset():
        part = from_dlpack(part)  # the same memory; torch.save fails on a DTensor with an offset
    meta = TensorMeta(torch.Size(layout.shape), _strides(layout.shape), part.dtype)
    spec = DTensorSpec(layout.mesh, layout.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def check_can_be_tracked(model: nn.Module, optimizer: Any = None) -> None:
    """Refuse parameters that were flattened or taken away by FSDP1 or DeepSpeed ZeRO.

    Args:
        model: the module.
        optimizer: its optimizer, if it is known.

    Raises:
        TrackingError: the weights are not where their names are; the message says the way out.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TrackingError(
                "FullyShardedDataParallel (FSDP1) flattens parameters, so there are no tensors of the "
                "model's names to average. Shard with torch.distributed.fsdp.fully_shard (FSDP2; with "
                "accelerate: fsdp_version: 2), or average saved checkpoints: `phema synth "
                "--from-checkpoints`."
            )
    if any(hasattr(p, "ds_id") or hasattr(p, "ds_tensor") for p in model.parameters()):
        raise TrackingError(
            "DeepSpeed ZeRO stage 3 keeps parameters in flat parts that only DeepSpeed can gather. Use "
            "FSDP2 (torch.distributed.fsdp.fully_shard), or average saved checkpoints: convert them with "
            "DeepSpeed's zero_to_fp32.py, then `phema synth --from-checkpoints`."
        )
    if type(optimizer).__module__.startswith("deepspeed.runtime."):  # ops hold plain optimizers
        raise TrackingError(
            f"{type(optimizer).__name__} is DeepSpeed's and steps flat copies of the parameters. With "
            "ZeRO stages 1 and 2 make a tracker of the module, Tracker(engine.module, ...), and call "
            "tracker.step() after engine.step(); with stage 3 use FSDP2 instead."
        )
