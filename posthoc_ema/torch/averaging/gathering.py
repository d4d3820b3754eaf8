"""Many small tensors as one: copied into flat memory with as few calls as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from posthoc_ema.torch.averaging.layout import Slot
from posthoc_ema.torch.averaging.memory import Region

SERIAL = 32_768
"""Elements under which torch.cat copies with one fast loop and one thread (its grain size)."""
MEDIUM = 2_048
"""Tensors of at least so many elements are copied with all threads."""


@dataclass(frozen=True)
class _Plan:
    """Concatenations (tensors, into) and after them copies (into, tensor)."""

    cats: list[tuple[list[torch.Tensor], torch.Tensor]] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class Gathering:
    """Copies the parameters of a shared region into one flat float32 tensor.

    Flat views of the parameters are kept until a parameter's memory changes: making them takes longer
    than copying what they show.

    Args:
        region: its slots follow each other without gaps.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._flat = torch.empty_like(region.rows[0], dtype=torch.float32)
        self._plans: dict[int, _Plan] = {}

    def prepare(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Plan the calls anew.

        Args:
            tensors: one for each slot of the region.
            source: which of several sets of tensors that take turns this is.
        """
        self._plans[source] = plan = _Plan()
        group: list[tuple[Slot, torch.Tensor]] = []
        for slot, tensor in zip(self._region.slots, tensors, strict=True):
            if not slot.fits(tensor):
                self._close(group, plan)
                group = []
                plan.copies.append((slot.shaped(self._flat), tensor.detach()))
                continue
            if group and not _belongs(group, slot, tensor):
                self._close(group, plan)
                group = []
            group.append((slot, slot.flat(tensor)))
        self._close(group, plan)

    def _close(self, group: list[tuple[Slot, torch.Tensor]], plan: _Plan) -> None:
        """Plan one concatenation; other dtypes are concatenated as they are and widened as one."""
        if not group:
            return
        first, last = group[0][0], group[-1][0]
        target = self._flat[first.offset : last.offset + last.numel]
        tensors = [tensor for _, tensor in group]
        if len(tensors) == 1:
            plan.copies.append((target, tensors[0]))
        elif tensors[0].dtype == torch.float32:
            plan.cats.append((tensors, target))
        else:
            narrow = torch.empty_like(target, dtype=tensors[0].dtype)
            plan.cats.append((tensors, narrow))
            plan.copies.append((target, narrow))

    def values(self, source: int) -> torch.Tensor:
        """All parameters of the region as they are now, float32, (length,); overwritten by the next call."""
        plan = self._plans[source]
        for tensors, target in plan.cats:
            torch.cat(tensors, out=target)
        for target, tensor in plan.copies:
            target.copy_(tensor)
        return self._flat


def _belongs(group: list[tuple[Slot, torch.Tensor]], slot: Slot, tensor: torch.Tensor) -> bool:
    first, last = group[0][0], group[-1][0]
    if group[0][1].dtype != tensor.dtype:
        return False
    if slot.numel >= MEDIUM:
        return True
    return last.numel < MEDIUM and slot.offset + slot.numel - first.offset < SERIAL
