"""Stores of differences: chains, folding, damage, crashes, re-encoding."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil

import numpy as np
import pytest

from posthoc_ema import (
    ConfigError,
    NewAverage,
    PhemaWarning,
    PowerProfile,
    SnapshotFormatError,
    SnapshotStore,
    SnapshotWriteError,
    gamma_from_sigma_rel,
    power_update_weight,
    synthesize,
)
from posthoc_ema import snapshot_folder as store_module
from posthoc_ema.chains import dependents, parts
from posthoc_ema.codecs import DELTA_WIDTHS, decode
from posthoc_ema.snapshot_files import CHUNK

from .stores import entry, make_table

DELTAS = ["delta", "delta-float16", "delta-int8"]
SIZE = 3000
TABLE = make_table(
    entry("weight", (SIZE,)),
    entry("odd", (13, 5), "bfloat16"),
    entry("gain", ()),
    entry("empty", (0, 3)),
    entry("count", (), "int64", averaged=False),
)
TIMES = list(range(100, 2100, 100))


@functools.cache
def path(name, sigma_rel):
    """Averages at all TIMES of one random walk: 3 % of the weights' size per snapshot."""
    rng = np.random.default_rng(len(name))
    shape = TABLE.entries[name].shape
    weights, average = rng.normal(size=shape), np.zeros(shape)
    gamma = float(gamma_from_sigma_rel(sigma_rel))
    found = {}
    for t in range(10, 2110, 10):
        weights = weights + rng.normal(size=shape) * 0.01
        average = average + power_update_weight(gamma, t, 10) * (weights - average)
        found[t] = np.asarray(average, dtype=np.float32)
    return found


def walk(time, sigma_rel, name):
    return path(name, sigma_rel)[time]


def averages(time, codec):
    def reader(sigma_rel):
        def read(name):
            return (
                np.asarray(time)
                if name == "count"
                else np.asarray(walk(time, sigma_rel, name), dtype=np.float32)
            )

        return read

    return [NewAverage(PowerProfile(time, s), codec, reader(s)) for s in (0.05, 0.1)]


@pytest.fixture(params=DELTAS)
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """codec -> a finished store, made once; tests work on copies."""

    @functools.cache
    def make(codec):
        folder = tmp_path_factory.mktemp("made") / codec
        with SnapshotStore.create(folder, clock="steps", table=TABLE, run_id="r") as store:
            for time in TIMES:
                store.add(time, averages(time, codec))
        return folder

    return make


@pytest.fixture
def folder(tmp_path, codec, made):
    return shutil.copytree(made(codec), tmp_path / "store")


def stored(store, record, name="weight"):
    entry_ = store.table.entries[name]
    with store.read(record) as reader:
        size = int(np.prod(entry_.shape))
        pieces = [reader.values(entry_, i, min(size, i + CHUNK)) for i in range(0, size, CHUNK)]
    return np.concatenate(pieces).reshape(entry_.shape) if pieces else np.zeros(entry_.shape)


def errors(store, name="weight"):
    return {
        record.file: float(
            np.sqrt(
                np.mean(
                    (stored(store, record, name) - walk(record.time, record.sigma_rel, name)) ** 2
                )
            )
        )
        for record in store.records
    }


LIMITS = {"delta": 1e-4, "delta-float16": 2e-5, "delta-int8": 4e-4}
"""Root mean square error of weights of size 1. float16 itself: 2e-4."""


def test_delta_store_keeps_averages_far_better_than_float16(folder, codec):
    store = SnapshotStore.open(folder)
    found = errors(store)
    assert len(found) == 2 * len(TIMES)
    assert max(found.values()) < LIMITS[codec]
    if codec == "delta":  # int8 is enough for the longer average, because little of it is left
        assert np.median([e for f, e in found.items() if "-0.1." in f]) < 2e-5
    # no pile-up: the last of a chain is as good as its third time
    assert found[store.records[-2].file] < 1.5 * found[store.records[4].file]


def test_delta_store_takes_the_bytes_that_it_should(folder, codec):
    store = SnapshotStore.open(folder)
    per_weight = {"delta-float16": 2, "delta-int8": 1 + 2 / 64, "float32": 4}
    weights = SIZE + 65 + 1
    for record in store.records:
        header, _ = store.header(record)
        data = sum(info.end - info.start for info in header.tensors.values()) - 8
        assert data == pytest.approx(per_weight[record.dtype] * weights, rel=0.01)
    dtypes = [r.dtype for r in store.records]
    first, others = DELTA_WIDTHS[codec]
    assert dtypes[:2] == ["float32", "float32"]
    assert dtypes[2::2] == [first] * 19
    assert dtypes[3::2] == [others] * 19


