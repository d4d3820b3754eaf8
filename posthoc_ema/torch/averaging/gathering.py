"""Many small tensors as one: copied into flat memory with as few calls as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from posthoc_ema.torch.averaging.layout import Slot
from posthoc_ema.torch.averaging.memory import Region

SERIAL = 32_767
"""Elements up to which PyTorch's operators stay in the calling thread (its grain size less one).

Pieces are of this size: what one thread has copied would reach another through memory that they share,
which on some machines takes longer than all the arithmetic.
"""
MEDIUM = 2_048
"""Tensors of more elements are copied by all threads where that is allowed."""


@dataclass(frozen=True)
class Piece:
    """A run of small parameters that are copied by one call.

    Attributes:
        target: where their values come to lie, float32, (length,).
        rows: their averages for each profile, (length,).
        cat: tensors to concatenate, and into what; None for a single tensor.
        copy: tensor to copy, and into what; None where the concatenation goes to `target`.
    """

    target: torch.Tensor
    rows: list[torch.Tensor]
    cat: tuple[list[torch.Tensor], torch.Tensor] | None
    copy: tuple[torch.Tensor, torch.Tensor] | None

    def fill(self) -> torch.Tensor:
        """Copy the parameters as they are now; returns `target`."""
        if self.cat is not None:
            torch.cat(self.cat[0], out=self.cat[1])
        if self.copy is not None:
            self.copy[1].copy_(self.copy[0])
        return self.target


@dataclass
class _Group:
    slots: list[Slot] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)

    def takes(self, slot: Slot, dtype: torch.dtype, parallel: bool) -> bool:
        if not self.slots or self.tensors[0].dtype != dtype:
            return not self.slots
        if parallel and slot.numel >= MEDIUM:
            return True
        if parallel and self.slots[-1].numel >= MEDIUM:
            return False
        return slot.offset + slot.numel - self.slots[0].offset <= SERIAL


class Gathering:
    """Copies the parameters of a shared region into one flat float32 tensor.

    Flat views of the parameters are kept until a parameter's memory changes: making them takes longer
    than copying what they show.

    Args:
        region: its slots follow each other without gaps.
        parallel: whether all threads may copy, for what is then read as a whole.
    """

    def __init__(self, region: Region, *, parallel: bool) -> None:
        self._region = region
        self._parallel = parallel
        self._flat = torch.empty_like(region.rows[0], dtype=torch.float32)
        self._plans: dict[int, list[Piece]] = {}

    def prepare(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Plan the calls anew.

        Args:
            tensors: one for each slot of the region.
            source: which of several sets of tensors that take turns this is.
        """
        plan = []
        group = _Group()
        for slot, tensor in zip(self._region.slots, tensors, strict=True):
            fits = slot.fits(tensor)
            if group.slots and not (fits and group.takes(slot, tensor.dtype, self._parallel)):
                plan.append(self._piece(group))
                group = _Group()
            if fits:
                group.slots.append(slot)
                group.tensors.append(slot.flat(tensor))
            else:
                target, rows = self._part(slot, slot)
                copy = (tensor.detach(), slot.shaped(self._flat))
                plan.append(Piece(target, rows, None, copy))
        if group.slots:
            plan.append(self._piece(group))
        self._plans[source] = plan

    def _part(self, first: Slot, last: Slot) -> tuple[torch.Tensor, list[torch.Tensor]]:
        start, stop = first.offset, last.offset + last.numel
        return self._flat[start:stop], [row[start:stop] for row in self._region.rows]

    def _piece(self, group: _Group) -> Piece:
        """One concatenation; other dtypes than float32 are concatenated as they are and widened as one."""
        target, rows = self._part(group.slots[0], group.slots[-1])
        tensors = group.tensors
        if len(tensors) == 1:
            return Piece(target, rows, None, (tensors[0], target))
        if tensors[0].dtype == torch.float32:
            return Piece(target, rows, (tensors, target), None)
        narrow = torch.empty_like(target, dtype=tensors[0].dtype)
        return Piece(target, rows, (tensors, narrow), (narrow, target))

    def pieces(self, source: int) -> Iterator[Piece]:
        """The pieces one after the other, filled with the parameters as they are now."""
        for piece in self._plans[source]:
            piece.fill()
            yield piece

    def values(self, source: int) -> torch.Tensor:
        """All parameters as they are now, float32, (length,); overwritten by the next call."""
        for piece in self._plans[source]:
            piece.fill()
        return self._flat
