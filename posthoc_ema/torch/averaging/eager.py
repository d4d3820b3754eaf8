"""The update kernel: all profiles of one parameter in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def new_stack(parameter: torch.Tensor, num_profiles: int) -> torch.Tensor:
    """Averages of one parameter before their first update, float32, (num_profiles, *shape).

    Zeros and not a copy: the first update has weight 1 and replaces them.
    """
    shape = (num_profiles, *parameter.shape)
    return torch.zeros(shape, dtype=torch.float32, device=parameter.device)


def weight_columns(
    weights: Sequence[float], devices: Sequence[torch.device]
) -> dict[torch.device, torch.Tensor]:
    """Update weights of all profiles on each device, float32, (num_profiles,).

    Filled element by element: a fill takes its value along with the kernel, whereas copying a host
    tensor to an accelerator from pageable memory would wait for the device.
    """
    columns = {}
    for device in devices:
        column = torch.empty(len(weights), dtype=torch.float32, device=device)
        for i, weight in enumerate(weights):
            column[i].fill_(weight)
        columns[device] = column
    return columns


def update_stack(stack: torch.Tensor, parameter: torch.Tensor, column: torch.Tensor) -> None:
    """One update in place: stack[p] <- stack[p] + column[p] (parameter - stack[p]).

    Args:
        stack: averages, float32, (num_profiles, *shape).
        parameter: weights of any floating dtype, (*shape).
        column: 1 - beta of each profile, float32, (num_profiles,), on the same device.
    """
    values = parameter.detach().to(torch.float32)  # no copy if it is float32 already
    stack.lerp_(values.unsqueeze(0), column.view(-1, *[1] * values.dim()))
