"""LoRA files of kohya and musubi-tuner: raw weights of several times."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import PointProfile
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.importers import ImportOptions, detect_kind, plan_import, write_import
from posthoc_ema.tensor_files import TensorFile, write_tensors

RUN = {"ss_network_dim": "4", "modelspec.title": "mine"}


def lora(path, value, alpha=4.0, shape=(4, 8), **metadata):
    tensors = {
        "unet.lora_down.weight": np.full(shape, value, "f2"),
        "unet.lora_up.weight": np.full((8, 4), value, "f2"),
        "unet.alpha": np.array(alpha, "f2"),
    }
    write_tensors(path, tensors, {**RUN, **metadata})


def epochs(folder, **last):
    for epoch in (1, 2, 3):
        lora(folder / f"style-{epoch:06d}.safetensors", epoch, ss_epoch=str(epoch))
    lora(folder / "style.safetensors", 4, ss_epoch="4", **last)
    return folder


def test_lora_epochs_become_a_store_of_raw_weights(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    epochs(folder, sshs_model_hash="abc", sshs_legacy_hash="d")
    assert detect_kind(folder) == "kohya"
    plan = plan_import(folder)
    store, _ = write_import(plan, tmp_path / "ours")
    assert [(r.time, r.profile) for r in store.records] == [
        (t, PointProfile(t)) for t in (1, 2, 3, 4)
    ]
    assert any("one epoch" in note for note in plan.notes)
    assert list(store.verify()) == []
    with TensorFile(store.path(store.records[2])) as file:
        np.testing.assert_array_equal(file.read("unet.lora_up.weight"), np.full((8, 4), 3, "f2"))


def test_lora_metadata_is_carried_over_without_hashes(tmp_path):
    plan = plan_import(epochs(tmp_path, sshs_model_hash="abc", sshs_legacy_hash="d"))
    assert plan.metadata == {**RUN, "ss_epoch": "4", "imported_from": "kohya"}
    assert any("sshs" in note for note in plan.notes)


def test_lora_alpha_is_copied(tmp_path):
    table = plan_import(epochs(tmp_path)).table
    assert [name for name, e in table.entries.items() if not e.averaged] == ["unet.alpha"]


def test_lora_steps_come_from_metadata_or_names(tmp_path):
    for step in (500, 1000):
        lora(tmp_path / f"style-step{step:08d}.safetensors", step)
    lora(tmp_path / "style.safetensors", 1, ss_steps="1234")
    assert [file.time for file in plan_import(tmp_path).files] == [500, 1000, 1234]


def test_lora_times_can_be_told(tmp_path):
    for epoch in (1, 2):
        lora(tmp_path / f"style-{epoch:06d}.safetensors", epoch)
    lora(tmp_path / "style.safetensors", 3)
    with pytest.raises(ConfigError, match="Give --time"):
        plan_import(tmp_path)
    with pytest.raises(ConfigError, match="2 times for 3 files"):
        plan_import(tmp_path, options=ImportOptions(times=(1, 2)))
    plan = plan_import(tmp_path, options=ImportOptions(times=(10, 20, 30)))
    assert [(f.time, f.path.name) for f in plan.files][-1] == (30, "style.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 2.0}, r"'unet.alpha' differs"),
        ({"shape": (2, 8)}, r"style-000003.safetensors: tensor 'unet.lora_down.weight'"),
    ],
    ids=["alpha", "shape"],
)
def test_lora_mixtures_are_refused(change, message, tmp_path):
    epochs(tmp_path)
    lora(tmp_path / "style-000003.safetensors", 3, ss_epoch="3", **change)
    with pytest.raises(SnapshotMismatchError, match=message):
        plan_import(tmp_path)


def test_lora_two_runs_are_refused(tmp_path):
    epochs(tmp_path)
    lora(tmp_path / "other-000003.safetensors", 3)
    with pytest.raises(SnapshotMismatchError, match="2 runs, other and style"):
        plan_import(tmp_path)


def test_lora_refuses_options_for_averages_and_damage(tmp_path):
    epochs(tmp_path)
    with pytest.raises(ConfigError, match="raw weights"):
        plan_import(tmp_path, options=ImportOptions(update_every=2))
    path = tmp_path / "style-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotFormatError, match=str(path)):
        plan_import(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotNotFoundError):
        plan_import(tmp_path / "empty", "kohya")