def test_noise_on_record_is_the_true_storage_error(folder):
    store = SnapshotStore.open(folder)
    for record in store.records:
        squares = sum(
            np.sum((stored(store, record, n) - walk(record.time, record.sigma_rel, n)) ** 2)
            for n in ("weight", "odd", "gain")
        )
        assert record.noise == pytest.approx(squares / (SIZE + 66), rel=2e-3, abs=1e-13)


def test_chains_start_anew_and_bases_are_what_they_should_be(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(store_module, "LONGEST_CHAIN", 8)
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=TABLE) as store:
        for time in TIMES:
            store.add(time, averages(time, codec)[::-1])  # in any order
    store = SnapshotStore.open(tmp_path / "s")
    assert [r.time for r in store.records if not r.bases] == [100, 100, 900, 900, 1700, 1700]
    by_file = {r.file: r for r in store.records}
    for record in store.records:
        bases = {(by_file[f].time, by_file[f].sigma_rel) for f, _ in record.bases}
        before = record.time - 100
        if record.time in (100, 900, 1700):
            assert bases == set()
        elif record.sigma_rel == 0.05:
            assert bases == {(before, 0.05)}
        else:
            assert bases == {(record.time, 0.05), (before, 0.05), (before, 0.1)}
        assert sum(x for _, x in record.bases) == pytest.approx(1 if bases else 0)
        assert len(parts(by_file, record)) <= 16
    assert max(errors(store).values()) < LIMITS[codec]


def test_three_profiles_stand_on_the_shorter_ones(tmp_path):
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=TABLE) as store:
        for time in TIMES[:3]:
            read = {
                s: lambda n, s=s, t=time: np.asarray(t) if n == "count" else walk(t, s, n)
                for s in (0.2, 0.02, 0.06)
            }
            store.add(
                time, [NewAverage(PowerProfile(time, s), "delta", r) for s, r in read.items()]
            )
    store = SnapshotStore.open(tmp_path / "s")
    assert [len(r.bases) for r in store.records] == [0, 0, 0, 1, 3, 5, 1, 3, 5]
    assert max(errors(store).values()) < 2e-4


def test_synthesis_reads_a_delta_store_like_any_other(folder, tmp_path, codec):
    with SnapshotStore.create(tmp_path / "plain", clock="steps", table=TABLE) as plain:
        for time in TIMES:
            plain.add(time, averages(time, "float32"))
    limit = {"delta": 5e-4, "delta-float16": 1e-4, "delta-int8": 5e-3}[codec]
    for at in (TIMES[0], TIMES[5], TIMES[-1]):
        ours, theirs = (synthesize(f, 0.07, at=at) for f in (folder, tmp_path / "plain"))
        assert ours.keys() == theirs.keys()
        assert int(ours["count"]) == at
        for name in ("weight", "odd", "gain"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=limit)


@pytest.mark.parametrize("gone", [[500], [100], [100, 200], [300, 400, 1700], [2000]])
def test_removing_folds_differences_into_what_stands_on_them(folder, codec, gone):
    before = SnapshotStore.open(folder)
    expected = {(r.time, r.sigma_rel): stored(before, r) for r in before.records}
    with SnapshotStore.edit(folder) as store:
        store.remove([r for r in store.records if r.time in gone and r.sigma_rel == 0.05])
    after = SnapshotStore.open(folder)
    assert not list(after.verify())
    assert len(after.records) == len(before.records) - len(gone)
    limit = {"delta": 1e-3, "delta-float16": 2e-4, "delta-int8": 4e-3}[codec]
    for record in after.records:
        difference = stored(after, record) - expected[record.time, record.sigma_rel]
        assert np.abs(difference).max() < limit
    untouched = {r.file for r in before.records if r.time < gone[0]}
    assert untouched <= {r.file for r in after.records}
    for record in after.records:
        squares = np.mean(
            (stored(after, record) - walk(record.time, record.sigma_rel, "weight")) ** 2
        )
        assert squares < 4 * record.noise + 1e-13


