from __future__ import annotations

import importlib
import json
import os
import warnings

import numpy as np
import pytest
import safetensors

from posthoc_ema import (
    ConfigError,
    InvalidProfileError,
    NewAverage,
    PhemaWarning,
    PointProfile,
    PowerProfile,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SnapshotStore,
    SnapshotWriteError,
    SynthesisError,
    fit,
    plan_synthesis,
    synthesize,
    synthesize_to_files,
)
from posthoc_ema.tensor_files import TensorFile

from .stores import TABLE, entry, make_store, make_table, naive

# The name `combine` of the package is the function.
combine_module = importlib.import_module("posthoc_ema.synthesis.combine")

TARGETS = [0.03, 0.05, 0.07, 0.2]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "snapshots")


def assert_same(a, b):
    assert list(a) == list(b)
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])
        assert values.dtype == b[name].dtype


def read_output(path):
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.header.tensors}


# ---- plans


def test_plan_is_the_fit_of_the_stored_profiles(store):
    plan = plan_synthesis(store, TARGETS)
    expected = fit([r.profile for r in plan.inputs], [PowerProfile(30, s) for s in TARGETS])
    np.testing.assert_allclose(plan.coefficients, expected.coefficients, atol=1e-11)
    np.testing.assert_allclose(plan.profile_error, expected.relative_residual, atol=1e-11)
    assert (plan.time, plan.sigma_rels, len(plan.inputs)) == (30, tuple(TARGETS), 6)
    assert plan.bytes_read == sum(r.file_bytes for r in plan.inputs)


def test_plan_ends_at_any_stored_time_and_ignores_what_is_later(store):
    plan = plan_synthesis(store, TARGETS, at=20)
    assert {record.time for record in plan.inputs} == {10, 20}


def test_raw_weights_are_read_alone_when_they_are_asked_alone(store):
    plan = plan_synthesis(store, [0])
    assert [r.profile for r in plan.inputs] == [PointProfile(30)]
    assert plan.coefficients.tolist() == [[1.0]]


def test_options_reach_the_fit(store):
    plain, noisy = plan_synthesis(store, [0.01]), plan_synthesis(store, [0.01], noise=1.0)
    published = plan_synthesis(store, [0.01], norm="published")
    assert noisy.amplification[0] < plain.amplification[0]
    assert published.norm == "published"
    assert not np.allclose(published.coefficients, plain.coefficients)


@pytest.mark.parametrize("at", [15, 0, -10, 31])
def test_time_that_is_not_stored_is_refused_with_the_nearest(store, at):
    with pytest.raises(
        SnapshotNotFoundError, match=f"got {at}.*3 times from 10 to 30 images.*near"
    ):
        plan_synthesis(store, [0.1], at=at)


@pytest.mark.parametrize("bad", [0.3, float("nan"), -0.1, float("inf")])
def test_bad_target_is_refused(store, bad):
    for call in (plan_synthesis, synthesize):
        with pytest.raises(InvalidProfileError, match="sigma_rel must lie"):
            call(store, [0.1, bad])


def test_raw_weights_of_another_time_are_refused(store):
    with pytest.raises(SnapshotNotFoundError, match="raw weights only at 30, not at 20"):
        synthesize(store, 0, at=20)


def test_empty_store_and_empty_request_are_refused(store, tmp_path):
    SnapshotStore.create(tmp_path / "new", clock="steps", table=TABLE).close()
    with pytest.raises(SnapshotNotFoundError, match="no snapshots yet"):
        synthesize(tmp_path / "new", 0.1)
    with pytest.raises(SynthesisError, match="at least one"):
        plan_synthesis(store, [])


# ---- numbers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_synthesis_is_the_sum_of_the_stored_averages(tmp_path, dtype):
    store = make_store(tmp_path, dtype=dtype)
    plan = plan_synthesis(store, TARGETS)
    for i, result in enumerate(synthesize(store, TARGETS)):
        expected = naive(store, plan, i, dtype)
        size = np.abs(plan.coefficients[:, i]).sum()
        for name, values in expected.items():
            if TABLE.entries[name].averaged:
                assert result[name].dtype == np.float32
                np.testing.assert_allclose(result[name], values, atol=2e-6 * size)
            else:
                np.testing.assert_array_equal(result[name], values)
            assert result[name].shape == TABLE.entries[name].shape
        assert result["head.weight"] is result["conv.weight"]


