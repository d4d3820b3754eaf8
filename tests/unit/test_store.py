from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy

import posthoc_ema.store as store_module
from posthoc_ema import (
    ConfigError,
    NewAverage,
    PointProfile,
    PowerProfile,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
    SnapshotStore,
    SnapshotWriteError,
    synthesize,
)
from posthoc_ema.store import table_difference

from .stores import TABLE, averages_of, entry, make_store, make_table, values_of


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path):
    make_store(tmp_path / "snapshots")
    return tmp_path / "snapshots"


def resume(folder, **changes):
    arguments = {"run_id": "run-1", "clock": "images", "table": TABLE, "time": 30} | changes
    return SnapshotStore.resume(folder, **arguments)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- what is in a store


def test_store_says_what_it_holds(folder):
    store = SnapshotStore.open(folder)
    assert (store.run_id, store.clock, store.metadata) == ("run-1", "images", {})
    assert store.times == [10, 20, 30]
    assert store.sigma_rels == [0.05, 0.1]
    assert store.table == TABLE
    assert [r.time for r in store.records] == [10, 10, 20, 20, 30, 30, 30]
    assert list(store.verify()) == []


def test_sigma_rel_and_time_are_stored_exactly(tmp_path):
    """EDM2's file names keep three decimals and thousands of images: 0.0504 and 0.0496 become one."""
    time, lengths = 2**53 + 1, [0.0504, 0.0496, 0.1 + 1e-16, np.float64(0.05), 0.1 + 2e-17]
    lengths = list(dict.fromkeys(map(float, lengths)))
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=TABLE) as store:
        store.add(np.int64(time), averages_of(time, sigma_rels=[np.float64(s) for s in lengths]))
    store = SnapshotStore.open(tmp_path / "s")
    assert store.times == [time]
    assert store.sigma_rels == sorted(lengths)


def test_raw_weights_of_the_last_time_only_are_kept(folder):
    assert [r.time for r in SnapshotStore.open(folder).records if r.sigma_rel is None] == [30]
    assert [name for name in files(folder) if "raw" in name] == ["000000000030-raw.safetensors"]


def test_raw_weights_of_all_times_can_be_kept(tmp_path):
    with SnapshotStore.create(tmp_path, clock="steps", table=TABLE) as store:
        for time in (1, 2):
            store.add(time, averages_of(time), replace_raw=False)
    assert len([name for name in files(tmp_path) if "raw" in name]) == 2


def test_snapshot_files_are_plain_safetensors_with_their_own_description(folder):
    path = folder / "000000000020-sigma_rel-0.05.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(TABLE.entries)
        stored = file.get_tensor("conv.weight")
        np.testing.assert_array_equal(stored, values_of("conv.weight", 20, 0.05))
        own = json.loads(file.metadata()["posthoc_ema"])
    assert (own["schema"], own["run_id"], own["time"], own["clock"]) == (2, "run-1", 20, "images")
    assert own["profile"] == {"kind": "power", "sigma_rel": 0.05}
    assert own["copied"] == ["steps", "mask", "frozen"]
    assert own["aliases"] == {"head.weight": "conv.weight"}


def test_integers_and_buffers_are_stored_as_they_are(tmp_path):
    """ema-pytorch casts all to float16: a step of 70001 becomes inf, and 4099 becomes 4100."""
    table = make_table(
        entry("w", (1,)), entry("n", (2,), "int64", False), entry("v", (), "float64", False)
    )
    exact = {"w": np.float32([1]), "n": np.int64([70001, 4099]), "v": np.float64(1e-300)}
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        store.add(5, [NewAverage(PowerProfile(5, 0.1), "float16", exact.__getitem__)])
    result = synthesize(tmp_path, 0.1)
    assert result["n"].dtype == np.int64
    assert result["n"].tolist() == [70001, 4099]
    assert result["v"] == 1e-300