def test_pruning_again_and_again_stays_exact_enough(folder, codec):
    """A store that is thinned while it grows writes the same links anew many times."""
    with SnapshotStore.edit(folder) as store:
        for time in [200, 300, 400, 600, 700, 900, 1000, 1100, 1300, 1400, 1500, 1700, 1800]:
            store.remove([r for r in store.records if r.time == time])
    store = SnapshotStore.open(folder)
    assert not list(store.verify())
    found = errors(store)
    assert max(found.values()) < 3 * LIMITS[codec]
    for record in store.records:
        assert found[record.file] ** 2 < 4 * record.noise + 1e-13


def test_adding_after_removing_the_last_goes_on(folder, codec):
    with SnapshotStore.edit(folder) as store:
        store.remove([r for r in store.records if r.time >= 1900])
        for time in (1900, 2000):
            store.add(time, averages(time, codec))
    store = SnapshotStore.open(folder)
    assert not list(store.verify())
    assert store.times == TIMES


@pytest.mark.parametrize("moment", range(12))
def test_crash_in_the_middle_of_folding_loses_nothing(folder, monkeypatch, moment):
    """At each write: the new files, the manifest, and the removal of the old ones."""
    before = SnapshotStore.open(folder)
    expected = {r.file: stored(before, r) for r in before.records}
    count = [0]
    real_replace = type(folder).replace

    def crash(path, target):
        count[0] += 1
        if count[0] == moment + 1:
            raise KeyboardInterrupt
        return real_replace(path, target)

    doomed = [r for r in before.records if r.time in (300, 700, 1200)]
    with monkeypatch.context() as patch, SnapshotStore.edit(folder) as store:
        patch.setattr(type(folder), "replace", crash)
        try:
            store.remove(doomed)
            finished = True
        except KeyboardInterrupt:
            finished = False
    assert finished == (moment >= 7)  # six files and the manifest
    after = SnapshotStore.open(folder)
    assert not list(after.verify())
    if not finished:
        assert {r.file: stored(after, r).tolist() for r in after.records} == {
            k: v.tolist() for k, v in expected.items()
        }
    else:
        assert len(after.records) == len(before.records) - 6


def test_full_disk_while_folding_leaves_the_store_as_it_was(folder, monkeypatch):
    before = SnapshotStore.open(folder).records

    def full(*_):
        raise OSError(28, "No space left on device")

    with SnapshotStore.edit(folder) as store:
        with monkeypatch.context() as patch:
            patch.setattr("posthoc_ema.tensor_files.os.ftruncate", full)
            with pytest.raises(SnapshotWriteError, match="Make room"):
                store.remove([r for r in store.records if r.time == 300])
        assert store.records == before
    assert not list(SnapshotStore.open(folder).verify())


def test_damaged_link_is_named_with_what_it_takes_along(folder):
    store = SnapshotStore.open(folder)
    victim = next(r for r in store.records if r.time == 1400 and r.sigma_rel == 0.05)
    path = store.path(victim)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (problem,) = store.verify()
    assert problem.file == victim.file
    assert problem.takes_along == tuple(r.file for r in dependents(store.records, [victim]))
    # the longer average of its time, and all of the later times of the chain
    assert [int(name[:12]) for name in problem.takes_along] == [1400] + [
        t for t in TIMES if t > 1400 for _ in range(2)
    ]
    assert "takes 13 averages along" in problem.what
    with pytest.raises(SnapshotFormatError, match=victim.file):
        synthesize(folder, 0.07)
    with SnapshotStore.edit(folder) as editable:
        assert len(editable.drop([victim])) == 14
    left = SnapshotStore.open(folder)
    assert not list(left.verify())
    assert len(left.records) == len(store.records) - 14
    synthesize(folder, 0.07)


