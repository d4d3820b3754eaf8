"""Folders of generated images: what they hold, what they refuse, what they leave alone."""

import json

import numpy as np
import pytest
from PIL import Image

from posthoc_ema.errors import ConfigError, SnapshotWriteError
from reference_trainer.sampling import (
    ImageBatch,
    ImageWriter,
    existing_images,
    prepare_folder,
    stored_labels,
    write_labels,
)

SETTINGS = {"sampler": {"churn": 0.0, "num_steps": 8}, "guidance": [], "classes": None}


def batch(seeds, channels=1):
    images = np.arange(len(seeds) * channels * 16, dtype=np.uint8)
    labels = np.array([seed % 10 for seed in seeds])
    return ImageBatch(0, tuple(seeds), labels, images.reshape(len(seeds), channels, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_writer_writes_one_file_per_wanted_seed(tmp_path, channels):
    prepare_folder(tmp_path / "new" / "a", SETTINGS)
    made = batch([7, 3, 12345678901], channels)
    with ImageWriter(tmp_path / "new" / "a", [7, 12345678901]) as writer:
        writer.write(made)
    found = existing_images(tmp_path / "new" / "a")
    assert sorted(found) == [7, 12345678901]
    assert found[7].name == "00000007.png"
    with Image.open(found[12345678901]) as image:
        assert np.array_equal(
            np.asarray(image).reshape(4, 4, -1), made.images[2].transpose(1, 2, 0)
        )
    assert writer.labels == {7: 7, 3: 3, 12345678901: 1}


def test_an_error_of_the_background_comes_at_the_end(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    (tmp_path / "a" / "00000001.png").mkdir()

    def write():
        with ImageWriter(tmp_path / "a", [1]) as writer:
            writer.write(batch([1]))

    with pytest.raises(SnapshotWriteError, match=r"00000001\.png"):
        write()


def test_the_labels_are_those_of_a_data_set(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    with ImageWriter(tmp_path / "a", [5, 6]) as writer:
        writer.write(batch([5, 6]))
    write_labels(tmp_path / "a", {**writer.labels, 99: 1})
    content = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert content == {"labels": [["00000005.png", 5], ["00000006.png", 6]]}
    assert stored_labels(tmp_path / "a") == {5: 5, 6: 6}
    write_labels(tmp_path / "a", None)
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == {"labels": None}
    assert stored_labels(tmp_path / "a") == {}


def test_a_file_that_was_cut_off_counts_as_missing(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    with ImageWriter(tmp_path / "a", range(3)) as writer:
        writer.write(batch(range(3)))
    path = tmp_path / "a" / "00000001.png"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "a" / "00000002.png").write_bytes(b"")
    (tmp_path / "a" / "cat.png").write_bytes(b"")
    (tmp_path / "a" / "3.png").write_bytes(b"")
    assert sorted(existing_images(tmp_path / "a")) == [0]


def test_a_folder_goes_on_with_the_same_settings_and_loses_what_a_kill_left(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    (tmp_path / "a" / ".tmp-00000001.png-0123abcd").touch()
    prepare_folder(tmp_path / "a", SETTINGS)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sampling.json"]


def test_other_settings_are_refused_and_what_differs_is_said(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    guided = {**SETTINGS, "guidance": [{"weight": 2.0, "interval": ["0", "5"]}]}
    with pytest.raises(ConfigError) as caught:
        prepare_folder(tmp_path / "a", {**guided, "sampler": {"churn": 0.0, "num_steps": 9}})
    message = str(caught.value)
    assert "sampler.num_steps: 8 there, 9 here" in message
    assert "guidance.1.weight: none there, 2.0 here" in message
    assert 'guidance.1.interval: none there, ["0", "5"] here' in message
    assert "churn" not in message


def test_overwriting_removes_our_images_and_nothing_else(tmp_path):
    prepare_folder(tmp_path / "a", SETTINGS)
    with ImageWriter(tmp_path / "a", range(3)) as writer:
        writer.write(batch(range(3)))
    write_labels(tmp_path / "a", writer.labels)
    (tmp_path / "a" / "notes.txt").touch()
    prepare_folder(tmp_path / "a", {**SETTINGS, "classes": [1]}, overwrite=True)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"notes.txt", "sampling.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, overwrite):
    (tmp_path / "holiday.png").touch()
    with pytest.raises(ConfigError, match="holds files that are not of `phema sample`"):
        prepare_folder(tmp_path, SETTINGS, overwrite=overwrite)


def test_damaged_settings_are_told(tmp_path):
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        prepare_folder(tmp_path, SETTINGS)
