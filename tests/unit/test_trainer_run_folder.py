"""A run's folder before anything has been stored in it."""

import json

import numpy as np
import pytest

from posthoc_ema import ConfigError
from reference_trainer.data import load_dataset
from reference_trainer.data.dataset import ArrayDataset
from reference_trainer.loop import train
from reference_trainer.presets import preset
from reference_trainer.run_folder import run_folder

DIGITS = load_dataset("digits")


def _stored_seed(folder):
    return json.loads((folder / "config.json").read_text())["seed"]


def _with_seed(seed):
    return type(preset("digits-xs")).from_dict(preset("digits-xs").to_dict() | {"seed": seed})


def test_run_folder_of_a_start_that_failed_takes_another_configuration(tmp_path):
    for seed in (1, 2):
        with run_folder(tmp_path, _with_seed(seed), DIGITS):
            assert _stored_seed(tmp_path) == seed


@pytest.mark.parametrize(
    "stored", ["checkpoints/checkpoint-000000000064.safetensors", "snapshots/manifest.json"]
)
def test_run_folder_that_holds_work_keeps_its_configuration(tmp_path, stored):
    with run_folder(tmp_path, _with_seed(1), DIGITS):
        (tmp_path / stored).parent.mkdir()
        (tmp_path / stored).touch()
    with (
        pytest.raises(ConfigError, match=r"seed \(1 and 2\)"),
        run_folder(tmp_path, _with_seed(2), DIGITS),
    ):
        pass
    assert _stored_seed(tmp_path) == 1


def test_training_on_data_that_do_not_fit_writes_nothing(tmp_path):
    value = preset("digits-xs").to_dict()
    value["network"]["img_channels"] = 3
    config = type(preset("digits-xs")).from_dict(value)
    with pytest.raises(ConfigError, match=r"network\.img_channels must be 1"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_run_folder_that_holds_work_refuses_other_data_of_the_same_name(tmp_path):
    images, labels = DIGITS.read(np.arange(100))
    fewer = ArrayDataset(name="digits", images=images, labels=labels, label_dim=10)
    with run_folder(tmp_path, _with_seed(1), DIGITS):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "checkpoint-000000000064.safetensors").touch()
    with (
        pytest.raises(ConfigError, match="1797 images when it began, 100 now"),
        run_folder(tmp_path, _with_seed(1), fewer),
    ):
        pass
    with run_folder(tmp_path, _with_seed(1), DIGITS):
        pass
