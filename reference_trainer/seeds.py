"""The uses of a run's seed, kept apart, and torch's global generators for a while.

Everything random is drawn from a generator that is seeded from (seed, images seen, use), so a resumed run
draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

INIT, STEP, DROPOUT = 0, 1, 3
"""Initial weights; noise of a step; dropout of a step. 2 is that of reference_trainer.data.batches."""


@contextlib.contextmanager
def seeded(entropy: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block and put them back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(entropy)
        yield