def test_names_are_in_the_models_order_with_tied_ones_behind(store):
    """pytorch-posthoc-ema leaves the alias out: a strict load then fails."""
    assert list(synthesize(store, 0.1)) == [*TABLE.entries, "head.weight"]


def test_stored_length_comes_back_as_it_was_stored(store):
    result, plan = synthesize(store, 0.1), plan_synthesis(store, [0.1])
    x = plan.coefficients[:, 0]
    assert x[-1] == pytest.approx(1, abs=1e-9)
    expected = naive(store, plan, 0)
    np.testing.assert_allclose(result["conv.weight"], expected["conv.weight"], atol=1e-6)


@pytest.mark.parametrize("tile", [1, 2, 5, 7, 24, 25, 1000])
@pytest.mark.parametrize("group", [1, 4])
def test_result_does_not_depend_on_tiles(store, monkeypatch, tile, group):
    """Tensors that span tiles, tiles that end with a tensor, empty tensors and scalars at the seams."""
    expected = synthesize(store, [*TARGETS, 0])
    monkeypatch.setattr(combine_module, "TILE", tile)
    monkeypatch.setattr(combine_module, "_GROUP", group)
    for a, b in zip(expected, synthesize(store, [*TARGETS, 0]), strict=True):
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_many_targets_equal_one_by_one(store):
    for sigma_rel, many in zip([*TARGETS, 0], synthesize(store, [*TARGETS, 0]), strict=True):
        one = synthesize(store, sigma_rel)
        assert list(one) == list(many)
        for name in one:
            np.testing.assert_allclose(one[name], many[name], atol=1e-5)


def test_synthesis_at_a_time_is_that_of_a_run_that_ended_there(store, tmp_path):
    ended = make_store(tmp_path / "ended", times=(10, 20))
    assert_same(synthesize(store, 0.07, at=20), synthesize(ended, 0.07))


def test_synthesis_at_the_first_time_works(store):
    """One snapshot per average: the sum is still one, where ema-pytorch's is 0.939 to 1.061."""
    plan = plan_synthesis(store, [0.15], at=10)
    assert plan.coefficients.sum() == pytest.approx(1, abs=1e-14)
    synthesize(store, 0.15, at=10)


def test_scalar_and_numpy_targets_give_one_result(store):
    for sigma_rel in (0.07, np.float32(0.07), np.float64(0.07), np.array(0.07)):
        assert isinstance(synthesize(store, sigma_rel), dict)
    assert isinstance(synthesize(str(store.folder), 0), dict)
    for sigma_rels in ([0.07], (0.07,), np.array([0.07])):
        assert len(synthesize(store.folder, sigma_rels)) == 1


def test_copies_are_those_of_the_targets_time(store):
    """ema-pytorch sums buffers with signed coefficients: a positive variance came out as -0.0018."""
    assert (
        synthesize(store, 0.03)["steps"] == naive(store, plan_synthesis(store, [0.03]), 0)["steps"]
    )
    earlier = synthesize(store, 0.03, at=20)
    expected = naive(store, plan_synthesis(store, [0.03], at=20), 0)
    for name in ("steps", "mask", "frozen"):
        np.testing.assert_array_equal(earlier[name], expected[name])
        assert earlier[name].dtype == expected[name].dtype


