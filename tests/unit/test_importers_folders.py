"""Folders of INDEX.STEP.pt: which tool, which averages, and what is refused."""

from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
import torch

from posthoc_ema.codecs import decode
from posthoc_ema.errors import (
    ConfigError,
    PhemaError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.importers import ImportOptions, detect_kind, plan_import, write_import
from posthoc_ema.tensor_files import TensorFile

from .stores import make_store

TOLD = ImportOptions(sigma_rels=(0.05, 0.1), update_every=1)


def state(kind, step, value, dtype=torch.float32, shape=(2, 3)):
    """The state dict of one file, as the tool writes it."""
    model = {
        "w": torch.full(shape, value).to(dtype),
        "norm.running_var": torch.full((2,), value).to(dtype),
        "norm.num_batches_tracked": torch.tensor(step),
    }
    if kind == "posthoc-ema":
        return {**model, "initted": torch.tensor(True), "step": torch.tensor(step)}
    model = {f"ema_model.{name}": tensor for name, tensor in model.items()}
    if kind == "nitrous":
        return {"_extra_state": {"initted": True, "step": step}, **model}
    cast = {"initted": torch.tensor(True), "step": torch.tensor(step), **model}
    return {name: tensor.to(dtype) for name, tensor in cast.items()}


def write(folder, kind="ema-pytorch", steps=(100, 200, 300), **options):
    folder.mkdir(exist_ok=True)
    for step in steps:
        for index in (0, 1):
            torch.save(state(kind, step, step + index, **options), folder / f"{index}.{step}.pt")
    return folder


@pytest.mark.parametrize("kind", ["ema-pytorch", "nitrous", "posthoc-ema"])
def test_folder_of_each_tool_becomes_a_store(kind, tmp_path):
    folder = write(tmp_path / "theirs", kind)
    assert detect_kind(folder) == kind
    store, _ = write_import(plan_import(folder, options=TOLD), tmp_path / "ours")
    assert (store.clock, store.times, store.sigma_rels) == ("steps", [100, 200, 300], [0.05, 0.1])
    kinds = {name: (e.dtype, e.averaged) for name, e in store.table.entries.items()}
    assert kinds == {
        "w": ("float32", True),
        "norm.running_var": ("float32", False),
        "norm.num_batches_tracked": ("int64", False),
    }
    assert store.metadata["imported_from"] == kind


def test_float16_values_and_lost_counters(tmp_path):
    """step becomes inf beyond 65504 and so do counters: neither breaks the import."""
    folder = write(tmp_path / "theirs", steps=(1000, 70_001), dtype=torch.float16)
    plan = plan_import(folder, options=TOLD)
    store, noticed = write_import(plan, tmp_path / "ours")
    assert (store.times, plan.dtype) == ([1000, 70_001], "float16")
    assert "infinite values" in noticed[0]  # the weights are 70001 here: inf in float16
    with TensorFile(store.path(store.records[0])) as file:
        assert file.read("norm.num_batches_tracked") == 1000
    with TensorFile(store.path(store.records[-1])) as file:
        assert file.read("norm.num_batches_tracked") == 0


def test_bfloat16_folder_is_exact(tmp_path):
    folder = write(tmp_path / "theirs", "nitrous", dtype=torch.bfloat16)
    store, _ = write_import(plan_import(folder, options=TOLD), tmp_path / "ours")
    with TensorFile(store.path(store.records[0])) as file:
        np.testing.assert_array_equal(decode(file.read("w"), "bfloat16"), np.full((2, 3), 100.0))


def test_dtype_can_be_chosen(tmp_path):
    folder = write(tmp_path / "theirs", dtype=torch.float16, steps=(100,))
    store, _ = write_import(plan_import(folder, options=TOLD), tmp_path / "ours", "float32")
    assert {record.dtype for record in store.records} == {"float32"}


def test_late_start_moves_the_clock(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for step in (100, 200):
        torch.save(state("posthoc-ema", step - 30, 1.0), folder / f"0.{step}.pt")
    plan = plan_import(folder, options=ImportOptions((0.1,), 1))
    assert [file.time for file in plan.files] == [70, 170]
    assert "after 30 steps" in plan.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImportOptions(), "does not say which. Give --sigma-rel"),
        (ImportOptions((0.05,), 1), "2 lengths"),
        (ImportOptions((0.05, 0.0), 1), "2 lengths"),
        (ImportOptions((0.05, 0.1)), "Give --update-every"),
        (ImportOptions((0.05, 0.1), 1, batch_size=4), "are for EDM2"),
    ],
)
def test_folder_asks_for_what_files_do_not_say(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan_import(write(tmp_path / "theirs"), options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "update_every"),
        ({"times": (2, 2)}, "rise"),
        ({"times": (0, 2)}, "positive"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ImportOptions(**options)


def test_another_shape_is_named(tmp_path):
    folder = write(tmp_path / "theirs")
    torch.save(state("ema-pytorch", 250, 1.0, shape=(2, 4)), folder / "0.250.pt")
    with pytest.raises(SnapshotMismatchError, match=r"0\.250\.pt: tensor 'w' is float32 \(2, 4\)"):
        plan_import(folder, options=TOLD)


def test_another_name_is_named(tmp_path):
    folder = write(tmp_path / "theirs")
    other = state("ema-pytorch", 200, 1.0)
    other["ema_model.extra"] = torch.ones(1)
    torch.save(other, folder / "1.200.pt")
    with pytest.raises(SnapshotMismatchError, match=r"1\.200\.pt: it holds a tensor 'extra'"):
        plan_import(folder, options=TOLD)


def test_renamed_file_is_refused(tmp_path):
    folder = write(tmp_path / "theirs")
    (folder / "0.300.pt").rename(folder / "0.400.pt")
    with pytest.raises(SnapshotMismatchError, match=r"0\.400\.pt: counts 300 steps inside"):
        plan_import(folder, options=TOLD)


def test_same_time_twice_is_refused(tmp_path):
    folder = write(tmp_path / "theirs")
    torch.save(state("ema-pytorch", 300, 1.0), folder / "0.0300.pt")
    with pytest.raises(SnapshotMismatchError, match=r"same average, sigma_rel-0\.05 at time 300"):
        plan_import(folder, options=TOLD)


def test_files_of_another_tool_are_refused(tmp_path):
    folder = write(tmp_path / "theirs")
    torch.save({"weird": torch.ones(1), **state("ema-pytorch", 300, 1.0)}, folder / "0.300.pt")
    with pytest.raises(SnapshotFormatError, match=r"0\.300\.pt: holds 'weird'"):
        plan_import(folder, options=TOLD)


def test_missing_averages_and_time_zero_are_noted(tmp_path):
    folder = write(tmp_path / "theirs", steps=(0, 100, 200))
    (folder / "1.200.pt").unlink()
    notes = plan_import(folder, options=TOLD).notes
    assert any("1 of 2 times lack an average, the first is 200" in note for note in notes)
    assert any("time 0" in note for note in notes)


def test_older_file_of_a_later_time_is_noted(tmp_path):
    """Two runs in one folder: the second overwrote the first up to step 200."""
    folder = write(tmp_path / "theirs")
    for path in folder.glob("*.300.pt"):
        os.utime(path, (1, 1))
    assert any("two runs" in note for note in plan_import(folder, options=TOLD).notes)


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_damaged_file_is_named(damage, tmp_path):
    folder = write(tmp_path / "theirs")
    path = folder / "1.200.pt"
    path.write_bytes({"cut": path.read_bytes()[:-200], "other": b"notes", "empty": b""}[damage])
    with pytest.raises(SnapshotFormatError, match=str(path)):
        plan_import(folder, options=TOLD)


def test_overlapping_tensors_are_refused(tmp_path):
    """Views of one storage that together are far larger than the file."""
    base = torch.zeros(4000)
    views = {f"ema_model.{i}": base[i:] for i in range(60)}
    torch.save(
        {"initted": torch.tensor(1.0), "step": torch.tensor(5.0), **views}, tmp_path / "0.5.pt"
    )
    with pytest.raises(SnapshotFormatError, match="overlap so much"):
        plan_import(tmp_path, options=ImportOptions((0.1,), 1))


def test_tied_tensors_are_aliases(tmp_path):
    base = torch.ones(3)
    torch.save({"ema_model.a": base, "ema_model.b": base}, tmp_path / "0.5.pt")
    plan = plan_import(tmp_path, options=ImportOptions((0.1,), 1))
    assert (list(plan.table.entries), plan.table.aliases) == (["a"], {"b": "a"})


def test_names_of_a_compiled_model_are_those_of_the_model(tmp_path):
    torch.save({"ema_model._orig_mod.a.w": torch.ones(1)}, tmp_path / "0.5.pt")
    assert list(plan_import(tmp_path, options=ImportOptions((0.1,), 1)).table.entries) == ["a.w"]
    both = {"ema_model._orig_mod.a": torch.ones(1), "ema_model.a": torch.ones(1)}
    torch.save(both, tmp_path / "0.5.pt")
    with pytest.raises(SnapshotFormatError, match="holds 'a' twice"):
        plan_import(tmp_path, options=ImportOptions((0.1,), 1))


def test_memory_holds_single_tensors(tmp_path):
    """Files of 16 tensors of a megabyte each."""
    named = {f"ema_model.{i}": torch.ones(1 << 18) for i in range(16)}
    for step in (5, 10):
        torch.save(named, tmp_path / f"0.{step}.pt")
    tracemalloc.start()
    try:
        plan = plan_import(tmp_path, options=ImportOptions((0.1,), 1))
        write_import(plan, tmp_path / "ours")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


# ---- finding out, writing


def test_detect_kind(tmp_path):
    assert detect_kind(make_store(tmp_path / "store").folder) == "store"
    with pytest.raises(SnapshotNotFoundError, match="does not exist"):
        detect_kind(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotNotFoundError, match="no files of a known tool"):
        detect_kind(tmp_path / "empty")
    folder = write(tmp_path / "theirs", steps=(100,))
    (folder / "network-snapshot-0001024-0.050.pkl").write_bytes(b"")
    with pytest.raises(SnapshotMismatchError, match="several tools"):
        detect_kind(folder)
    with pytest.raises(ConfigError, match="can be imported from"):
        plan_import(folder, "keras")


def test_interrupted_import_goes_on(tmp_path):
    folder = write(tmp_path / "theirs")
    plan = plan_import(folder, options=TOLD)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_import(plan, tmp_path / "ours", progress=stop)
    assert not (tmp_path / "ours").exists()
    partial = tmp_path / "ours.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(before) == 4
    store, _ = write_import(plan_import(folder, options=TOLD), tmp_path / "ours")
    assert (len(store.records), list(store.verify())) == (6, [])
    after = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.safetensors")}
    assert before.items() <= after.items()
    assert not partial.exists()


def test_rest_of_another_import_is_not_mixed_in(tmp_path):
    plan = plan_import(write(tmp_path / "theirs"), options=TOLD)
    with pytest.raises(ZeroDivisionError):
        write_import(plan, tmp_path / "ours", progress=lambda done, total: 1 // (2 - done))
    (tmp_path / "theirs" / "0.300.pt").unlink()
    plan = plan_import(tmp_path / "theirs", options=TOLD)
    with pytest.raises(ConfigError, match="rest of another conversion"):
        write_import(plan, tmp_path / "ours")


def test_existing_folder_is_left_alone(tmp_path):
    plan = plan_import(write(tmp_path / "theirs"), options=TOLD)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_import(plan, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["file"]
    with pytest.raises(PhemaError, match="dtype"):
        write_import(plan, tmp_path / "new", "float8")
