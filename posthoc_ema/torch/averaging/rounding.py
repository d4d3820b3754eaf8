"""Stochastic rounding to bfloat16, with random numbers of our own.

An average in bfloat16 that is rounded to nearest stops moving as soon as an update is smaller than half
the distance to the next number, a 512th of its value. Rounded up or down at random, with probabilities by
the distances, it is right on average. The random numbers come from a private generator: the sequence that
the training draws stays as it is.
"""

from __future__ import annotations

import math

import torch

_HIGH_BITS = -0x10000  # of a float32: those that bfloat16 keeps
_SPREAD = 0x9E3779B97F4A7C15


class StochasticRounding:
    """Rounds float32 to bfloat16 at random.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device=device)

    def start(self, seed: int) -> None:
        """Begin a sequence: the same seed and the same calls give the same bits."""
        self._generator.manual_seed((seed + 1) * _SPREAD % 2**63)

    def round_(self, values: torch.Tensor) -> torch.Tensor:
        """Round float32 values in place to numbers that bfloat16 holds exactly.

        The 16 bits that will be cut off are added to as many random ones: the carry decides.

        Args:
            values: float32, contiguous, one dimension.

        Returns:
            The same tensor.
        """
        count = values.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
        draws.random_(-(2**63), None, generator=self._generator)  # all 64 bits: four numbers a draw
        # A carry would make zeros of some NaNs. A sum finds them faster, but a device is not waited for.
        if values.device.type != "cpu" or not math.isfinite(values.sum().item()):
            values.masked_fill_(values.isnan(), torch.nan)
        bits = values.view(torch.int32)
        bits.add_(draws.view(torch.int16)[:count]).add_(0x8000).bitwise_and_(_HIGH_BITS)
        return values
