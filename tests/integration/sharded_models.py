"""Models for the tests with ranks, and how they are driven: the same weights on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn

WRAPPER = "module."
CODECS = ("float32", "float16", "bfloat16", "delta", "delta-float16", "delta-int8")
OPTIONS = {"every": 3, "run_id": "r", "on_error": "raise", "metadata": {"who": "me"}}


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
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        hidden = self.frozen(self.norm(self.narrow(self.embed(x))))
        return self.head(self.low(hidden.bfloat16()).float()) + self.large.sum() * 1e-3


def make_odd():
    torch.manual_seed(0)
    return Odd()


def whole_values(step, name, shape):
    """The values of a tensor after a step: a function of its name alone."""
    seed = step * 1000 + sum(name.encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def set_weights(model, step):
    """Give each weight the values of a step, on each rank the part that it holds."""
    from posthoc_ema.torch.distributed.sharding import layout_of, local_part

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = whole_values(step, name.removeprefix(WRAPPER), parameter.shape)
            local_part(parameter).copy_(values[layout_of(parameter).box])
    for name, buffer in model.named_buffers():
        if buffer.dtype != torch.bool:
            buffer.copy_(whole_values(step, name.removeprefix(WRAPPER), buffer.shape).abs() * 9)


def drive(model, tracker, steps, start=0):
    """Set the weights step by step, as an optimizer would, and track them."""
    for step in range(start + 1, start + steps + 1):
        set_weights(model, step)
        tracker.step()


def batches(steps, start=0):
    """Training data; that of a step depends on its number alone."""
    for step in range(start + 1, start + steps + 1):
        generator = torch.Generator().manual_seed(step)
        yield torch.randint(0, 7, (8,), generator=generator)


def train(model, optimizer, steps, start=0):
    """Real training steps on the same batch on every rank."""
    for x in batches(steps, start):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()
