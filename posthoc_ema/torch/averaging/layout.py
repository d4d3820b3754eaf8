"""Where each average lies in memory: plain records, decided once from shapes, strides and dtypes.

A parameter's average has the memory order of the parameter (channels-last stays channels-last), so that
kernels may walk over both as flat memory. Small parameters share one region and are updated as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

_shape_of, _dtype_of = attrgetter("shape"), attrgetter("dtype")


@dataclass(frozen=True)
class Slot:
    """One parameter's place: its shape, the strides of its averages, and where in the region it begins."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    numel: int
    offset: int

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is dense in the memory order of this slot."""
        return _same_order(self.shape, self.strides, tensor.stride())

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as flat memory in this slot's order, (numel,): a view where it fits, else a copy."""
        tensor = tensor.detach()
        if not self.fits(tensor):
            copy = torch.empty_strided(
                self.shape, self.strides, dtype=tensor.dtype, device=tensor.device
            )
            tensor = copy.copy_(tensor)
        return tensor.as_strided((self.numel,), (1,))

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """The part of the flat memory of a region that is this slot's, as a view of (*shape)."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)


def _same_order(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    return all(a == b for n, a, b in zip(shape, strides, others, strict=True) if n > 1)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor as they are; those of contiguous memory where it has gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return contiguous_strides(tensor.shape)
            expected *= size
    return tuple(tensor.stride())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def plan_regions(
    parameters: Mapping[str, torch.Tensor], small: int, alignment: int
) -> list[list[Slot]]:
    """Slots of each region of memory: one for every large parameter, one for all the small ones together.

    Args:
        parameters: name -> tensor; those without elements get no slot.
        small: parameters of at most so many elements share a region.
        alignment: small ones begin at multiples of this, in elements.

    Returns:
        Regions, each a list of slots with their offsets. In the shared one equal dtypes stand side by
        side and large parameters first, which is what gathering them wants.
    """
    regions = []
    shared: list[tuple[str, torch.Tensor]] = []
    for name, tensor in parameters.items():
        if tensor.numel() > small:
            regions.append([_slot(name, tensor, 0)])
        elif tensor.numel():
            shared.append((name, tensor))
    shared.sort(key=lambda item: (str(item[1].dtype), -item[1].numel()))
    slots, offset = [], 0
    for name, tensor in shared:
        slots.append(_slot(name, tensor, offset))
        offset += -(-tensor.numel() // alignment) * alignment
    return [*regions, slots] if slots else regions


def _slot(name: str, tensor: torch.Tensor, offset: int) -> Slot:
    return Slot(name, tuple(tensor.shape), memory_order(tensor), tensor.numel(), offset)


def extent(slots: Sequence[Slot], alignment: int) -> int:
    """Elements that a region of these slots needs for one profile."""
    last = slots[-1]
    return last.offset + -(-last.numel // alignment) * alignment


def signature(tensors: Sequence[torch.Tensor]) -> tuple[list[object], ...]:
    """What kernels remember of tensors: equal for the same memory, read in the same way.

    Identity is not asked for: a parameter's `data` may have been replaced, and a view is made anew at each
    update. Addresses are unique among devices.
    """
    return (
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(_dtype_of, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(_shape_of, tensors)),
    )