def test_raw_target_is_exact_beside_averages_that_are_not_finite(tmp_path):
    """0 times inf is nan: the raw weights must not pass through the sum."""
    table = make_table(entry("w", (3,)))
    wild, tame = np.float32([np.inf, np.nan, 1]), np.float32([1, -0.0, 2])
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        new = [NewAverage(PowerProfile(1, 0.1), "float16", lambda _: wild)]
        store.add(1, [*new, NewAverage(PointProfile(1), "float32", lambda _: tame)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average, raw = synthesize(tmp_path, [0.1, 0])
    np.testing.assert_array_equal(raw["w"], tame)
    assert np.signbit(raw["w"][1])
    assert np.isnan(average["w"][1])
    assert average["w"][2] == 1


def test_each_input_byte_is_read_once(store, monkeypatch):
    """31 targets from the same reads; besides, the headers and the sample that the plan looks at."""
    monkeypatch.setattr(combine_module, "TILE", 7)
    read, preadv = 0, os.preadv

    def count(descriptor, views, position):
        nonlocal read
        got = preadv(descriptor, views, position)
        read += got
        return got

    monkeypatch.setattr(os, "preadv", count)
    with pytest.warns(PhemaWarning, match="too f"):
        synthesize(store, np.linspace(0.02, 0.25, 31))
    averaged = sum(int(np.prod(e.shape)) for e in TABLE.entries.values() if e.averaged)
    sampled = averaged  # all of it: the model is smaller than the sample
    assert read == 6 * 4 * (averaged + sampled) + (
        8 + 3 + 8
    )  # copies: int64, three bools, four bfloat16


# ---- files


def outputs(tmp_path, count):
    (tmp_path / "out").mkdir(exist_ok=True)
    return [tmp_path / "out" / f"{i}.safetensors" for i in range(count)]


def test_files_hold_what_synthesize_returns(store, tmp_path):
    paths = outputs(tmp_path, 2)
    synthesize_to_files(store, plan_synthesis(store, [0.03, 0]), paths, dtype="float32")
    for path, expected in zip(paths, synthesize(store, [0.03, 0]), strict=True):
        written = read_output(path)
        assert set(written) == set(expected)
        np.testing.assert_array_equal(written["conv.weight"], expected["conv.weight"])
        np.testing.assert_array_equal(written["head.weight"], expected["conv.weight"])
        assert written["steps"].dtype == np.int64
        assert written["empty"].shape == (0, 3)
        assert written["gain"].shape == ()


@pytest.mark.parametrize("tile", [1, 5, 24])
def test_files_do_not_depend_on_tiles(store, tmp_path, monkeypatch, tile):
    paths = outputs(tmp_path, 1)
    plan = plan_synthesis(store, [0.03])
    monkeypatch.setattr(combine_module, "TILE", tile)
    synthesize_to_files(store, plan, paths, dtype="float32")
    monkeypatch.undo()
    for name, values in read_output(paths[0]).items():
        if name in TABLE.entries and TABLE.entries[name].averaged:
            np.testing.assert_allclose(values, synthesize(store, 0.03)[name], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        ("model", {"conv.weight": "F32", "gain": "F16", "half": "BF16"}),
        ("float32", {"conv.weight": "F32", "gain": "F32", "half": "F32"}),
        ("float16", {"conv.weight": "F16", "gain": "F16", "half": "F16"}),
        ("bfloat16", {"conv.weight": "BF16", "gain": "BF16", "half": "BF16"}),
    ],
)
def test_dtype_of_the_output_is_a_choice(store, tmp_path, dtype, codes):
    """EDM2's tool always writes float16. Copied tensors keep their own dtype in any case."""
    (path,) = outputs(tmp_path, 1)
    synthesize_to_files(store, plan_synthesis(store, [0.07]), [path], dtype=dtype)
    codes = codes | {"steps": "I64", "mask": "BOOL", "frozen": "BF16"}
    with safetensors.safe_open(path, framework="np") as file:
        assert {name: file.get_slice(name).get_dtype() for name in codes} == codes


def test_unknown_output_dtype_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="dtype must be model"):
        synthesize_to_files(store, plan_synthesis(store, [0.1]), outputs(tmp_path, 1), dtype="int8")


def test_provenance_is_in_the_metadata(tmp_path):
    store = make_store(tmp_path / "s", metadata={"config": "mine"})
    plan = plan_synthesis(store, [0.07, 0])
    paths = outputs(tmp_path, 2)
    synthesize_to_files(store, plan, paths)
    with safetensors.safe_open(paths[0], framework="np") as file:
        metadata = file.metadata()
    own = json.loads(metadata["posthoc_ema"])
    assert metadata["format"] == "pt"
    assert metadata["config"] == "mine"
    assert (own["sigma_rel"], own["time"], own["clock"], own["run_id"]) == (
        0.07,
        30,
        "images",
        "run-1",
    )
    assert own["tool"].startswith("posthoc-ema ")
    assert own["profile_error"] == plan.profile_error[0]
    used = {row["file"]: row["coefficient"] for row in own["inputs"]}
    assert list(used.values()) == plan.coefficients[:6, 0].tolist()
    with safetensors.safe_open(paths[1], framework="np") as file:
        own = json.loads(file.metadata()["posthoc_ema"])
    assert [(row["file"], row["coefficient"]) for row in own["inputs"]] == [
        ("000000000030-raw.safetensors", 1.0)
    ]


