"""Models for the tests with ranks, and how they are driven: the same weights on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn


class Odd(nn.Module):
    """Sizes that no number of ranks divides, tied and frozen weights, buffers, half precision."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.narrow = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.low = nn.Linear(3, 5, dtype=torch.bfloat16)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.large = nn.Parameter(torch.zeros(67, 129))  # more than a vector register, and odd

    def forward(self, x):
        hidden = self.frozen(self.norm(self.narrow(self.embed(x))))
        return self.head(self.low(hidden.bfloat16()).float()) + self.large.sum()


def whole_values(step, name, shape):
    """The values of a tensor after a step: a function of its name alone."""
    seed = step * 1000 + sum(name.encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drive(model, tracker, steps, start=0):
    """Set the weights (the local part of each) step by step, as an optimizer would, and track."""
    from posthoc_ema.torch.sharding import layout_of, local_part

    for step in range(start + 1, start + steps + 1):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("module.")
                values = whole_values(step, name, parameter.shape)
                local_part(parameter).copy_(values[layout_of(parameter).box])
        for name, buffer in model.named_buffers():
            buffer.copy_(whole_values(step, name.removeprefix("module."), buffer.shape).abs() * 9)
        tracker.step()
