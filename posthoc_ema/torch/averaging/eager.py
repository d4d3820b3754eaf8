"""The update with PyTorch's own operators: what works everywhere.

One parameter is brought up to date for all profiles before the next: it comes from memory once and from the
cache after that. One call (`torch._foreach_lerp_`) does so for all that are large; the small ones are copied
together first, since a call for each would cost more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posthoc_ema.torch.averaging.gathering import Gathering
from posthoc_ema.torch.averaging.memory import Region, Shelf
from posthoc_ema.torch.averaging.rounding import StochasticRounding

SMALL = 8_192
"""Parameters of at most so many elements are gathered."""
CACHED = 1 << 21
"""Elements of a float32 parameter that are updated for all profiles before the next ones."""
CONVERTED = 1 << 18
"""The same, for what has to be converted to float32 on the way."""
_WEIGHT_LISTS = "ScalarList" in torch.ops.aten._foreach_lerp_.overloads()  # not in early versions


class EagerKernel:
    """Updates the averages of a shelf by `lerp_`.

    Args:
        shelf: made with `small=SMALL` and `alignment=1`.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._on_cpu = shelf.device.type == "cpu"
        self._single = [region for region in shelf.regions if region.is_single]
        self._shared = [
            (region, Gathering(region, parallel=not self._on_cpu))
            for region in shelf.regions
            if not region.is_single
        ]
        rounds = shelf.dtype == torch.bfloat16
        self._rounding = StochasticRounding(shelf.device) if rounds else None
        self._direct: list[tuple[int, list[torch.Tensor]]] = []
        self._in_parts: list[Region] = []
        self._theta = torch.empty(0)
        self._work = torch.empty(0)

    def update(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        seed: int,
        source: int,
        changed: bool,
    ) -> None:
        """One update, see `Kernel.update`."""
        if changed:
            self._prepare(tensors, source)
        if self._rounding is not None:
            self._rounding.start(seed)
        for _, gathering in self._shared:
            for piece in gathering.pieces(source):
                self._move(piece.rows, piece.target, weights)
        for region in self._in_parts:
            slot = region.slots[0]
            self._move(region.rows, slot.flat(tensors[region.indices[0]]), weights)
        if self._direct:
            self._move_direct(tensors, weights)

    def _prepare(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Plan how these tensors are read: as they are, or converted, or in parts that fit the cache."""
        for region, gathering in self._shared:
            gathering.prepare([tensors[i] for i in region.indices], source)
        self._direct, self._in_parts = [], []
        for region in self._single:
            tensor = tensors[region.indices[0]]
            fits = not self._on_cpu or tensor.numel() <= CACHED
            if fits and tensor.dtype == self._shelf.dtype == torch.float32:
                views = [region.slots[0].shaped(row) for row in region.rows]
                self._direct.append((region.indices[0], views))
            else:
                self._in_parts.append(region)

    def _move_direct(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
        """All large float32 parameters: each for all profiles before the next, where one call can do that."""
        if self._on_cpu and _WEIGHT_LISTS:
            averages, parameters = [], []
            for i, views in self._direct:
                averages += views
                parameters += [tensors[i]] * len(views)
            torch._foreach_lerp_(averages, parameters, list(weights) * len(self._direct))
            return
        parameters = [tensors[i] for i, _ in self._direct]
        for p, weight in enumerate(weights):
            torch._foreach_lerp_([views[p] for _, views in self._direct], parameters, weight)

    def _move(
        self, rows: Sequence[torch.Tensor], theta: torch.Tensor, weights: Sequence[float]
    ) -> None:
        """Flat memory, a part that fits the cache at a time."""
        converts = theta.dtype != torch.float32 or self._rounding is not None
        width = CONVERTED if converts else CACHED
        for start in range(0, theta.numel(), width):
            part = theta[start : start + width]
            if part.dtype != torch.float32:
                part = self._buffer("_theta", width)[: part.numel()].copy_(part)
            for row, weight in zip(rows, weights, strict=True):
                average = row[start : start + width] if theta.numel() > width else row
                if self._rounding is None:
                    average.lerp_(part, weight)
                else:
                    work = self._buffer("_work", width)[: part.numel()].copy_(average)
                    average.copy_(self._rounding.round_(work.lerp_(part, weight)))

    def _buffer(self, name: str, width: int) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, name)
        if buffer.numel() < width:
            buffer = torch.empty(width, dtype=torch.float32, device=self._shelf.device)
            setattr(self, name, buffer)
        return buffer
