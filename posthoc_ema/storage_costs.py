"""What codecs cost and lose, as numbers: bytes per weight, and the variance of the storage error.

Rounding to floats loses a share of the weights themselves. A difference loses a share of the difference
only: of the shortest average of a time to the one before it, and of the longer ones to what the shorter
ones of both times already tell about them (the bases that the store uses).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_ema.errors import ConfigError
from posthoc_ema.least_squares import LeastSquares
from posthoc_ema.profiles import FloatArray, PowerProfile

KEY_EVERY = 32
"""Times of a chain of differences; its first average is stored by itself, in float32."""

_TOUCH_OF_NOISE = 1e-9  # of t, in the fit of bases: keeps their coefficients small


@dataclass(frozen=True)
class FileCost:
    """What one kind of file costs and loses.

    Attributes:
        bytes_per_weight: size, headers not counted.
        rounding: root mean square rounding error over the root mean square of what is rounded.
    """

    bytes_per_weight: float
    rounding: float


# Normally distributed numbers lose 2.1e-4 * 2^(11 - p) when rounded to p significant bits, and 6e-3 as
# int8 with one bfloat16 scale for each 64: measured, tests/unit/test_storage_costs.py.
FILE_COSTS: dict[str, FileCost] = {
    "float32": FileCost(4.0, 2.1e-4 * 2.0**-13),
    "float16": FileCost(2.0, 2.1e-4),
    "bfloat16": FileCost(2.0, 2.1e-4 * 2.0**3),
    "delta-float16": FileCost(2.0, 2.1e-4),
    "delta-int8": FileCost(1.0 + 2.0 / 64, 6e-3),
}
"""Kind of file -> cost."""

CODEC_FILES: dict[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "delta": ("delta-float16", "delta-int8"),
    "delta-float16": ("delta-float16", "delta-float16"),
    "delta-int8": ("delta-int8", "delta-int8"),
}
"""Codec -> kind of file of the shortest average of a time, and of the others."""


def codec_files(codec: str) -> tuple[str, str]:
    """Kinds of files that a codec writes.

    Raises:
        ConfigError: there is no codec of this name.

    Example:
        >>> codec_files("delta")
        ('delta-float16', 'delta-int8')
    """
    if codec not in CODEC_FILES:
        raise ConfigError(f"dtype must be one of {', '.join(CODEC_FILES)}, got {codec!r}.")
    return CODEC_FILES[codec]


def disk_bytes(codec: str, num_times: int, num_profiles: int, parameters: float) -> float:
    """Bytes of all stored averages; raw weights, buffers and headers are not counted.

    Args:
        codec: name of the codec.
        num_times: snapshot times.
        num_profiles: averages of each time.
        parameters: averaged weights of the model.

    Example:
        >>> disk_bytes("float16", 64, 2, 50e6) / 1e9
        12.8
    """
    shortest, others = codec_files(codec)
    keys = math.ceil(num_times / KEY_EVERY) if codec.startswith("delta") else 0
    per_weight = keys * FILE_COSTS["float32"].bytes_per_weight
    per_weight += (num_times - keys) * FILE_COSTS[shortest].bytes_per_weight
    per_weight += keys * (num_profiles - 1) * FILE_COSTS["float32"].bytes_per_weight
    per_weight += (num_times - keys) * (num_profiles - 1) * FILE_COSTS[others].bytes_per_weight
    return per_weight * parameters


def tracker_bytes(num_profiles: int, parameters: float) -> float:
    """Memory of the tracker beside the parameters: a float32 copy for each tracked length.

    Example:
        >>> tracker_bytes(2, 1e9) / 1e9
        8.0
    """
    return 4.0 * num_profiles * parameters


def storage_noise(
    codec: str, times: Sequence[float], tracked: Sequence[float], drift: float, steps: float
) -> FloatArray:
    """Variance of the storage error of each average, over the mean square of the weights.

    Args:
        codec: name of the codec.
        times: snapshot times, rising, (num_times).
        tracked: tracked lengths, (num_tracked).
        drift: walk of the weights over `steps`, relative to their norm.
        steps: length of the run, in the clock of the times.

    Returns:
        Shape (num_times, num_tracked).

    Raises:
        ConfigError: unknown codec.

    Example:
        >>> storage_noise("float16", [10], [0.1], 0.3, 10).round(10).tolist()
        [[4.41e-08]]
    """
    shortest, others = codec_files(codec)
    noise = np.full((len(times), len(tracked)), FILE_COSTS[shortest].rounding ** 2)
    if not codec.startswith("delta"):
        return noise
    q = drift**2 / steps
    order = np.argsort(tracked)
    exact = FILE_COSTS["float32"].rounding ** 2
    for k, t in enumerate(times):
        has_past = k % KEY_EVERY > 0
        for rank, j in enumerate(order):
            bases = []
            if has_past:
                bases = [(k, i) for i in order[:rank]]
                bases += [(k - 1, i) for i in order[: rank + 1]]
            noise[k, j] = exact
            if bases:
                own = PowerProfile(t, tracked[j])
                stored = [PowerProfile(times[m], tracked[i]) for m, i in bases]
                touch = np.full(len(bases), _TOUCH_OF_NOISE * t)
                found = LeastSquares(stored, touch, [own], t).solve(np.arange(len(bases)))
                lost = np.array([noise[m, i] for m, i in bases])
                left = q * t * found.f[0] + lost @ found.x[:, 0] ** 2
                rounding = FILE_COSTS[others if rank else shortest].rounding
                noise[k, j] += rounding**2 * left
    return noise