def test_overflow_of_float16_is_kept_in_float32_and_said(tmp_path):
    table = make_table(entry("big", (2,)), entry("nan", (2,)), entry("w", (2,)))
    values = {"big": [1e5, 1], "nan": [np.nan, 70000], "w": [65504, 1 / 3]}
    values = {name: np.float32(value) for name, value in values.items()}
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        store.add(1, [NewAverage(PowerProfile(1, 0.1), "float16", values.__getitem__)])
        path = store.path(store.records[0])
    with safetensors.safe_open(path, framework="np") as file:
        own = json.loads(file.metadata()["posthoc_ema"])
        assert (own["dtype"], own["widened"]) == ("float16", ["big", "nan"])
        assert file.get_slice("big").get_dtype() == "F32"
        assert file.get_slice("w").get_dtype() == "F16"
    result = synthesize(tmp_path, 0.1)
    assert result["big"].tolist() == [1e5, 1]
    np.testing.assert_array_equal(result["nan"], values["nan"])
    assert result["w"].tolist() == [65504, float(np.float16(1 / 3))]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinity_are_stored_and_read_back(tmp_path, dtype):
    table, wild = make_table(entry("w", (4,))), np.float32([np.nan, np.inf, -np.inf, 1])
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        store.add(1, [NewAverage(PowerProfile(1, 0.1), dtype, lambda _: wild)])
    np.testing.assert_array_equal(synthesize(tmp_path, 0.1)["w"], wild)
    assert list(SnapshotStore.open(tmp_path).verify()) == []


def test_user_metadata_is_carried_into_every_file(tmp_path):
    make_store(tmp_path / "s", metadata={"config": "{}", "größe": "7"})
    store = SnapshotStore.open(tmp_path / "s")
    assert store.metadata == {"config": "{}", "größe": "7"}
    for record in store.records:
        with safetensors.safe_open(store.path(record), framework="np") as file:
            assert file.metadata()["größe"] == "7"


# ---- create, open, resume


def test_second_run_in_one_folder_is_refused(folder):
    """ema-pytorch takes over any folder: two runs then mix in one sum without a word."""
    with pytest.raises(SnapshotMismatchError, match=r"run run-1 up to time 30.*resume=True"):
        SnapshotStore.create(folder, clock="images", table=TABLE)
    with pytest.raises(
        SnapshotMismatchError, match="holds run run-1, the checkpoint belongs to run x"
    ):
        resume(folder, run_id="x")
    assert len(SnapshotStore.open(folder).records) == 7


def test_resume_refuses_another_clock_or_model(folder):
    with pytest.raises(SnapshotMismatchError, match="counts time in images"):
        resume(folder, clock="steps")
    changed = make_table(entry("conv.weight", (4, 3, 3)), *list(TABLE.entries.values())[1:])
    with pytest.raises(SnapshotMismatchError, match=r"'conv.weight' is float32 \(4, 3, 2\)"):
        resume(folder, table=changed)
    with pytest.raises(SnapshotMismatchError, match="'gain' is only in the store"):
        resume(folder, table=make_table(*[e for n, e in TABLE.entries.items() if n != "gain"]))


def test_resume_removes_snapshots_of_the_lost_future(folder):
    with resume(folder, time=15) as store:
        assert store.times == [10]
    assert SnapshotStore.open(folder).times == [10]
    assert files(folder) == [f"000000000010-sigma_rel-{s}.safetensors" for s in (0.05, 0.1)]


