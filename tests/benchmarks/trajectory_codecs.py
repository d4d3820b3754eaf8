"""Codecs of stored averages in plain NumPy: the formulas, one average a row, nothing of the library.

R_1 is a key frame, D_i = round(S_i - base_i), R_i = base_i + D_i, where base_i is what a reader already
has. Bytes are those of the tensors; what the files add is the same for every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posthoc_ema import PowerProfile, fit

FloatArray = npt.NDArray[np.float64]
Averages = Mapping[float, Sequence[npt.NDArray[np.float32]]]
"""sigma_rel -> average at each time."""

BLOCK = 64
KEY_EVERY = 32


@dataclass
class Stored:
    """What a reader gets back, one row per average, profile by profile in time order."""

    profiles: list[PowerProfile] = field(default_factory=list)
    rows: list[FloatArray] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    num_bytes: float = 0.0

    def add(self, profile: PowerProfile, base: FloatArray | float, rounded: Rounded) -> FloatArray:
        """Record base + rounded, and return it."""
        values, noise, num_bytes = rounded
        self.profiles.append(profile)
        self.rows.append(base + values)
        self.noise.append(noise)
        self.num_bytes += num_bytes
        return self.rows[-1]


Rounded = tuple[FloatArray, float, float]
"""Values, mean square rounding error as told from the stored bits alone, bytes."""


def as_float(values: FloatArray, dtype: str) -> Rounded:
    """float16 or float32; an error is uniform over the last place, ulp^2 / 12."""
    stored = values.astype(dtype)
    ulp = np.spacing(np.abs(stored)).astype(np.float64)
    return stored.astype(np.float64), float(np.mean(ulp**2) / 12), float(stored.nbytes)


def as_int8(values: FloatArray) -> Rounded:
    """int8 times a scale per block, the scale rounded up to bfloat16; the error is scale^2 / 12."""
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK))
    blocks.flat[: len(values)] = values
    bits = (np.abs(blocks).max(axis=1) / 127).astype(np.float32).view(np.uint32)
    scales = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32).astype(float)
    steps = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None])
    back = (steps * scales[:, None]).ravel()[: len(values)]
    return back, float(np.mean(scales**2) / 12), float(len(values) + 2 * len(scales))


def store_plain(averages: Averages, times: Sequence[int], dtype: str) -> Stored:
    """Every average as it is."""
    stored = Stored()
    for sigma_rel, rows in averages.items():
        for t, row in zip(times, rows, strict=True):
            profile = PowerProfile(t, sigma_rel)
            stored.add(profile, 0.0, as_float(row.astype(np.float64), dtype))
    return stored


def store_deltas(averages: Averages, times: Sequence[int], codec: str) -> Stored:
    """Differences to the last average of the same profile; a float32 key frame every KEY_EVERY."""
    stored = Stored()
    for sigma_rel, rows in averages.items():
        last: FloatArray = np.empty(0)
        for i, (t, row) in enumerate(zip(times, rows, strict=True)):
            values, profile = row.astype(np.float64), PowerProfile(t, sigma_rel)
            if i % KEY_EVERY == 0:
                last = stored.add(profile, 0.0, as_float(values, "float32"))
            elif codec == "delta-float16":
                last = stored.add(profile, last, as_float(values - last, "float16"))
            else:
                last = stored.add(profile, last, as_int8(values - last))
    return stored


def store_predicted(averages: Averages, times: Sequence[int], codecs: Sequence[str]) -> Stored:
    """Differences to what `fit` makes of the shorter averages of the same and all of the last time.

    A long average moves by what the run did since its last time, and the shorter averages of both
    times say what that was: up to 1000 times less is left to store. The first profile is stored as in
    `store_deltas`; the others need no key frame of their own, only a float16 difference to it.
    """
    stored = Stored()
    index: dict[tuple[float, int], int] = {}
    lengths = list(averages)
    for i, t in enumerate(times):
        is_key = i % KEY_EVERY == 0
        for k, sigma_rel in enumerate(lengths):
            values, profile = averages[sigma_rel][i].astype(np.float64), PowerProfile(t, sigma_rel)
            known = [index[s, i] for s in lengths[:k]]
            if not is_key:
                last = lengths[: k + 1] if k else lengths[:1]
                known += [index[s, i - 1] for s in last]
            index[sigma_rel, i] = len(stored.rows)
            if not known:
                stored.add(profile, 0.0, as_float(values, "float32"))
                continue
            inputs = [stored.profiles[j] for j in known]
            # A touch of noise: it only keeps nearly equal profiles from large coefficients.
            x = fit(inputs, [profile], noise=1e-9 * t).coefficients[:, 0]
            base: FloatArray = x @ np.array([stored.rows[j] for j in known])
            use_int8 = codecs[k] == "delta-int8" and not is_key
            left = values - base
            stored.add(profile, base, as_int8(left) if use_int8 else as_float(left, "float16"))
    return stored
