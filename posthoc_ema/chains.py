"""Chains of differences: which files make up a stored average. Records only, no file access.

An average stored as a difference D_i stands for R_i = sum_k b_k R_k + D_i, where the b_k of its bases sum to
one. Following the bases leads to key frames, which stand by themselves. So R_i is a combination of
the files of its chain, and a combination of averages is a combination of files:

    R_i = sum_j w_ij D_j,      sum_i x_i R_i = sum_j D_j sum_i x_i w_ij.

The shortest profile of a time is stored as the difference to the last one of its kind. The others are
nearly known then: what the run did since the last time shows in the shorter averages of both times, and
`fit` says with which coefficients. What is left is tens of times smaller than the plain difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.fitting import fit
from posthoc_ema.profiles import FloatArray, PointProfile, PowerProfile
from posthoc_ema.snapshot import SnapshotRecord, StoredProfile, kind_of

_TOUCH_OF_NOISE = 1e-9
"""Noise of the predicting fit over t: it only keeps nearly equal profiles from large coefficients."""


def parts(by_file: Mapping[str, SnapshotRecord], record: SnapshotRecord) -> dict[str, float]:
    """Files that add up to an average, with their coefficients w_ij; its own is last and 1.

    Args:
        by_file: file -> record, in the order of the store (bases first); must hold every base.
        record: the average.
    """
    order = list(by_file)
    total = {record.file: 1.0}
    for name in order[order.index(record.file) :: -1]:
        if name in total:
            for base, x in by_file[name].bases:
                total[base] = total.get(base, 0.0) + x * total[name]
    return {name: total[name] for name in order if name in total}


def file_coefficients(
    records: Sequence[SnapshotRecord], used: Sequence[SnapshotRecord], coefficients: FloatArray
) -> tuple[list[SnapshotRecord], FloatArray]:
    """From coefficients of averages to coefficients of the files that are read.

    Args:
        records: all records, in the order of the store (bases first).
        used: averages that are combined, (num_used).
        coefficients: shape (num_used, num_targets).

    Returns:
        The files that are read, in the order of `records`, (num_files), and their coefficients,
        (num_files, num_targets).

    Raises:
        SnapshotFormatError: they are not finite, as happens if a manifest is damaged.
    """
    total: dict[str, FloatArray] = {}
    for record, x in zip(used, coefficients, strict=True):
        total[record.file] = total.get(record.file, 0.0) + x
    with np.errstate(over="ignore", invalid="ignore"):
        for record in reversed(records):
            if record.file in total:
                for base, x in record.bases:
                    total[base] = total.get(base, 0.0) + x * total[record.file]
    files = [record for record in records if record.file in total]
    stacked = np.array([total[r.file] for r in files]).reshape(len(files), coefficients.shape[1])
    if not np.isfinite(stacked).all():
        name = files[int(np.argmin(np.isfinite(stacked).all(axis=1)))].file
        raise SnapshotFormatError(
            f"the coefficients that the manifest lists for bases add up to no number for {name}: the "
            "manifest is damaged. `phema verify --rebuild` makes it anew from the files."
        )
    return files, stacked


def dependents(
    records: Sequence[SnapshotRecord], gone: Iterable[SnapshotRecord]
) -> list[SnapshotRecord]:
    """Averages that cannot be read without the files in `gone`; `records` in the order of the store."""
    lost = {record.file for record in gone}
    found = []
    for record in records:
        if record.file not in lost and any(base in lost for base, _ in record.bases):
            lost.add(record.file)
            found.append(record)
    return found


def choose_bases(
    earlier: Sequence[SnapshotRecord], time: int, profile: StoredProfile, longest: int
) -> list[tuple[SnapshotRecord, float]]:
    """What is taken off a new average before it is stored.

    Args:
        earlier: what is stored before it, in the order of the store: other times, and the shorter
            averages of its own time.
        time: time of the new average.
        profile: which average.
        longest: times in a chain, at most; a full one makes the new average a key frame.

    Returns:
        Bases with coefficients that sum to one; empty for a key frame.
    """
    if isinstance(profile, PointProfile):
        return []
    averages = [r for r in earlier if not isinstance(r.profile, PointProfile)]
    beside = [r for r in averages if r.time == time and isinstance(r.profile, PowerProfile)]
    if not isinstance(profile, PowerProfile) or not beside:
        last = _last(averages, time, profile)
        by_file = {r.file: r for r in averages}
        full = last is None or len(parts(by_file, last)) >= longest
        return [] if full or last is None else [(last, 1.0)]
    if not beside[0].bases:
        return []  # nothing earlier of the chain predicts it: a plain difference would be large
    # The chain of the shortest profile says since when bases may be taken.
    by_file = {r.file: r for r in averages}
    began = min(by_file[name].time for name in parts(by_file, beside[0]))
    found = list(beside)
    for kind in (*(r.profile for r in beside), profile):
        last = _last(averages, time, kind)
        if last is not None and last.time >= began:
            found.append(last)
    x = fit([r.profile for r in found], [profile], noise=_TOUCH_OF_NOISE * time).coefficients[:, 0]
    return list(zip(found, x.tolist(), strict=True))


def rewritten_dtype(by_file: Mapping[str, SnapshotRecord], record: SnapshotRecord) -> str:
    """Codec of a difference that is written anew because a base of it goes.

    A longer average that was predicted well is little to store, and int8 does. With bases gone much more
    is left, so it becomes float16 then: in int8 it would be most of the error of a pruned store.

    Args:
        by_file: file -> record, before anything goes.
        record: the average.
    """
    predicted = any(by_file[base].time == record.time for base, _ in record.bases)
    return "delta-float16" if predicted and record.dtype == "delta-int8" else record.dtype


def _last(
    averages: Sequence[SnapshotRecord], time: int, profile: StoredProfile
) -> SnapshotRecord | None:
    """The latest average of the same kind before `time`."""
    kind = kind_of(profile)
    same = [r for r in averages if r.time < time and kind_of(r.profile) == kind]
    return max(same, key=lambda r: r.time, default=None)
