"""Small stores for the tests, and the plain NumPy answer of what they hold."""

from __future__ import annotations

import numpy as np

from posthoc_ema import (
    NewAverage,
    PointProfile,
    PowerProfile,
    SnapshotStore,
    TensorEntry,
    TensorTable,
)
from posthoc_ema.codecs import decode, encode

SIGMA_RELS = (0.05, 0.1)


def entry(name, shape, dtype="float32", averaged=True):
    return TensorEntry(name, tuple(shape), dtype, averaged)


def make_table(*entries, aliases=None):
    return TensorTable({e.name: e for e in entries}, aliases or {})


TABLE = make_table(
    entry("conv.weight", (4, 3, 2)),
    entry("gain", (), "float16"),
    entry("empty", (0, 3)),
    entry("half", (5,), "bfloat16"),
    entry("steps", (), "int64", averaged=False),
    entry("mask", (3,), "bool", averaged=False),
    entry("frozen", (2, 2), "bfloat16", averaged=False),
    aliases={"head.weight": "conv.weight"},
)


def values_of(name, time, profile, table=TABLE):
    """Values of one tensor of one average: any function of the three will do."""
    row = table.entries[name]
    seed = [len(name) + ord(name[0]), time, 0 if profile is None else int(profile * 1e6)]
    rng = np.random.default_rng(seed)
    if row.averaged:
        return rng.normal(size=row.shape).astype(np.float32)
    if row.dtype == "bfloat16":
        return encode(np.float32(rng.normal(size=row.shape)), "bfloat16")
    return np.asarray(rng.integers(0, 2, size=row.shape) + time % 2).astype(row.dtype)


def averages_of(time, dtype="float32", raw=True, table=TABLE, sigma_rels=SIGMA_RELS):
    """All averages of one time; copied tensors depend on the time alone, as in a run."""

    def read(sigma_rel):
        def values(name):
            averaged = table.entries[name].averaged
            return values_of(name, time, sigma_rel if averaged else None, table)

        return values

    new = [NewAverage(PowerProfile(time, s), dtype, read(s)) for s in sigma_rels]
    return [*new, NewAverage(PointProfile(time), dtype, read(None))] if raw else new


def make_store(folder, times=(10, 20, 30), dtype="float32", table=TABLE, **options):
    """A finished store, open for reading."""
    with SnapshotStore.create(folder, clock="images", table=table, run_id="run-1", **options) as s:
        for time in times:
            s.add(time, averages_of(time, dtype, table=table))
    return SnapshotStore.open(folder)


def naive(store, plan, target, dtype="float32", table=TABLE):
    """The sum of the stored averages, one by one, in float64."""
    total = {}
    for name, row in table.entries.items():
        if row.averaged:
            parts = [
                x * decode(encode(values_of(name, r.time, r.sigma_rel, table), dtype), dtype)
                for r, x in zip(plan.inputs, plan.coefficients[:, target], strict=True)
            ]
            total[name] = np.sum(np.float64(parts), axis=0)
        else:
            values = values_of(name, plan.time, None, table)
            total[name] = decode(values, "bfloat16") if row.dtype == "bfloat16" else values
    return total