def test_damaged_base_makes_the_next_average_a_key_frame(folder, codec):
    store = SnapshotStore.open(folder)
    path = store.path(next(r for r in store.records if r.time == 2000 and r.sigma_rel == 0.05))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    TIMES.append(2100)
    try:
        with SnapshotStore.edit(folder) as store, pytest.warns(PhemaWarning, match="by itself"):
            new = store.add(2100, averages(2100, codec))
    finally:
        TIMES.pop()
    assert [not record.bases for record in new] == [True, True]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_start_a_new_chain(tmp_path, codec, bad):
    table = make_table(entry("w", (100,)))
    values = [np.full(100, float(i), dtype=np.float32) for i in range(5)]
    values[2][7] = bad
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        for i, v in enumerate(values):
            store.add(i + 1, [NewAverage(PowerProfile(i + 1, 0.1), codec, lambda _, v=v: v)])
    store = SnapshotStore.open(tmp_path / "s")
    assert [not r.bases for r in store.records] == [True, False, True, True, False]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(stored(store, store.records[2], "w"), values[2])
    np.testing.assert_allclose(stored(store, store.records[4], "w"), values[4], atol=1e-2)


def test_differences_beyond_float16_are_widened(tmp_path):
    table = make_table(entry("w", (10,)), entry("v", (10,)))
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        for time, size in ((1, 0.0), (2, 1e6)):
            values = {"w": np.full(10, size, "f4"), "v": np.full(10, 0.1 * time, "f4")}
            store.add(time, [NewAverage(PowerProfile(time, 0.1), "delta-float16", values.get)])
    store = SnapshotStore.open(tmp_path / "s")
    header, _ = store.header(store.records[1])
    assert {n: i.dtype for n, i in header.tensors.items()} == {"w": "float32", "v": "float16"}
    np.testing.assert_array_equal(stored(store, store.records[1], "w"), np.full(10, 1e6))


def test_manifest_made_anew_finds_the_bases(folder):
    before = SnapshotStore.open(folder).records
    (folder / "manifest.json").unlink()
    assert SnapshotStore.rebuild(folder).records == before
    with SnapshotStore.edit(folder) as store:
        store.remove([r for r in store.records if r.time == 300])
        after = store.records
    (folder / "manifest.json").unlink()
    rebuilt = SnapshotStore.rebuild(folder)
    assert [(r.file, r.bases) for r in rebuilt.records] == [(r.file, r.bases) for r in after]
    assert not list(rebuilt.verify())


def test_manifest_made_anew_leaves_out_what_stands_on_a_lost_file(folder):
    store = SnapshotStore.open(folder)
    victim = next(r for r in store.records if r.time == 1500)
    lost = {victim.file, *(r.file for r in dependents(store.records, [victim]))}
    store.path(victim).unlink()
    (folder / "manifest.json").unlink()
    rebuilt = SnapshotStore.rebuild(folder)
    assert {r.file for r in rebuilt.records} == {r.file for r in store.records} - lost


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row["bases"][0].__setitem__(0, "000000000999-raw.safetensors"), "not listed"),
        (lambda row: row["bases"][0].__setitem__(0, row["file"]), "not listed before it"),
        (lambda row: row.pop("bases"), "do not fit"),
        (lambda row: row.update(bases=7), "do not fit"),
        (lambda row: row.update(bases=[["x"]]), "do not fit"),
        (lambda row: row.update(bases=[["x", float("nan")]]), "NaN is not JSON"),
        (lambda row: row.update(dtype="float16"), "do not fit"),
        (lambda row: row.update(noise=-1.0), "not a variance"),
        (lambda row: row.update(noise="x"), "not a variance"),
    ],
    ids=["unlisted", "itself", "gone", "number", "short", "nan", "plain", "negative", "text"],
)
def test_manifest_with_a_bad_base_is_refused(folder, change, reason):
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    row = next(
        r for r in value["snapshots"] if r["time"] == 300 and r["profile"]["sigma_rel"] == 0.05
    )
    change(row)
    path.write_text(json.dumps(value))
    with pytest.raises(SnapshotFormatError, match=reason):
        SnapshotStore.open(folder)


def test_store_of_schema_1_is_read(tmp_path):
    """As version 0.1.0 wrote it: no base, no noise, schema 1."""
    folder = tmp_path / "s"
    table = make_table(entry("w", (10,)))
    with SnapshotStore.create(folder, clock="steps", table=table) as store:
        store.add(5, [NewAverage(PowerProfile(5, 0.1), "float16", lambda _: np.ones(10, "f4"))])
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    value["schema"] = 1
    for row in value["snapshots"]:
        del row["noise"]
    path.write_text(json.dumps(value))
    assert SnapshotStore.open(folder).records[0].noise is None
    np.testing.assert_array_equal(synthesize(folder, 0.1)["w"], np.ones(10))
    shutil.rmtree(folder)