def test_resume_cleans_up_what_a_killed_writer_left(folder):
    (folder / ".tmp-manifest.json-0123abcd").write_text("{")
    (folder / "000000000040-sigma_rel-0.05.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (folder / ".tmp-mine").mkdir()
    resume(folder).close()
    names = {path.name for path in folder.iterdir()}
    assert ".tmp-manifest.json-0123abcd" not in names
    assert "000000000040-sigma_rel-0.05.safetensors" not in names
    assert {"notes.txt", ".tmp-mine", "manifest.json"} <= names
    assert len(SnapshotStore.open(folder).records) == 7


def test_reader_ignores_what_a_killed_writer_left(folder):
    (folder / "000000000040-sigma_rel-0.05.safetensors").write_bytes(b"half")
    store = SnapshotStore.open(folder)
    assert store.times == [10, 20, 30]
    problems = list(store.verify())
    assert [p.file for p in problems] == ["000000000040-sigma_rel-0.05.safetensors"]
    assert "not listed" in problems[0].what


def test_deleted_manifest_is_not_started_over(folder):
    (folder / "manifest.json").unlink()
    for call in (SnapshotStore.open, lambda f: resume(f)):
        with pytest.raises(SnapshotNotFoundError, match=r"has no manifest\.json"):
            call(folder)
    with pytest.raises(SnapshotFormatError, match="holds 7 snapshot files but no manifest"):
        SnapshotStore.create(folder, clock="images", table=TABLE)
    assert len(files(folder)) == 7


def test_open_names_what_is_missing(tmp_path, folder):
    with pytest.raises(SnapshotNotFoundError, match="does not exist"):
        SnapshotStore.open(tmp_path / "nowhere")
    with pytest.raises(SnapshotNotFoundError, match=r"Did you mean .*snapshots"):
        SnapshotStore.open(tmp_path)
    with pytest.raises(SnapshotNotFoundError, match=r"no manifest\.json"):
        SnapshotStore.open(folder / "manifest.json")
    assert not (tmp_path / "nowhere").exists()


def test_resume_of_no_store_leaves_the_folder_alone(tmp_path):
    with pytest.raises(SnapshotNotFoundError):
        resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_store_open_for_reading_refuses_to_change(folder):
    store = SnapshotStore.open(folder)
    for call in (lambda: store.add(40, averages_of(40)), lambda: store.remove(store.records)):
        with pytest.raises(SnapshotError, match="open for reading only"):
            call()
    closed = resume(folder)
    closed.close()
    with pytest.raises(SnapshotError, match="reading only"):
        closed.add(40, averages_of(40))


def test_one_writer_at_a_time_in_one_process(folder):
    with resume(folder):
        with pytest.raises(SnapshotError, match="being written by another process"):
            resume(folder)
        assert SnapshotStore.open(folder).times == [10, 20, 30]
    resume(folder).close()


HOLDER = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(1, flush=True)
input()
"""


def test_one_writer_at_a_time_among_processes(folder):
    command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline()
        with pytest.raises(SnapshotError, match=r"another process\. Stop that run"):
            resume(folder)
        process.kill()
        process.wait()
        resume(folder).close()  # the lock of a killed writer is gone with it


def test_failing_create_gives_the_folder_free(folder):
    with pytest.raises(SnapshotMismatchError):
        SnapshotStore.create(folder, clock="images", table=TABLE)
    resume(folder).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "kimg"}, "clock must be one of steps, images, got 'kimg'"),
        ({"metadata": {"a": 1}}, "strings to strings"),
        ({"metadata": {"format": "np"}}, "may not use the keys"),
        ({"metadata": {"posthoc_ema": ""}}, "may not use the keys"),
    ],
    ids=["clock", "number", "format", "own key"],
)
def test_bad_options_of_create_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        SnapshotStore.create(tmp_path / "s", **({"clock": "steps", "table": TABLE} | options))
    assert not (tmp_path / "s").exists()


@pytest.fixture
def read_only(tmp_path):
    """A folder without write permission; root may write anywhere, so it steps down for the test."""
    tmp_path.chmod(0o500)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield tmp_path
    if root:
        os.seteuid(0)
    tmp_path.chmod(0o700)


def test_folder_without_permission_is_a_write_error(read_only):
    with pytest.raises(SnapshotWriteError, match="Choose a folder that you may write"):
        SnapshotStore.create(read_only / "s", clock="steps", table=TABLE)


def test_folder_that_is_a_file_is_a_write_error(tmp_path):
    (tmp_path / "s").write_text("")
    with pytest.raises(SnapshotWriteError, match="cannot be used for snapshots"):
        SnapshotStore.create(tmp_path / "s", clock="steps", table=TABLE)


# ---- adding and removing


def test_average_that_is_there_stays_as_it_is(folder):
    content = {name: (folder / name).read_bytes() for name in files(folder)}
    with resume(folder) as store:
        assert store.add(30, averages_of(30, dtype="float16")) == []
        assert len(store.records) == 7
    assert content == {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.mark.parametrize("time", [0, -1, 2**63, 1.5, "7", None])
def test_bad_time_of_a_snapshot_is_refused(folder, time):
    with resume(folder) as store, pytest.raises(ConfigError, match="time must be"):
        store.add(time, [])


def test_average_of_another_time_or_shape_is_refused(folder):
    with resume(folder) as store:
        with pytest.raises(SnapshotMismatchError, match="does not end at time 40"):
            store.add(40, averages_of(50))
        wrong = NewAverage(
            PowerProfile(40, 0.1), "float32", lambda _: np.zeros(1, dtype=np.float32)
        )
        with pytest.raises(SnapshotMismatchError, match=r"'conv.weight' has shape \(1,\)"):
            store.add(40, [wrong])
        with pytest.raises(ConfigError, match="dtype must be"):
            store.add(40, averages_of(40, dtype="int8"))
    assert len(files(folder)) == 7


def failing_at(number):
    """Reading fails at the n-th tensor, in whatever file that is."""
    count = 0

    def wrap(average):
        def read(name):
            nonlocal count
            count += 1
            if count == number:
                raise OSError(28, "No space left on device")
            return average.read(name)

        return NewAverage(average.profile, average.dtype, read)

    return [wrap(average) for average in averages_of(40)]


@pytest.mark.parametrize("number", [1, 5, 9, 15, 21])
def test_failed_snapshot_leaves_the_store_as_it_was(folder, number):
    before = sorted(path.name for path in folder.iterdir())
    with resume(folder) as store:
        with pytest.raises(SnapshotWriteError, match="No space left"):
            store.add(40, failing_at(number))
        assert store.times == [10, 20, 30]
        assert sorted(path.name for path in folder.iterdir()) == before
        store.add(40, averages_of(40))
    assert SnapshotStore.open(folder).times == [10, 20, 30, 40]
    assert list(SnapshotStore.open(folder).verify()) == []


def test_failed_manifest_leaves_the_store_as_it_was(folder, monkeypatch):
    def fail(*_):
        raise SnapshotWriteError("full")

    before = sorted(path.name for path in folder.iterdir())
    with resume(folder) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "write_json", fail)
            with pytest.raises(SnapshotWriteError):
                store.add(40, averages_of(40))
        assert store.times == [10, 20, 30]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert list(SnapshotStore.open(folder).verify()) == []


def test_remove_takes_files_and_rows(folder):
    with resume(folder) as store:
        store.remove([r for r in store.records if r.time == 20])
        store.remove([])
    store = SnapshotStore.open(folder)
    assert store.times == [10, 30]
    assert not any(name.startswith("000000000020") for name in files(folder))
    assert list(store.verify()) == []


# ---- damage


@pytest.mark.parametrize("offset", [-20, -30, 200, 9, 0])
def test_bit_flip_is_found_by_verify_and_by_synthesis(folder, offset):
    path = folder / "000000000020-sigma_rel-0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)
    problems = list(SnapshotStore.open(folder).verify())
    assert [p.file for p in problems] == [path.name]
    with pytest.raises(SnapshotError, match="000000000020-sigma_rel-0"):
        synthesize(folder, 0.07)
    synthesize(folder, 0.07, at=10)  # what does not need the file still works


def test_every_data_byte_is_covered_by_a_checksum(folder):
    path = folder / "000000000010-sigma_rel-0.1.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(start, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        (problem,) = SnapshotStore.open(folder).verify()
        assert "damaged (checksum)" in problem.what


def damage_missing(folder):
    (folder / "000000000020-sigma_rel-0.1.safetensors").unlink()


def damage_truncated(folder):
    path = folder / "000000000020-sigma_rel-0.1.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def damage_swapped(folder):
    a, b = (folder / f"0000000000{t}-sigma_rel-0.1.safetensors" for t in (10, 20))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def damage_foreign(folder):
    tensors = {"conv.weight": np.zeros((4, 3, 2), dtype=np.float32)}
    safetensors.numpy.save_file(tensors, folder / "000000000020-sigma_rel-0.1.safetensors")


def damage_other_run(folder):
    other = folder.parent / "other"
    with SnapshotStore.create(other, clock="images", table=TABLE, run_id="run-2") as store:
        store.add(20, averages_of(20))
    name = "000000000020-sigma_rel-0.1.safetensors"
    (folder / name).write_bytes((other / name).read_bytes())


def damage_other_model(folder):
    other = folder.parent / "other"
    table = make_table(entry("conv.weight", (4, 3, 9)), *list(TABLE.entries.values())[1:])
    with SnapshotStore.create(other, clock="images", table=table, run_id="run-1") as store:
        store.add(20, averages_of(20, table=table))
    name = "000000000020-sigma_rel-0.1.safetensors"
    (folder / name).write_bytes((other / name).read_bytes())


DAMAGES = {
    "missing": (damage_missing, SnapshotFormatError, "missing"),
    "truncated": (damage_truncated, SnapshotFormatError, "cut short"),
    "swapped": (damage_swapped, SnapshotFormatError, "differs from the file that was stored"),
    "foreign": (damage_foreign, SnapshotFormatError, "not a snapshot of this tool"),
    "other run": (damage_other_run, SnapshotMismatchError, "belongs to run run-2"),
    "other model": (damage_other_model, SnapshotMismatchError, r"shape \(4, 3, 9\)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_store_is_refused_by_name(folder, name):
    damage, error, message = DAMAGES[name]
    damage(folder)
    assert list(SnapshotStore.open(folder).verify())
    with pytest.raises(error, match=message) as caught:
        synthesize(folder, 0.07)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verify_goes_on_after_a_problem(folder):
    damage_missing(folder)
    (folder / "000000000010-sigma_rel-0.05.safetensors").write_bytes(b"junk")
    assert len(list(SnapshotStore.open(folder).verify())) == 2


MANIFESTS = {
    "newer schema": (
        lambda m: m.update(schema=3),
        r"has schema 3, this version reads up to 2.*Upgrade",
    ),
    "schema text": (lambda m: m.update(schema="1"), "not a number"),
    "schema bool": (lambda m: m.update(schema=True), "not a number"),
    "other format": (lambda m: m.update(format="x"), "does not say"),
    "no run": (lambda m: m.pop("run_id"), "no run id"),
    "clock": (lambda m: m.update(clock="kimg"), "'kimg'"),
    "metadata": (lambda m: m.update(metadata={"a": 1}), "map of strings"),
    "no list": (lambda m: m.update(snapshots={}), "lists no snapshots"),
    "row": (lambda m: m["snapshots"].append(3), "row is not a table"),
    "parent folder": (
        lambda m: m["snapshots"][0].update(file="../x.safetensors"),
        r"'\.\./x.*no folders",
    ),
    "absolute": (lambda m: m["snapshots"][0].update(file="/etc/passwd"), "no folders"),
    "subfolder": (lambda m: m["snapshots"][0].update(file="a/b"), "no folders"),
    "hidden": (
        lambda m: m["snapshots"][0].update(file="../000000000010-raw.safetensors"),
        "no folders",
    ),
    "other name": (
        lambda m: m["snapshots"][0].update(file="000000000011-sigma_rel-0.05.safetensors"),
        "do not agree",
    ),
    "twice": (lambda m: m["snapshots"].append(m["snapshots"][0]), "twice"),
    "time zero": (lambda m: m["snapshots"][0].update(time=0), "not a positive integer"),
    "time float": (lambda m: m["snapshots"][0].update(time=10.0), "not a positive integer"),
    "time huge": (lambda m: m["snapshots"][0].update(time=2**64), "not a positive integer"),
    "sigma_rel": (lambda m: m["snapshots"][0]["profile"].update(sigma_rel=0.3), "0.2887"),
    "sigma_rel nan": (
        lambda m: m["snapshots"][0]["profile"].update(sigma_rel=float("nan")),
        "(?i)nan",
    ),
    "sigma_rel big": (lambda m: m["snapshots"][0]["profile"].update(sigma_rel=10**400), "large"),
    "profile": (lambda m: m["snapshots"][0].update(profile={"kind": "box"}), "kind"),
    "dtype": (lambda m: m["snapshots"][0].update(dtype="int8"), "'int8'"),
    "size": (lambda m: m["snapshots"][0].update(bytes=-1), "size or checksum"),
    "no tensors": (lambda m: m.pop("tensors"), "'tensors' is not a table"),
    "tensor row": (lambda m: m["tensors"]["gain"].update(shape=[-1]), "'gain' is malformed"),
    "integer average": (
        lambda m: m["tensors"]["steps"].update(kind="average"),
        "cannot be an average",
    ),
    "alias": (lambda m: m.update(aliases={"a": "nobody"}), "aliases"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_bad_manifest_is_refused(folder, name):
    change, message = MANIFESTS[name]
    edit_manifest(folder, change)
    for call in (SnapshotStore.open, resume):
        with pytest.raises(SnapshotFormatError, match=message) as caught:
            call(folder)
        assert "manifest.json" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(files(folder)) == 7


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', "\x00" * 9, "[" * 200_000, '{"schema":1,"schema":1}'],
    ids=["empty", "brace", "list", "null", "format", "zeros", "deep", "twice"],
)
def test_broken_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(SnapshotFormatError, match="snapshots beside it are untouched"):
        SnapshotStore.open(folder)


def test_unreadable_bytes_in_the_manifest_are_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SnapshotFormatError, match=r"manifest\.json: cannot be used"):
        SnapshotStore.open(folder)


def test_manifest_is_always_whole_while_it_is_written(folder, monkeypatch):
    """At each system call of an add, a reader sees all of the old or all of the new snapshots."""
    seen, fsync = set(), os.fsync

    def look(descriptor):
        seen.add(tuple(SnapshotStore.open(folder).times))
        fsync(descriptor)

    with resume(folder) as store:
        monkeypatch.setattr(os, "fsync", look)
        store.add(40, averages_of(40))
    assert seen == {(10, 20, 30), (10, 20, 30, 40)}


def test_table_difference_is_told_in_words():
    assert table_difference(TABLE, TABLE) == ""
    frozen = make_table(entry("a", (1,), averaged=False))
    assert "(averaged)" in table_difference(make_table(entry("a", (1,))), frozen)
    tied = make_table(entry("a", (1,)), aliases={"b": "a"})
    assert "tied names differ" in table_difference(make_table(entry("a", (1,))), tied)


def test_find_knows_profiles_exactly(folder):
    store = SnapshotStore.open(folder)
    assert store.find(10, PowerProfile(10, 0.1)).sigma_rel == 0.1
    assert store.find(10, PowerProfile(10, 0.1 + 1e-15)) is None
    assert store.find(10, PointProfile(10)) is None
    assert store.find(30, PointProfile(30)).sigma_rel is None


def test_verify_is_quiet_about_a_run_that_goes_on(folder):
    """A reader's view grows old while the run replaces raw weights and adds snapshots."""
    reader = SnapshotStore.open(folder)
    with resume(folder) as writer:
        writer.add(40, averages_of(40))
        assert list(reader.verify()) == []
        (folder / "000000000050-sigma_rel-0.05.safetensors").write_bytes(b"in the making")
        assert list(SnapshotStore.open(folder).verify()) == []
    (problem,) = SnapshotStore.open(folder).verify()
    assert problem.what.startswith("not listed in the manifest")


def test_a_store_is_written_from_any_thread(folder):
    """Trainers step in worker threads; the lock belongs to the store, not to a thread."""
    with ThreadPoolExecutor(1) as pool, resume(folder) as store:
        assert len(pool.submit(store.add, 40, averages_of(40)).result()) == len(averages_of(40))
        pool.submit(store.close).result()
        resume(folder).close()


def test_reader_that_is_overtaken_by_a_writer_is_told_to_open_again(folder):
    reader = SnapshotStore.open(folder)
    first, *_, last = reader.records
    with SnapshotStore.edit(folder) as store:
        store.remove([first])
    with pytest.raises(SnapshotFormatError, match=r"since it was opened\. Run the command again"):
        reader.header(first)
    reader.header(last)
