"""The update with PyTorch's own operators: what works everywhere.

On a processor one parameter is brought up to date for all profiles before the next: it comes from memory
once and from the cache after that. On other devices one call does one profile of all parameters
(`torch._foreach_lerp_`), since there the number of calls is what costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posthoc_ema.torch.averaging.gathering import Gathering
from posthoc_ema.torch.averaging.memory import Region, Shelf
from posthoc_ema.torch.averaging.rounding import StochasticRounding

SMALL = 49_152
"""Parameters of at most so many elements are gathered."""
CACHED = 1 << 21
"""Elements of a float32 parameter that are updated for all profiles before the next ones."""
CONVERTED = 1 << 18
"""The same, for what has to be converted to float32 on the way."""


class EagerKernel:
    """Updates the averages of a shelf by `lerp_`.

    Args:
        shelf: made with `small=SMALL` and `alignment=1`.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._on_cpu = shelf.device.type == "cpu"
        self._gatherings = {
            id(region): Gathering(region) for region in shelf.regions if not region.is_single
        }
        self._views = {
            id(region): [region.slots[0].shaped(row) for row in region.rows]
            for region in shelf.regions
            if region.is_single
        }
        rounds = shelf.dtype == torch.bfloat16
        self._rounding = StochasticRounding(shelf.device) if rounds else None
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
        """One update, see `Averages.update`.

        Args:
            tensors: the parameters in the order of the shelf.
            weights: 1 - beta of each profile.
            seed: of stochastic rounding.
            source: which of several sets of tensors that take turns this is.
            changed: its tensors are others than last time.
        """
        if self._rounding is not None:
            self._rounding.start(seed)
        direct: list[tuple[Region, torch.Tensor]] = []
        for region in self._shelf.regions:
            if not region.is_single:
                gathering = self._gatherings[id(region)]
                if changed:
                    gathering.prepare([tensors[i] for i in region.indices], source)
                self._flat(region, gathering.values(source), weights)
                continue
            tensor = tensors[region.indices[0]]
            plain = tensor.dtype == self._shelf.dtype == torch.float32
            if plain and (not self._on_cpu or tensor.numel() <= CACHED):
                direct.append((region, tensor))
            else:
                self._flat(region, region.slots[0].flat(tensor), weights)
        if self._on_cpu:
            for region, tensor in direct:
                for view, weight in zip(self._views[id(region)], weights, strict=True):
                    view.lerp_(tensor, weight)
        elif direct:
            parameters = [tensor.detach() for _, tensor in direct]
            for p, weight in enumerate(weights):
                views = [self._views[id(region)][p] for region, _ in direct]
                torch._foreach_lerp_(views, parameters, weight)

    def _flat(self, region: Region, theta: torch.Tensor, weights: Sequence[float]) -> None:
        """Update a region from flat memory, a part that fits the cache at a time."""
        converts = theta.dtype != torch.float32 or self._rounding is not None
        width = CONVERTED if converts else CACHED
        for start in range(0, theta.numel(), width):
            part = theta[start : start + width]
            if part.dtype != torch.float32:
                part = self._buffer("_theta", width)[: part.numel()].copy_(part)
            for row, weight in zip(region.rows, weights, strict=True):
                average = row[start : start + width]
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
