"""Means, standard deviations and the mapping to network units; the built-in photographs."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import reference_trainer.data
from posthoc_ema.errors import ConfigError
from reference_trainer.data import load_dataset, photos
from reference_trainer.data.statistics import (
    channel_statistics,
    data_config_for,
    spread,
    standardised,
)

from . import data_sets as ds

MODULES = [
    f"reference_trainer.data.{m.name}"
    for m in pkgutil.iter_modules(reference_trainer.data.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_docstrings_are_right(name):
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0


def test_statistics_are_those_of_all_pixels(tmp_path):
    images = ds.pictures(600)
    dataset = load_dataset(str(ds.write_zip(tmp_path / "a.zip", ds.edm2_files(images))))
    v = images / 127.5 - 1
    statistics = channel_statistics(dataset)
    assert statistics.num_items == 600
    assert statistics.mean == pytest.approx(v.mean((0, 2, 3)), abs=1e-12)
    assert statistics.std == pytest.approx(v.std((0, 2, 3)), rel=1e-12)


def test_statistics_of_latents_are_those_of_fresh_samples(tmp_path, rng):
    mean, std = rng.normal(2, 3, (50, 4, 4, 4)), rng.random((50, 4, 4, 4))
    values = np.concatenate([mean, std], axis=1).astype(np.float32)
    files = ds.edm2_files(values, None, "img-mean-std-", "npy")
    dataset = load_dataset(str(ds.write_folder(tmp_path / "set", files)))
    samples = values[None, :, :4] + values[None, :, 4:] * rng.standard_normal((200, 50, 4, 4, 4))
    statistics = channel_statistics(dataset)
    assert statistics.mean == pytest.approx(samples.mean((0, 1, 3, 4)), abs=0.02)
    assert statistics.std == pytest.approx(samples.std((0, 1, 3, 4)), rel=0.01)


def test_the_mapping_gives_mean_zero_and_sigma_data(tmp_path, rng):
    images = (rng.random((100, 3, 8, 8)) ** 3 * 255).astype(np.uint8)
    path = ds.write_zip(tmp_path / "a.zip", ds.edm2_files(images, np.arange(100) % 3))
    config = data_config_for(path, sigma_data=0.5)
    assert (config.name, config.path, config.kind) == ("a", str(path), "pixels")
    mean, scale = (np.array(v).reshape(3, 1, 1) for v in (config.mean, config.scale))
    x = (images / 127.5 - 1 - mean) * scale
    assert x.mean((0, 2, 3)) == pytest.approx(0, abs=1e-12)
    assert x.std((0, 2, 3)) == pytest.approx(0.5)


def test_a_constant_channel_has_no_scale(tmp_path):
    images = ds.pictures(4)
    images[:, 1] = 7
    dataset = load_dataset(str(ds.write_zip(tmp_path / "a.zip", ds.edm2_files(images))))
    with pytest.raises(ConfigError, match="channel 1 of the data is constant"):
        standardised(dataset)


def test_a_part_of_a_data_set_is_evenly_spread():
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(10, None).tolist() == spread(10, 99).tolist() == list(range(10))


def test_progress_counts_items():
    seen = []
    channel_statistics(load_dataset("digits"), 600, lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


# ---- photographs

SIZES = {16: 30800, 32: 26864, 64: 5016}


@pytest.mark.parametrize("side", SIZES)
def test_photographs_are_cut_into_equally_many_patches(side):
    dataset = load_dataset(f"photos-{side}")
    assert dataset.images.shape == (SIZES[side], 3, side, side)
    assert np.bincount(dataset.labels).tolist() == [SIZES[side] // 8] * 8
    assert dataset.label_dim == 8


def test_patches_lie_on_a_grid_row_by_row():
    photo = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    patches = photos.cut(photo, 8, 4)
    assert patches.shape == (6, 3, 8, 8)
    for k, (y, x) in enumerate([(0, 0), (0, 4), (0, 8), (4, 0), (4, 4), (4, 8)]):
        assert np.array_equal(patches[k], photo[y : y + 8, x : x + 8].transpose(2, 0, 1))


def test_photographs_are_not_enlarged_and_hold_no_flat_class():
    from PIL import Image

    for package, file in photos.PHOTOGRAPHS:
        with Image.open(photos._package_folder(package) / file) as image:
            assert image.width >= photos.FRAME[0]
            assert image.height >= photos.FRAME[1]
        assert photos.photograph(package, file).std() > 20


def test_presets_of_photographs_have_their_statistics():
    """JPEG decoders may differ by a level or two, so the numbers agree to three digits."""
    from reference_trainer.presets import PRESETS

    found = 0
    for preset in PRESETS.values():
        data = preset().data
        if data.name.startswith("photos"):
            found += 1
            own = data_config_for(data.name)
            assert own.mean == pytest.approx(data.mean, abs=2e-3)
            assert own.scale == pytest.approx(data.scale, rel=2e-3)
    assert found


def test_photographs_without_their_package_name_the_pip_line(monkeypatch):
    photos.photograph.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs skimage, which is not installed. Run: pip install"
    ):
        load_dataset("photos-16")
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (("sys", "nothing.png"),))
    monkeypatch.undo()
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (("skimage", "nothing.png"),))
    with pytest.raises(ConfigError, match="does not carry"):
        load_dataset("photos-16")
