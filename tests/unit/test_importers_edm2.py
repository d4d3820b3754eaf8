"""EDM2 network snapshots become a store; their source text is never run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc_ema import synthesize
from posthoc_ema.errors import (
    ConfigError,
    PhemaError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.importers import ImportOptions, plan_import, write_import
from posthoc_ema.importers.edm2 import images_of_stamp

from .edm2_pickles import network_of, write_snapshot

TIMES = (8_388_608, 16_777_216, 25_165_824)


@pytest.fixture
def folder(tmp_path):
    """A folder as a training run leaves it: two lengths, three times, and time 0."""
    folder = tmp_path / "run"
    folder.mkdir()
    for i, time in enumerate((0, *TIMES)):
        for label in ("0.050", "0.100"):
            path = folder / f"network-snapshot-{time // 1000:07d}-{label}.pkl"
            write_snapshot(path, network_of(10 * i + int(label[2:]) // 50), tmp_path / "canary")
    return folder


def test_edm2_folder_becomes_a_store(folder, tmp_path):
    plan = plan_import(folder)
    store, noticed = write_import(plan, tmp_path / "store")
    assert (plan.kind, store.clock, store.times) == ("edm2", "images", list(TIMES))
    assert (store.sigma_rels, noticed) == ([0.05, 0.1], [])
    assert any("multiples of 1024" in note for note in plan.notes)
    assert any("time 0" in note for note in plan.notes)
    assert list(store.verify()) == []
    assert not (tmp_path / "canary").exists()


def test_edm2_names_and_values_are_those_of_the_state_dict(folder, tmp_path):
    store, _ = write_import(plan_import(folder), tmp_path / "store")
    network = network_of(31)
    state = network.state_dict()
    assert set(store.table.entries) == set(state)
    copied = {name for name, entry in store.table.entries.items() if not entry.averaged}
    assert copied == {"freqs", "count"}
    assert {record.dtype for record in store.records} == {"float16"}
    found = synthesize(store, sigma_rel=0.05)
    for name, tensor in state.items():
        want = tensor.numpy().astype(found[name].dtype)
        np.testing.assert_allclose(found[name], want, rtol=1e-3, atol=2e-3)


def test_edm2_plain_table_and_bare_network_are_read(tmp_path):
    for name, wrap in (("a", dict), ("b", lambda table: table["ema"])):
        path = tmp_path / f"edm2-img512-{name}-2147483-0.135.pkl"
        write_snapshot(path, network_of(1), tmp_path / "canary", wrap)
        store, _ = write_import(plan_import(path), tmp_path / name)
        assert [(r.time, r.sigma_rel) for r in store.records] == [(2**31, 0.135)]


def test_edm2_noise_is_that_of_the_files_rounding(folder, tmp_path):
    store, _ = write_import(plan_import(folder), tmp_path / "store")
    values = np.concatenate(
        [p.detach().float().numpy().ravel() for p in network_of(31).parameters()]
    )
    ulp = np.spacing(np.abs(values).astype(np.float16)).astype(np.float64)
    assert store.records[-2].noise == pytest.approx(np.mean(ulp**2) / 12, rel=1e-6)


def test_edm2_float32_stays_float32(tmp_path):
    path = tmp_path / "network-snapshot-0001024-0.050.pkl"
    write_snapshot(path, network_of(1, torch.float32), tmp_path / "canary")
    plan = plan_import(path)
    store, _ = write_import(plan, tmp_path / "store")
    assert (plan.dtype, store.records[0].noise) == ("float32", 0.0)


# ---- time and length


@pytest.mark.parametrize(
    ("stamp", "batch_size", "images"),
    [
        (2_147_483, None, 2**31),
        (8388, None, 2**23),
        (50, 2000, 50_000),
        (1, None, 1024),
        (0, None, 0),
    ],
)
def test_images_of_stamp_inverts_the_rounding(stamp, batch_size, images):
    assert images_of_stamp(stamp, batch_size) == images


@pytest.mark.parametrize("stamp", [42, 85, 127, 170])
def test_images_of_stamp_refuses_what_no_multiple_gives(stamp):
    with pytest.raises(ConfigError, match="--batch-size"):
        images_of_stamp(stamp)


def test_images_of_stamp_refuses_small_batches_that_leave_a_choice():
    with pytest.raises(ConfigError, match="several multiples of 256"):
        images_of_stamp(50, 256)


def test_edm2_options_replace_what_the_names_round(folder, tmp_path):
    times = tuple(time - 5 for time in TIMES)
    options = ImportOptions(sigma_rels=(0.0504, 0.0997), times=times)
    plan = plan_import(folder, options=options)
    assert [file.time for file in plan.files[::2]] == list(times)
    assert {file.profile.sigma_rel for file in plan.files} == {0.0504, 0.0997}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_rels": (0.06, 0.1)}, "0 of the lengths"),
        ({"sigma_rels": (0.0499, 0.0501, 0.1)}, "2 of the lengths"),
        ({"times": (8_388_608,)}, "names 1 times, the files have 3"),
        ({"times": (8_388_608, 16_777_216, 25_166_000)}, "does not fit the file of 25165 thousand"),
        ({"update_every": 10}, "not for EDM2"),
        ({"batch_size": 100_000}, "no multiple of 100000"),
    ],
)
def test_edm2_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        plan_import(folder, options=ImportOptions(**options))


def test_edm2_name_without_length_asks_for_one(folder):
    path = folder / "network-snapshot-0008388.pkl"
    (folder / "network-snapshot-0008388-0.050.pkl").rename(path)
    with pytest.raises(ConfigError, match="does not say its sigma_rel"):
        plan_import(path)
    assert plan_import(path, options=ImportOptions((0.05,))).files[0].profile.sigma_rel == 0.05


# ---- mixtures and damage


def test_edm2_two_runs_are_refused(folder, tmp_path):
    write_snapshot(folder / "other-run-0008388-0.050.pkl", network_of(1), tmp_path / "canary")
    with pytest.raises(SnapshotMismatchError, match="2 runs, network-snapshot and other-run"):
        plan_import(folder)


def test_edm2_another_model_is_named(folder, tmp_path):
    network = network_of(1)
    network.blocks["8x8"].weight = torch.nn.Parameter(torch.zeros(4, 2).half())
    path = folder / "network-snapshot-0016777-0.100.pkl"
    write_snapshot(path, network, tmp_path / "canary")
    with pytest.raises(
        SnapshotMismatchError, match=rf"{path}: tensor 'blocks.8x8.weight' is"
    ) as caught:
        plan_import(folder)
    assert "(4, 2)" in str(caught.value)


def test_edm2_another_dtype_is_named(folder, tmp_path):
    path = folder / "network-snapshot-0016777-0.100.pkl"
    write_snapshot(path, network_of(1, torch.float32), tmp_path / "canary")
    with pytest.raises(SnapshotMismatchError, match=r"0016777-0.100.pkl: tensor .* float32"):
        plan_import(folder)


def test_edm2_damaged_file_is_named_and_nothing_is_written(folder, tmp_path):
    path = folder / "network-snapshot-0025165-0.100.pkl"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnapshotFormatError, match=str(path)):
        write_import(plan_import(folder), tmp_path / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_edm2_state_without_network_is_refused(tmp_path):
    path = tmp_path / "training-state-0008388.pkl"
    write_snapshot(path, None, tmp_path / "canary")
    with pytest.raises(SnapshotFormatError, match="no network under 'ema'"):
        plan_import(path, options=ImportOptions((0.05,)))


def test_edm2_module_that_contains_itself_is_refused(tmp_path):
    path = tmp_path / "network-snapshot-0008388-0.050.pkl"
    table = {"ema": {"_modules": {"a": None}}}
    table["ema"]["_modules"]["a"] = table["ema"]
    write_snapshot(path, table["ema"], tmp_path / "canary", dict)
    with pytest.raises(SnapshotFormatError, match="nested too deeply"):
        plan_import(path)


def test_edm2_folder_without_snapshots(tmp_path):
    (tmp_path / "notes.pkl").write_bytes(b"")
    with pytest.raises(SnapshotNotFoundError, match=r"network-snapshot-0008388-0\.050\.pkl"):
        plan_import(tmp_path, "edm2")
    with pytest.raises(PhemaError, match="does not exist"):
        plan_import(tmp_path / "missing", "edm2")
