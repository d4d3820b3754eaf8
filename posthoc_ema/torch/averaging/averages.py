"""The averages of several parameters, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from posthoc_ema.torch.averaging.eager import new_stack, update_stack, weight_columns

KERNELS = ("auto", "eager", "compiled", "triton")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Averages:
    """Averages of several parameters for several profiles; zeros before the first update.

    Args:
        parameters: name -> whole tensor on this process, of any floating dtype.
        num_profiles: averages of each parameter.
        kernel: one of KERNELS.
        dtype: of the averages, one of DTYPES.
        device: where they live; None: beside each parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        num_profiles: int,
        *,
        kernel: str = "auto",
        dtype: str = "float32",
        device: torch.device | None = None,
    ) -> None:
        self._stacks = {
            name: new_stack(parameter, num_profiles) for name, parameter in parameters.items()
        }

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters, in their order."""
        return list(self._stacks)

    def update(
        self, parameters: Mapping[str, torch.Tensor], weights: Sequence[float], *, seed: int = 0
    ) -> None:
        """One update of all averages: a[p] <- a[p] + weights[p] (parameter - a[p]).

        Args:
            parameters: the same names and shapes as at first.
            weights: 1 - beta of each profile.
            seed: stochastic rounding is a function of it: the same state and seed give the same bits,
                so that a resumed run equals an undisturbed one.
        """
        devices = list(dict.fromkeys(stack.device for stack in self._stacks.values()))
        columns = weight_columns(weights, devices)
        for name, parameter in parameters.items():
            stack = self._stacks[name]
            if stack.device != parameter.device:
                self._stacks[name] = stack = stack.to(parameter.device)
                columns |= weight_columns(weights, [parameter.device])
            update_stack(stack, parameter, columns[stack.device])

    def stack(self, name: str) -> torch.Tensor:
        """All averages of one parameter, float32, (num_profiles, *shape)."""
        return self._stacks[name]

    def average(self, name: str, index: int) -> torch.Tensor:
        """One average of one parameter, float32, (*shape)."""
        return self._stacks[name][index]

    def load(self, name: str, stack: torch.Tensor) -> None:
        """Set the averages of one parameter to a copy of `stack`, (num_profiles, *shape)."""
        self._stacks[name].copy_(stack)

    def wait(self) -> None:
        """Wait until updates that run beside the training are done."""

    def close(self) -> None:
        """End what runs beside the training."""