def test_int8_scales_are_plain_safetensors(folder, codec):
    from safetensors import safe_open

    store = SnapshotStore.open(folder)
    record = store.records[-1]
    with safe_open(store.path(record), "pt") as file:
        weight = file.get_tensor("weight")
        if codec == "delta-float16":
            assert str(weight.dtype) == "torch.float16"
            return
        scales = file.get_tensor("weight:scales")
    plain = weight.float() * scales.float().repeat_interleave(64)[:SIZE]
    by_file = {r.file: r for r in store.records}
    predicted = sum(x * stored(store, by_file[base]) for base, x in record.bases)
    np.testing.assert_allclose(plain.numpy(), stored(store, record) - predicted, atol=1e-6)
    assert decode(np.zeros(1, "<u2"), "bfloat16")[0] == 0


def test_next_difference_reads_what_was_kept_and_not_the_chain(tmp_path, monkeypatch, codec):
    read = []
    real = store_module.StoredFile.__init__

    def spy(self, path, header, digests):
        read.append(path.name)
        real(self, path, header, digests)

    monkeypatch.setattr(store_module.StoredFile, "__init__", spy)
    folder = tmp_path / "s"
    with SnapshotStore.create(folder, clock="steps", table=TABLE) as store:
        for time in TIMES[:6]:
            read.clear()
            store.add(time, averages(time, codec))
            assert len(list(folder.glob(".latest-*"))) == 2  # of this time, none of earlier ones
        assert len(read) == 4  # one base of the shorter average, three of the longer one
        assert all(name.startswith(".latest-") for name in read)
    assert not list(folder.glob(".latest-*"))
    assert not list(SnapshotStore.open(folder).verify())


@pytest.mark.parametrize("damage", ["gone", "flipped", "stale"])
def test_what_was_kept_is_used_only_if_it_is_right(tmp_path, codec, damage):
    folder = tmp_path / "s"
    with SnapshotStore.create(folder, clock="steps", table=TABLE) as store:
        for time in TIMES[:3]:
            store.add(time, averages(time, codec))
        kept = sorted(folder.glob(".latest-*"))
        if damage == "gone":
            kept[0].unlink()
        elif damage == "stale":
            kept[0].write_bytes(kept[1].read_bytes())
        else:
            data = bytearray(kept[0].read_bytes())
            data[-1] ^= 1
            kept[0].write_bytes(data)
        expected = pytest.warns(PhemaWarning) if damage == "flipped" else contextlib.nullcontext()
        with expected:
            store.add(400, averages(400, codec))
    store = SnapshotStore.open(folder)
    assert not list(store.verify())
    assert max(errors(store).values()) < LIMITS[codec]


def test_a_tensor_that_is_called_like_the_scales_of_another_is_refused(tmp_path):
    table = make_table(entry("w", (3,)), entry("w:scales", (1,)))
    with pytest.raises(ConfigError, match=r"w:scales.* rename that tensor"):
        SnapshotStore.create(tmp_path / "s", clock="steps", table=table)
    assert not (tmp_path / "s").exists()


def test_shorter_average_of_a_time_that_is_there_stands_on_earlier_times(tmp_path, codec):
    folder = tmp_path / "s"
    with SnapshotStore.create(folder, clock="steps", table=TABLE) as store:
        store.add(100, averages(100, codec))
        for one in averages(200, codec)[::-1]:  # the longer one first, in calls of their own
            store.add(200, [one])
        store.add(300, averages(300, codec))
    store = SnapshotStore.open(folder)
    assert not list(store.verify())
    assert max(errors(store).values()) < 5 * LIMITS[codec]


@pytest.mark.parametrize("size", [1e22, 3e38])
def test_weights_of_a_diverging_run_are_stored(tmp_path, codec, size):
    table = make_table(entry("w", (100,)))
    sign = np.where(np.arange(100) % 2, 1, -1).astype(np.float32)
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        for time, factor in ((1, size), (2, -size), (3, 1.0)):
            values = (sign * np.float32(factor)).astype(np.float32)
            store.add(time, [NewAverage(PowerProfile(time, 0.1), codec, lambda _, v=values: v)])
    store = SnapshotStore.open(tmp_path / "s")
    assert not list(store.verify())
    np.testing.assert_allclose(stored(store, store.records[1], "w"), -sign * size, rtol=1e-2)
