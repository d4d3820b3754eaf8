from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time as time_of_day
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import (
    NewAverage,
    PointProfile,
    PowerProfile,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SnapshotStore,
    TensorEntry,
    TensorTable,
    synthesize,
)
from posthoc_ema.chains import file_coefficients
from posthoc_ema.classical_profiles import TabulatedProfile
from posthoc_ema.codecs import FLOATING, STORE_DTYPES, decode, encode
from posthoc_ema.snapshot import file_name, profile_to_json
from posthoc_ema.tensor_files import TensorFile, read_header, write_tensors

from .strategies import few, float32_arrays, names, quick, shapes, sigma_rels, tensor_dicts


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@few
@given(tensor_dicts, st.dictionaries(names, names, max_size=3))
def test_written_tensors_are_read_back_bit_by_bit(tensors, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors, metadata)
        header = read_header(path)
        assert header.metadata == {"format": "pt", **metadata}
        assert set(header.tensors) == set(tensors)
        with TensorFile(path) as file:
            for name, array in tensors.items():
                read = file.read(name)
                assert (read.dtype, read.shape) == (array.dtype, array.shape)
                assert bits(read) == bits(array)


@few
@given(tensor_dicts.filter(bool))
def test_written_bytes_do_not_depend_on_memory_layout_or_repetition(tensors):
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        write_tensors(a, tensors)
        write_tensors(b, {name: np.array(array, order="C") for name, array in tensors.items()})
        assert a.read_bytes() == b.read_bytes()


@few
@given(tensor_dicts, st.data())
def test_changed_file_is_refused_or_read_without_a_crash(tensors, data):
    """Whatever is done to the bytes, the answer is an array or a SnapshotFormatError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))] or content
        path.write_bytes(bytes(content))
        with contextlib.suppress(SnapshotFormatError), TensorFile(path) as file:
            for name in file.header.tensors:
                file.read(name)


@quick
@given(float32_arrays, st.sampled_from(STORE_DTYPES))
def test_stored_values_are_stable(values, dtype):
    """What was rounded once is not rounded again."""
    with np.errstate(over="ignore", invalid="ignore"):
        once = decode(encode(values, dtype), dtype)
        twice = decode(encode(once, dtype), dtype)
    np.testing.assert_array_equal(once, twice)


@quick
@given(float32_arrays)
def test_bfloat16_is_a_nearest_neighbour(values):
    back = decode(encode(values, "bfloat16"), "bfloat16").astype(np.float64)
    exact = values.astype(np.float64)
    number = np.isfinite(exact) & np.isfinite(back)
    error = np.abs(back[number] - exact[number])
    assert (error <= np.maximum(np.abs(exact[number]) * 2.0**-8, 2.0**-134)).all()


@few
@given(
    st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(FLOATING))), min_size=1),
    st.sampled_from(STORE_DTYPES),
    sigma_rels,
    st.integers(1, 2**62),
)
def test_stored_average_is_synthesized_as_it_was_stored(layout, dtype, sigma_rel, time):
    """Write, open, synthesize the stored length: exactly the stored values, for any names and shapes."""
    rng = np.random.default_rng(len(layout))
    table = TensorTable({n: TensorEntry(n, s, d, True) for n, (s, d) in layout.items()}, {})
    values = {n: rng.normal(size=s).astype(np.float32) for n, (s, _) in layout.items()}
    profiles = [PowerProfile(time, sigma_rel), PointProfile(time)]
    with tempfile.TemporaryDirectory() as folder:
        with SnapshotStore.create(folder, clock="images", table=table) as store:
            store.add(time, [NewAverage(p, dtype, values.__getitem__) for p in profiles])
        store = SnapshotStore.open(folder)
        assert [r.profile for r in store.records] == [PointProfile(time), profiles[0]]
        assert list(store.verify()) == []
        for length in (sigma_rel, 0):
            for name, array in synthesize(store, length).items():
                expected = decode(encode(values[name], dtype), dtype)
                np.testing.assert_array_equal(array, expected)
                assert array.shape == layout[name][0]


@pytest.fixture
def one_store(tmp_path):
    """A store of two differences and their bases, open for reading."""
    table = TensorTable({"w": TensorEntry("w", (70,), "float32", True)}, {})
    rng = np.random.default_rng(0)
    with SnapshotStore.create(tmp_path / "store", clock="steps", table=table) as store:
        for time in (10, 20):
            values = {"w": rng.normal(size=70).astype(np.float32)}
            profiles = [PowerProfile(time, s) for s in (0.05, 0.1)]
            store.add(time, [NewAverage(p, "delta", values.__getitem__) for p in profiles])
    return SnapshotStore.open(tmp_path / "store")


def edited(store, change):
    """The store opened again after an edit of its manifest."""
    path = store.folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return SnapshotStore.open(store.folder)


def nudge_coefficient(manifest):
    manifest["snapshots"][-1]["bases"][0][1] += 1e-3


def exchange_bases(manifest):
    bases = manifest["snapshots"][-1]["bases"]
    (bases[0][0], bases[1][0]) = (bases[1][0], bases[0][0])


def other_dtype(manifest):
    manifest["snapshots"][-1]["dtype"] = "delta-float16"


@pytest.mark.parametrize("change", [nudge_coefficient, exchange_bases, other_dtype])
def test_manifest_that_contradicts_a_file_is_damage(one_store, change):
    """The file's own description is under the checksums; the manifest's digits are not."""
    expected = synthesize(one_store, 0.05)["w"]
    store = edited(one_store, change)
    with pytest.raises(SnapshotFormatError, match="the manifest is damaged"):
        synthesize(store, 0.05)
    assert [p.file for p in store.verify()] == [store.records[-1].file]
    again = SnapshotStore.rebuild(store.folder)
    np.testing.assert_array_equal(synthesize(again, 0.05)["w"], expected)


def test_order_of_the_rows_does_not_matter(one_store):
    """A manifest that was edited by hand is read in the order of the store, and stays readable."""
    store = edited(one_store, lambda manifest: manifest["snapshots"].reverse())
    assert store.records == one_store.records
    with SnapshotStore.edit(store.folder) as writer:
        writer.drop([writer.records[-1]])
    assert SnapshotStore.open(store.folder).records == one_store.records[:-1]


def test_links_are_followed_for_reading_and_never_written_through(one_store, tmp_path):
    """A store may be made of links, as a download cache does; what they lead to is never changed."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in one_store.folder.glob("*.safetensors"):
        path.rename(cache / path.name)
        path.symlink_to(cache / path.name)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert list(one_store.verify()) == []
    assert synthesize(one_store, 0.05)["w"].shape == (70,)
    with SnapshotStore.edit(one_store.folder) as store:
        store.remove(store.records[:2])
        store.drop(store.records[:1])
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_pipes_folders_and_devices_are_no_files(one_store):
    """Opening a pipe would wait for ever, reading a device would never end."""
    first, second, third = (one_store.path(record) for record in one_store.records[:3])
    for path in (first, second, third):
        path.unlink()
    os.mkfifo(first)
    second.mkdir()
    third.symlink_to("/dev/zero")
    for path in (first, second, third):
        with pytest.raises(SnapshotFormatError, match="not a regular file"):
            read_header(path)
    assert [p.file for p in one_store.verify()] == [first.name, second.name, third.name]
    manifest = one_store.folder / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    with pytest.raises(SnapshotFormatError, match="not a regular file"):
        SnapshotStore.open(one_store.folder)
    with pytest.raises(SnapshotNotFoundError):
        SnapshotStore.open("no\0folder")


