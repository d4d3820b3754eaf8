"""Whether a model's weights are still those that its last optimizer step left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from posthoc_ema.torch.distributed.sharding import is_sharded, local_part

_LOOKED_AT = 32
_READ = 8
_ELEMENTS = 16


class _Look(NamedTuple):
    """What changes when someone writes to a parameter, or replaces its values; a move is neither."""

    version: int
    device: torch.device
    address: int


class LastWeights:
    """What the last counted step left in the parameters of an optimizer, as far as can be seen.

    A write through `parameter.data` leaves no trace but the values themselves. So a few of them are kept,
    on their device: nothing waits for it until they are compared.
    """

    def __init__(self) -> None:
        self.parameters: list[torch.Tensor] = []
        self._groups: list[dict[str, Any]] = []
        self._looks: tuple[_Look, ...] = ()
        self._values: torch.Tensor | None = None

    def remember(self, optimizer: Optimizer) -> None:
        """Look at the parameters of `optimizer` as they are now."""
        self._groups = optimizer.param_groups
        self.parameters = [p for group in self._groups for p in group["params"]]
        self._looks = _looks(self.parameters)
        self._values = _values(self.parameters)

    def unchanged(self) -> bool:
        """Whether the weights are those that were remembered; waits for their device.

        At its end a script may load its best weights, or a schedule-free optimizer show its average.
        """
        averaging = any(group.get("train_mode") is False for group in self._groups)
        pairs = zip(self._looks, _looks(self.parameters), strict=False)
        untouched = all(
            then.version == now.version
            and (then.device != now.device or then.address == now.address)
            for then, now in pairs
        )
        return not averaging and untouched and self.same_values() is not False

    def same_values(self) -> bool | None:
        """Whether the values are those that were remembered; None if there were none to look at."""
        then, now = self._values, _values(self.parameters)
        if then is None or now is None:
            return None if then is now else False
        if then.dtype != now.dtype or then.shape != now.shape:
            return False
        # Bits, because NaN is not equal to itself.
        return torch.equal(then.cpu().view(torch.uint8), now.cpu().view(torch.uint8))


def _spread(parameters: Sequence[torch.Tensor], most: int) -> Sequence[torch.Tensor]:
    return parameters[:: max(1, len(parameters) // most)]


def _looks(parameters: Sequence[torch.Tensor]) -> tuple[_Look, ...]:
    return tuple(
        _Look(p._version, p.device, 0 if is_sharded(p) else p.data_ptr())
        for p in _spread(parameters, _LOOKED_AT)
    )


@torch.no_grad()
def _values(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """A copy of a few values of a few parameters, those on one device; None if there are none."""
    few: list[torch.Tensor] = []
    try:
        for parameter in _spread(parameters, _READ)[:_READ]:
            values = local_part(parameter)
            if values.numel() and (not few or values.device == few[0].device):
                few.append(_some(values))
        return torch.cat(few) if few else None
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # a subclass that cannot be cut, or memory that was given back


def _some(values: torch.Tensor) -> torch.Tensor:
    if not values.is_contiguous():
        values = values[(0,) * (values.dim() - 1)]  # to flatten it would copy all of it
    flat = values.reshape(-1)
    return flat[:: max(1, len(flat) // _ELEMENTS)][:_ELEMENTS]