def test_same_request_gives_the_same_bytes(store, tmp_path):
    plan = plan_synthesis(store, [0.07])
    (path,) = outputs(tmp_path, 1)
    synthesize_to_files(store, plan, [path])
    first = path.read_bytes()
    synthesize_to_files(store, plan, [path])
    assert path.read_bytes() == first


def test_progress_rises_to_the_number_of_elements(store, tmp_path):
    seen = []
    plan = plan_synthesis(store, [0.07])
    synthesize_to_files(store, plan, outputs(tmp_path, 1), progress=lambda *a: seen.append(a))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (24 + 1 + 5, 24 + 1 + 5)


@pytest.mark.parametrize("offset", [-30, -24 - 40])
def test_damaged_input_leaves_no_output_and_the_old_one_whole(store, tmp_path, offset):
    paths = outputs(tmp_path, 3)
    paths[1].write_text("old")
    plan = plan_synthesis(store, [0.03, 0.07, 0.2])
    path = store.path(plan.inputs[3])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotFormatError, match=path.name):
        synthesize_to_files(store, plan, paths)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["1.safetensors"]
    assert paths[1].read_text() == "old"


def test_file_that_is_removed_between_plan_and_reading_is_named(store, tmp_path):
    plan = plan_synthesis(store, [0.07])
    store.path(plan.inputs[2]).unlink()
    with pytest.raises(SnapshotFormatError, match=plan.inputs[2].file):
        synthesize_to_files(store, plan, outputs(tmp_path, 1))
    assert list((tmp_path / "out").iterdir()) == []


def test_output_folder_that_is_missing_is_a_write_error(store, tmp_path):
    with pytest.raises(SnapshotWriteError, match="Check the folder"):
        synthesize_to_files(store, plan_synthesis(store, [0.07]), [tmp_path / "no" / "x"])


def test_overflow_of_a_float16_output_is_refused_by_tensor(tmp_path):
    table = make_table(entry("w", (2,)))
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        big = np.float32([1e5, 1])
        store.add(1, [NewAverage(PowerProfile(1, 0.1), "float16", lambda _: big)])
    plan = plan_synthesis(store, [0.1])
    with pytest.raises(SynthesisError, match=r"'w' holds 1e\+05.*--dtype float32"):
        synthesize_to_files(store, plan, outputs(tmp_path, 1), dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_infinity_is_written_as_it_is(tmp_path):
    table = make_table(entry("w", (2,)))
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        wild = np.float32([np.inf, 1])
        store.add(1, [NewAverage(PowerProfile(1, 0.1), "float16", lambda _: wild)])
    (path,) = outputs(tmp_path, 1)
    synthesize_to_files(store, plan_synthesis(store, [0.1]), [path], dtype="float16")
    assert read_output(path)["w"].tolist() == [np.inf, 1]


def test_a_length_out_of_reach_is_said(store):
    expected = r"sigma_rel 0.001: .* below the tracked lengths .* snapshot more often"
    with pytest.warns(PhemaWarning, match=expected):
        synthesize(store, 0.001)


def test_store_of_raw_weights_alone_is_averaged(tmp_path):
    """Such as LoRA files of another tool: nothing was tracked, and the saved weights are combined."""
    folder = tmp_path / "raw"
    with SnapshotStore.create(folder, clock="steps", table=make_table(entry("w", (3,)))) as new:
        for time in range(1, 11):
            values = np.full(3, float(time), dtype=np.float32)
            new.add(
                time,
                [NewAverage(PointProfile(time), "float32", lambda _, v=values: v)],
                replace_raw=False,
            )
    store = SnapshotStore.open(folder)
    assert store.times == list(range(1, 11))
    plan = plan_synthesis(store, [0.2, 0])
    points = [PointProfile(t) for t in range(1, 11)]
    expected = fit(points, [PowerProfile(10, 0.2)], noise=plan.measurement.fit_noise)
    np.testing.assert_allclose(plan.coefficients[:, 0], expected.coefficients[:, 0])
    average, raw = synthesize(store, [0.2, 0])
    np.testing.assert_allclose(average["w"], np.arange(1, 11) @ plan.coefficients[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(raw["w"], np.full(3, 10.0))
