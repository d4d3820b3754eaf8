"""What is left of an optimizer when the script has dropped it: enough to tell where training stood."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer


class LastSeen:
    """Stands in for an optimizer without keeping it, or the memory of its state, alive.

    While the optimizer is there, its groups and its state are shown; afterwards the groups as they were
    when they were last looked at, and of the state nothing but the counters of steps.

    Args:
        optimizer: to stand in for.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer, self._gone)
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._state: dict[Any, Any] = optimizer.state

    def _look(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:  # loading a state dict replaces both
            self._groups, self._state = optimizer.param_groups, optimizer.state

    def _gone(self, reference: weakref.ref[Optimizer]) -> None:
        self._state = {
            parameter: {"step": state["step"]}
            for parameter, state in self._state.items()
            if isinstance(state, dict) and "step" in state
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer."""
        self._look()
        return self._groups

    @property
    def state(self) -> dict[Any, Any]:
        """The state of the optimizer."""
        self._look()
        return self._state
