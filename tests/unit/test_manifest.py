from __future__ import annotations

import json

import numpy as np
import pytest

from posthoc_ema import SnapshotMismatchError, SnapshotNotFoundError, SnapshotStore, synthesize

from .stores import TABLE, averages_of, entry, make_store, make_table

MIXED = make_table(
    entry("a.steps", (), "int64", averaged=False),
    entry("b.weight", (2, 3)),
    entry("c.mask", (3,), "bool", averaged=False),
    entry("d.weight", (4,), "float16"),
    entry("e.table", (2,), "float64", averaged=False),
    aliases={"z": "d.weight"},
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("damage", ["deleted", "broken"])
def test_rebuilt_store_is_the_one_that_was_lost(tmp_path, dtype, damage):
    """In any order of the tensors: the checksums must find their tensors again."""
    before = make_store(tmp_path, dtype=dtype, table=MIXED, metadata={"a": "b"})
    expected = synthesize(before, [0.07, 0])
    path = tmp_path / "manifest.json"
    path.unlink() if damage == "deleted" else path.write_text("{")
    after = SnapshotStore.rebuild(tmp_path)
    assert (after.records, after.table, after.metadata) == (
        before.records,
        before.table,
        before.metadata,
    )
    assert (after.run_id, after.clock) == (before.run_id, before.clock)
    assert list(after.verify()) == []
    for old, new in zip(expected, synthesize(after, [0.07, 0]), strict=True):
        for name, values in old.items():
            np.testing.assert_array_equal(values, new[name])
    with SnapshotStore.resume(
        tmp_path, run_id="run-1", clock="images", table=MIXED, time=30
    ) as store:
        store.add(40, averages_of(40, dtype, table=MIXED))
    assert list(SnapshotStore.open(tmp_path).verify()) == []


def test_rebuild_leaves_damaged_files_out(tmp_path):
    make_store(tmp_path)
    (tmp_path / "000000000020-sigma_rel-0.1.safetensors").write_bytes(b"junk")
    store = SnapshotStore.rebuild(tmp_path)
    assert len(store.records) == 6
    assert [p.file for p in store.verify()] == ["000000000020-sigma_rel-0.1.safetensors"]
    assert (tmp_path / "manifest.json.old").exists()


def test_rebuild_refuses_two_runs_and_empty_folders(tmp_path):
    with pytest.raises(SnapshotNotFoundError, match="no readable snapshot"):
        SnapshotStore.rebuild(tmp_path / "nowhere")
    make_store(tmp_path / "a")
    with SnapshotStore.create(tmp_path / "b", clock="images", table=TABLE, run_id="x") as other:
        other.add(70, averages_of(70))
    for path in (tmp_path / "b").glob("*.safetensors"):
        path.rename(tmp_path / "a" / path.name)
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    with pytest.raises(SnapshotMismatchError, match="not of one run"):
        SnapshotStore.rebuild(tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before


def test_manifest_is_readable_json_with_the_facts(tmp_path):
    make_store(tmp_path)
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert (value["schema"], value["clock"], value["run_id"]) == (2, "images", "run-1")
    assert value["tensors"]["steps"] == {"shape": [], "dtype": "int64", "kind": "copy"}
    assert value["snapshots"][0]["profile"] == {"kind": "power", "sigma_rel": 0.05}
