"""Small models for the tests of the tracker."""

from __future__ import annotations

import torch
from torch import nn


class Scalar(nn.Module):
    """One parameter of one number: what a tracker does to it is its response."""

    def __init__(self, value=0.0, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=dtype))


class Network(nn.Module):
    """Everything that a state_dict can hold: tied weights, BatchNorm, frozen, buffers of any kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.module = nn.Linear(4, 4)  # an attribute that is really called so
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        self.count += 1
        return self.head(self.fixed(self.module(self.norm(self.embed(x)))) * self.gain)


def train(model, optimizer, steps, start=0):
    """A few real steps; the batch of a step depends on its number alone."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()
