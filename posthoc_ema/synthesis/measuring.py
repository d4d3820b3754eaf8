"""What the stored averages say about themselves: how fast the weights move, and what storage lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_ema.chains import file_coefficients
from posthoc_ema.codecs import BLOCK, SCALES, AnyArray, decode, decode_int8_blocks, storage_dtype
from posthoc_ema.diagnostics import Scale, sampled_scale
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.store import SnapshotStore
from posthoc_ema.tensor_files import TensorFile

SAMPLE = 1 << 14
"""Elements that are looked at in each file, at most."""
_RUN = 256  # elements that are read together: half a page of float16, a multiple of BLOCK
_FLOAT32 = 2.0**-24  # half a unit in the last place of float32, relative


@dataclass(frozen=True)
class Measurement:
    """What a sample of the elements of the stored averages shows.

    Attributes:
        scale: how fast the weights move, or None where that cannot be told (a single average).
        noise: mean square storage error of an element of each average, (num_averages).
        rms: root mean square of an element of the latest average.
        num_elements: how many elements were looked at.
        rounding: mean square of float32's rounding error of an element: what each update of a tracker
            adds to an average.
    """

    scale: Scale | None
    noise: npt.NDArray[np.float64]
    rms: float
    num_elements: int
    rounding: float

    @property
    def fit_noise(self) -> npt.NDArray[np.float64]:
        """`noise` in the unit of a random-walk fit, (num_averages)."""
        return (
            np.zeros_like(self.noise)
            if self.scale is None
            else self.scale.noise_over_scale(self.noise)
        )


def measure(store: SnapshotStore, records: Sequence[SnapshotRecord]) -> Measurement:
    """Look at a sample of the elements of some averages.

    Args:
        store: where they are.
        records: which, by time, (num_averages), at least one.

    Returns:
        The measurement.

    Raises:
        SnapshotFormatError: a file is missing or damaged.

    Example:
        >>> from posthoc_ema import SnapshotStore
        >>> store = SnapshotStore.open("snapshots")  # doctest: +SKIP
        >>> measure(store, store.records).num_elements  # doctest: +SKIP
        16384
    """
    runs = _runs({e.name: math.prod(e.shape) for e in store.table.entries.values() if e.averaged})
    ordered, _ = file_coefficients(store.records, records, np.zeros((len(records), 0)))
    with ThreadPoolExecutor(8) as pool:  # many small reads: the disk likes company
        stored = list(pool.map(lambda r: _read_sample(store, r, runs), ordered))
    values: dict[str, npt.NDArray[np.float64]] = {}
    noises: dict[str, float] = {}
    for record, (own, rounding) in zip(ordered, stored, strict=True):
        values[record.file] = own + sum(x * values[base] for base, x in record.bases)
        noises[record.file] = rounding if record.noise is None else record.noise
    samples = np.array([values[record.file] for record in records])
    finite = np.isfinite(samples).all(axis=0)
    samples = samples[:, finite]
    squares = np.mean(samples**2, axis=1) if finite.any() else np.zeros(len(records))
    # Averages are tracked in float32: no storage makes them better than that.
    noise = np.array([noises[r.file] for r in records]) + squares * _FLOAT32**2
    if not finite.any():
        return Measurement(None, noise, 0.0, 0, 0.0)
    scale = sampled_scale([r.profile for r in records], samples, noise)
    ulp = np.spacing(np.abs(samples[-1]).astype(np.float32)).astype(np.float64)
    return Measurement(
        scale,
        noise,
        float(np.sqrt(squares[-1])),
        int(finite.sum()),
        float(np.mean(ulp**2)) / 12,
    )


def _runs(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(tensor, first element, one past the last) of runs spread evenly over all elements."""
    total = sum(sizes.values())
    count = -(-total // _RUN) if total <= SAMPLE else SAMPLE // _RUN
    ends = list(itertools.accumulate(sizes.values()))
    names = list(sizes)
    runs = []
    for k in range(count):
        position = total * k // count
        i = int(np.searchsorted(ends, position, side="right"))
        start = (position - (ends[i] - sizes[names[i]])) // BLOCK * BLOCK
        wanted = _RUN if total > SAMPLE else -(-total // count)
        while wanted > 0 and i < len(names):
            stop = min(sizes[names[i]], start + wanted)
            if stop > start:
                runs.append((names[i], start, stop))
            wanted -= stop - start
            i, start = i + 1, 0
    return _merged(runs)


def _merged(runs: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Runs without overlaps."""
    merged: list[tuple[str, int, int]] = []
    for name, start, stop in runs:
        if merged and merged[-1][0] == name and start <= merged[-1][2]:
            merged[-1] = (name, merged[-1][1], max(stop, merged[-1][2]))
        else:
            merged.append((name, start, stop))
    return merged


def _read_sample(
    store: SnapshotStore, record: SnapshotRecord, runs: Sequence[tuple[str, int, int]]
) -> tuple[npt.NDArray[np.float64], float]:
    """Sampled elements of one file, and the mean square rounding error that their bits imply."""
    header, _ = store.header(record)
    pieces, squares = [np.empty(0)], 0.0
    with TensorFile(store.path(record), header) as file:

        def bits(name: str, start: int, stop: int) -> AnyArray:
            info = header.tensors[name]
            begin = info.start + start * info.itemsize
            data = file.read_bytes(begin, begin + (stop - start) * info.itemsize)
            return data.view(storage_dtype(info.dtype))

        for name, start, stop in runs:
            stored = bits(name, start, stop)
            dtype = header.tensors[name].dtype
            if dtype == "int8":
                scales = bits(name + SCALES, start // BLOCK, -(-stop // BLOCK))
                values = decode_int8_blocks(stored, scales, np.empty(stop - start, np.float32))
            else:
                values = decode(stored, dtype)
                squares += _rounding(values, dtype)
            pieces.append(values.astype(np.float64))
    sample = np.concatenate(pieces)
    return sample, squares / max(len(sample), 1)


_DIGITS = {"float16": 10, "bfloat16": 7}
_SMALLEST = {"float16": -24, "bfloat16": -133}


def _rounding(values: npt.NDArray[np.float32], dtype: str) -> float:
    """Sum of ulp^2 / 12: for files of schema 1, which do not say what storage lost."""
    if dtype not in _DIGITS:
        return 0.0
    _, exponent = np.frexp(values[np.isfinite(values)].astype(np.float64))
    ulp = np.exp2(np.maximum(exponent - 1.0 - _DIGITS[dtype], _SMALLEST[dtype]))
    return float(np.sum(ulp**2)) / 12
