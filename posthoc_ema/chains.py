"""Chains of differences: which files make up a stored average. Records only, no file access.

An average stored as a difference D_i stands for R_i = R_base(i) + D_i; following the bases leads to a key
frame, which stands by itself. So R_i is the sum of the files of its chain, and a combination of
averages is a combination of files:

    sum_i x_i R_i = sum_j D_j (sum of x_i over all i whose chain holds j).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from posthoc_ema.profiles import FloatArray
from posthoc_ema.snapshot import SnapshotRecord, kind_of


def chain(by_file: Mapping[str, SnapshotRecord], record: SnapshotRecord) -> list[SnapshotRecord]:
    """Records whose files add up to an average, the key frame first.

    Args:
        by_file: file -> record; must hold every base.
        record: the average.
    """
    links = [record]
    while links[-1].base is not None:
        links.append(by_file[links[-1].base])
    return links[::-1]


def file_coefficients(
    records: Iterable[SnapshotRecord], used: Sequence[SnapshotRecord], coefficients: FloatArray
) -> tuple[list[SnapshotRecord], FloatArray]:
    """From coefficients of averages to coefficients of the files that are read.

    Args:
        records: all records of the store.
        used: averages that are combined, (num_used).
        coefficients: shape (num_used, num_targets).

    Returns:
        The files that are read, by time, (num_files), and their coefficients, (num_files, num_targets).
    """
    by_file = {record.file: record for record in records}
    total: dict[str, FloatArray] = {}
    for record, x in zip(used, coefficients, strict=True):
        for link in chain(by_file, record):
            total[link.file] = total.get(link.file, 0.0) + x
    files = sorted((by_file[name] for name in total), key=lambda r: (r.time, r.file))
    stacked = np.array([total[r.file] for r in files]).reshape(len(files), coefficients.shape[1])
    return files, stacked


def dependents(
    records: Sequence[SnapshotRecord], gone: Iterable[SnapshotRecord]
) -> list[SnapshotRecord]:
    """Averages that cannot be read without the files in `gone`, in the order of their time."""
    lost = {record.file for record in gone}
    found = []
    for record in sorted(records, key=lambda r: r.time):  # a base is older than what stands on it
        if record.base in lost and record.file not in lost:
            lost.add(record.file)
            found.append(record)
    return found


def next_base(
    records: Iterable[SnapshotRecord], record_time: int, profile_kind: object, longest: int
) -> SnapshotRecord | None:
    """The average that a new one of the same length is stored as a difference to.

    Args:
        records: what is stored.
        record_time: time of the new average.
        profile_kind: its profile without the time, see `snapshot.kind_of`.
        longest: files in a chain, at most; a full one makes the new average a key frame.

    Returns:
        The latest earlier average of the kind, or None for a key frame.
    """
    by_file = {record.file: record for record in records}
    earlier = [
        r for r in by_file.values() if r.time < record_time and kind_of(r.profile) == profile_kind
    ]
    if not earlier:
        return None
    last = max(earlier, key=lambda r: r.time)
    return last if len(chain(by_file, last)) < longest else None
