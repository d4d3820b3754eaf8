"""A small real training run whose whole trajectory is kept, and exact averages of it.

The network is a denoiser of scikit-learn's digits with one hidden layer (EDM2's preconditioning would
add nothing here): 65 -> 96 -> 64, 12,544 weights, trained with Adam on fresh noise at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

from posthoc_ema import PowerProfile
from posthoc_ema.averaging import power_step_weights

Schedule = Literal["constant", "isqrt"]
Trajectory = npt.NDArray[np.float32]

STEPS = 8192
HIDDEN = 96
BATCH = 64
SHAPES = {"w1": (HIDDEN, 65), "b1": (HIDDEN,), "w2": (64, HIDDEN), "b2": (64,)}
DECAY_FROM = 512  # isqrt: constant up to here, then falling as 1 / sqrt(step) (EDM2's schedule)


def learning_rate(schedule: Schedule, start: float, step: int) -> float:
    """Rate of a step, counted from 0."""
    if schedule == "constant":
        return start
    return start / math.sqrt(max(step / DECAY_FROM, 1.0))


def train(schedule: Schedule, rate: float, seed: int, steps: int = STEPS) -> Trajectory:
    """Weights after every step, float32, shape (steps, num_weights)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(load_digits().data.astype(np.float32)) / 8 - 1
    shapes = list(SHAPES.values())
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.cat(
        [
            torch.randn(size, generator=generator) / math.sqrt(shape[1])
            if len(shape) == 2
            else torch.zeros(size)
            for size, shape in zip(sizes, shapes, strict=True)
        ]
    ).requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=rate)
    kept = np.empty((steps, sum(sizes)), dtype=np.float32)
    for step in range(steps):
        clean = images[torch.randint(len(images), (BATCH,), generator=generator)]
        log_sigma = torch.randn(BATCH, 1, generator=generator) - 0.5
        noisy = clean + log_sigma.exp() * torch.randn(BATCH, 64, generator=generator)
        parts = flat.split(sizes)
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        hidden = torch.nn.functional.silu(torch.cat([noisy, log_sigma], dim=1) @ w1.T + b1)
        loss = ((hidden @ w2.T + b2 - clean) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, rate, step)
        optimizer.step()
        kept[step] = flat.detach().numpy()
    return kept


def averages(trajectory: Trajectory, profiles: Sequence[PowerProfile]) -> npt.NDArray[np.float64]:
    """Exact averages of the trajectory, float64, shape (num_profiles, num_weights)."""
    shares = np.zeros((len(profiles), len(trajectory)))
    for row, profile in zip(shares, profiles, strict=True):
        end = int(profile.t)
        row[:end] = power_step_weights(range(1, end + 1), profile.gamma)
    total = np.zeros((len(profiles), trajectory.shape[1]))
    for start in range(0, len(trajectory), 512):  # a piece at a time: float64 of all is 0.8 GB
        total += shares[:, start : start + 512] @ trajectory[start : start + 512].astype(np.float64)
    return total