def test_lock_that_is_a_link_is_refused(one_store, tmp_path):
    """Taking it would empty the file that it leads to."""
    precious = tmp_path / "precious"
    precious.write_text("data")
    lock = one_store.folder / ".lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious)
    with pytest.raises(SnapshotFormatError, match="symbolic link"):
        SnapshotStore.edit(one_store.folder)
    assert list(one_store.verify()) == []
    assert precious.read_text() == "data"


def test_large_tables_and_long_chains_are_read(one_store):
    """Large is not hostile: it works, in time that grows with the size of the file."""
    points = 200_000

    def many(manifest):
        rows = manifest["snapshots"]
        last = rows[-1]
        profile = TabulatedProfile(tuple(range(points)), tuple(np.linspace(1, 0, points).tolist()))
        name = file_name(points - 1, profile)
        new = {**rows[0], "file": name, "time": points - 1, "profile": profile_to_json(profile)}
        chain = []
        for time in range(30, 10_030):
            here = file_name(time, PowerProfile(time, 0.1))
            base = chain[-1]["file"] if chain else last["file"]
            chain.append({**last, "file": here, "time": time, "bases": [[base, 1.0]]})
        rows += [*chain, new]

    began = time_of_day.perf_counter()
    store = edited(one_store, many)
    assert len(store.records) == 4 + 10_000 + 1
    files, x = file_coefficients(store.records, [store.records[-2]], np.ones((1, 1)))
    assert len(files) > 10_000
    assert np.isfinite(x).all()
    with pytest.raises(SnapshotFormatError, match="missing"):
        store.header(store.records[-1])
    assert (
        time_of_day.perf_counter() - began < 30
    )  # measured: 2 s; with a million points and 100 000 averages 6 s


def test_coefficients_beyond_all_numbers_are_our_error(one_store):
    def grow(manifest):
        rows = manifest["snapshots"]
        for time in range(30, 100):
            here = file_name(time, PowerProfile(time, 0.1))
            base = rows[-1]["file"]
            rows.append({**rows[-1], "file": here, "time": time, "bases": [[base, 1e6]]})

    store = edited(one_store, grow)
    with pytest.raises(SnapshotFormatError, match="no number"):
        file_coefficients(store.records, [store.records[-1]], np.ones((1, 1)))
