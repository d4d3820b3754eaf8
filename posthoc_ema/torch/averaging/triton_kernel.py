"""The update as one Triton kernel for all parameters and all profiles: the host's side, for CUDA devices.

A launch walks over a table of chunks. The addresses of the parameters lie in a table on the device that is
written when a parameter's memory changes; the weights travel with the launch. So an update waits for nothing.

TRITON_INTERPRET=1 runs the kernel on the processor, slowly: that is how it is tested without a GPU.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from posthoc_ema.torch.averaging.layout import Slot
from posthoc_ema.torch.averaging.memory import Region, Shelf
from posthoc_ema.torch.averaging.triton_code import update

SMALL = 65_536
"""Parameters of at most so many elements share one block of memory."""
BLOCK = 4096
"""Elements that one program updates."""
WARPS = 8
TOGETHER = 4
"""Profiles that one launch updates."""
_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


class _Table:
    """What one launch needs to know of the parameters of one dtype and alignment, on the device.

    Args:
        members: (region, slot) of each.
        theta: dtype of the parameters.
        aligned: whether all addresses and strides are multiples of 16 bytes.
        device: of the averages.
    """

    def __init__(
        self,
        members: Sequence[tuple[Region, Slot]],
        theta: Any,
        aligned: bool,
        device: torch.device,
    ) -> None:
        self.theta, self.aligned, self._device = theta, aligned, device
        chunks = _on_host([-(-slot.numel // BLOCK) for _, slot in members])
        self.num_chunks = int(chunks.sum())
        owners = torch.repeat_interleave(_on_host(range(len(members))), chunks)
        firsts = torch.cumsum(chunks, 0) - chunks
        starts = (torch.arange(self.num_chunks, device="cpu") - firsts[owners]) * BLOCK
        self.owners = self._upload(owners.to(torch.int32))
        self.starts = self._upload(starts)
        self.sizes = self._upload(_on_host([slot.numel for _, slot in members]))
        self.strides = self._upload(_on_host([r.memory.stride(0) for r, _ in members]))
        self.averages = self._upload(_on_host([_address(r, s) for r, s in members]))
        self.parameters = _on_host([])

    def point_to(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the addresses of the parameters."""
        self.parameters = self._upload(_on_host([tensor.data_ptr() for tensor in tensors]))

    def _upload(self, table: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return table
        return table.pin_memory().to(self._device, non_blocking=True)


def _on_host(numbers: Sequence[int]) -> torch.Tensor:
    """A table in host memory, whatever torch.set_default_device says."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _address(region: Region, slot: Slot) -> int:
    return region.memory.data_ptr() + slot.offset * region.memory.element_size()


class TritonKernel:
    """Updates the averages of a shelf in one launch for each dtype of the parameters.

    Args:
        shelf: made with `small=SMALL` and `alignment=16`.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._members = [
            (region, slot, i)
            for region in shelf.regions
            for slot, i in zip(region.slots, region.indices, strict=True)
        ]
        self._kinds: list[tuple[torch.dtype, bool]] = []
        self._tables: list[tuple[_Table, list[int]]] = []
        self._copies: list[tuple[torch.Tensor, int]] = []
        self._source = 0

    def update(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        seed: int,
        source: int,
        changed: bool,
    ) -> None:
        """One update, see `EagerKernel.update`."""
        if not self._members:
            return
        if changed or source != self._source:
            self._prepare(tensors)
            self._source = source
        for copy, i in self._copies:
            copy.copy_(tensors[i])
        if self._shelf.device.type == "cuda":
            with torch.cuda.device(self._shelf.device):
                self._launch(weights, seed)
        else:
            self._launch(weights, seed)

    def _prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the tables for these tensors; what the kernel cannot read directly gets a copy."""
        self._copies = []
        sources = []
        for _, slot, i in self._members:
            tensor = tensors[i]
            if not slot.fits(tensor) or tensor.dtype not in _DTYPES:
                dtype = tensor.dtype if tensor.dtype in _DTYPES else torch.float32
                copy = torch.empty_strided(
                    slot.shape, slot.strides, dtype=dtype, device=tensor.device
                )
                self._copies.append((copy, i))
                tensor = copy
            sources.append(tensor)
        kinds = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in sources]
        if kinds != self._kinds:
            self._kinds = kinds
            self._tables = []
            for kind in dict.fromkeys(kinds):
                indices = [k for k, other in enumerate(kinds) if other == kind]
                members = [self._members[k][:2] for k in indices]
                table = _Table(members, _DTYPES[kind[0]], kind[1], self._shelf.device)
                self._tables.append((table, indices))
        for table, indices in self._tables:
            table.point_to([sources[k] for k in indices])

    def _launch(self, weights: Sequence[float], seed: int) -> None:
        rounds = self._shelf.dtype == torch.bfloat16
        for first in range(0, len(weights), TOGETHER):
            mine = [*weights[first : first + TOGETHER]]
            padded = [*mine, *[0.0] * (TOGETHER - len(mine))]
            for number, (table, _) in enumerate(self._tables):
                key = hash((seed, first, number)) & 0x7FFFFFFF
                update[(table.num_chunks,)](
                    table.parameters,
                    table.averages,
                    table.strides,
                    table.sizes,
                    table.owners,
                    table.starts,
                    *padded,
                    first,
                    key,
                    PROFILES=len(mine),
                    THETA=table.theta,
                    AVERAGE=tl.bfloat16 if rounds else tl.float32,
                    ALIGNED=table.aligned,
                    ROUNDS=rounds,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                    enable_fp_fusion=False,  # a different default in each version of Triton
                )
