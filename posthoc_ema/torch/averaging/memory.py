"""The memory of averages on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from posthoc_ema.torch.averaging.layout import Slot, extent, plan_regions


class Region:
    """Averages of one large parameter or of many small ones, as flat memory.

    Attributes:
        slots: what lies here, by offset.
        indices: position of each slot's parameter among the parameters of the shelf.
        memory: (num_profiles, length), in the dtype of the averages.
        rows: the averages of each profile as flat memory, without the padding at the end.
    """

    def __init__(self, slots: list[Slot], indices: list[int], memory: torch.Tensor) -> None:
        self.slots = slots
        self.indices = indices
        self.memory = memory
        length = slots[-1].offset + slots[-1].numel
        self.rows = tuple(memory[:, :length].unbind(0))

    @property
    def is_single(self) -> bool:
        """Whether there is one parameter in the region."""
        return len(self.slots) == 1


class Shelf:
    """Averages of all parameters of one device: zeros, until they are updated or loaded.

    Args:
        parameters: name -> tensor, all on one device.
        indices: position of each among all parameters that are averaged.
        num_profiles: averages of each parameter.
        dtype: of the averages.
        device: where the averages live.
        small: parameters of at most so many elements share a region.
        alignment: small ones begin at multiples of this, in elements.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        indices: Sequence[int],
        num_profiles: int,
        dtype: torch.dtype,
        device: torch.device,
        small: int,
        alignment: int,
    ) -> None:
        self.names = list(parameters)
        self.indices = list(indices)
        self.num_profiles = num_profiles
        self.dtype = dtype
        self.device = device
        self._shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        index = {name: i for i, name in enumerate(self.names)}
        self.regions = []
        for slots in plan_regions(parameters, small, alignment):
            # Zeros and not a copy: the first update has weight 1 and replaces them.
            memory = torch.zeros(
                (num_profiles, extent(slots, alignment)), dtype=dtype, device=device
            )
            self.regions.append(Region(slots, [index[s.name] for s in slots], memory))
        self._place = {
            slot.name: (region, slot) for region in self.regions for slot in region.slots
        }

    def stack(self, name: str) -> torch.Tensor:
        """All averages of one parameter in their own dtype, (num_profiles, *shape): a view."""
        if name not in self._place:  # no elements
            shape = (self.num_profiles, *self._shapes[name])
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        region, slot = self._place[name]
        length = region.memory.shape[1]
        return region.memory.as_strided(
            (self.num_profiles, *slot.shape), (length, *slot.strides), slot.offset
        )
