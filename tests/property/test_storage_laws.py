from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import (
    NewAverage,
    PointProfile,
    PowerProfile,
    SnapshotFormatError,
    SnapshotStore,
    TensorEntry,
    TensorTable,
    synthesize,
)
from posthoc_ema.codecs import FLOATING, STORE_DTYPES, decode, encode
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
