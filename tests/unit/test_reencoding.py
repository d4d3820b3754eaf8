"""A store in another dtype: same run, same averages, known error."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posthoc_ema import (
    NewAverage,
    PointProfile,
    PowerProfile,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotStore,
    synthesize,
)
from posthoc_ema.reencoding import reencode

from .stores import entry, make_table

TABLE = make_table(entry("w", (1000,)), entry("n", (), "int64", averaged=False))


def walk(time):
    rng = np.random.default_rng(0)
    steps = np.vstack([rng.normal(size=1000), 0.01 * rng.normal(size=(10, 1000))])
    return steps[: time + 1].sum(axis=0).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    def read(time):
        return lambda name: np.asarray(time) if name == "n" else walk(time)

    with SnapshotStore.create(
        tmp_path / "float16", clock="images", table=TABLE, metadata={"a": "b"}
    ) as new:
        for time in range(1, 11):
            profiles = [PowerProfile(time, 0.05), PowerProfile(time, 0.2), PointProfile(time)]
            new.add(time, [NewAverage(p, "float16", read(time)) for p in profiles])
    return SnapshotStore.open(tmp_path / "float16")


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("float32", 1e-6), ("delta-float16", 1e-4), ("delta-int8", 1e-2), ("bfloat16", 2e-1)],
)
def test_reencoded_store_is_the_same_run(store, tmp_path, dtype, limit):
    new = reencode(store, tmp_path / "new", dtype)
    assert not list(new.verify())
    assert (new.run_id, new.clock, new.table, new.metadata, new.times) == (
        store.run_id,
        store.clock,
        store.table,
        store.metadata,
        store.times,
    )
    assert [r.profile for r in new.records] == [r.profile for r in store.records]
    for sigma_rel in (0.1, 0):
        ours, theirs = synthesize(new, sigma_rel), synthesize(store, sigma_rel)
        assert ours["n"] == theirs["n"] == 10
        np.testing.assert_allclose(ours["w"], theirs["w"], atol=limit)
    # what float16 lost stays lost, and the records know it
    assert all(n.noise >= o.noise * 0.99 for n, o in zip(new.records, store.records, strict=True))


def test_noise_of_schema_1_is_told_from_the_bits(store, tmp_path):
    path = store.folder / "manifest.json"
    value = json.loads(path.read_text())
    known = [row.pop("noise") for row in value["snapshots"]]
    path.write_text(json.dumps(value))
    new = reencode(SnapshotStore.open(store.folder), tmp_path / "new", "float32")
    np.testing.assert_allclose([r.noise for r in new.records], known, rtol=0.2)


def test_a_folder_with_anything_in_it_is_refused(store, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").touch()
    with pytest.raises(SnapshotMismatchError, match="not empty"):
        reencode(store, tmp_path / "new", "float32")


def test_nothing_is_left_of_a_conversion_that_fails(store, tmp_path):
    path = store.path(store.records[-1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotFormatError, match="damaged"):
        reencode(store, tmp_path / "new", "delta-int8")
    assert [p.name for p in tmp_path.iterdir()] == ["float16"]
