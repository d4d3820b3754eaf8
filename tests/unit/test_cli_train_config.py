"""What `phema train --data` makes of a preset."""

import pytest

from phema.train_config import TrainOptions, resolve
from posthoc_ema import ConfigError
from reference_trainer.presets import preset


def test_data_brings_its_mapping_channels_and_classes():
    sixteen = ["network.img_resolution=16", "network.attn_resolutions=[8]"]
    options = TrainOptions(preset="digits-xs", data="photos-16", changes=sixteen)
    config = resolve(options)
    assert (config.network.img_channels, config.network.label_dim) == (3, 8)
    assert config.data == preset("photos-xs").data


def test_data_of_the_preset_changes_nothing():
    assert resolve(TrainOptions(preset="photos-xs", data="photos-16")) == preset("photos-xs")


def test_data_keeps_the_published_mapping_of_the_papers_presets():
    config = resolve(TrainOptions(preset="edm2-img64-xs", data="photos-64"))
    assert config.data.name == "photos-64"
    assert config.data.mean == (0.0,)
    assert config.network.label_dim == 8


def test_data_leaves_an_unconditional_network_unconditional():
    config = resolve(TrainOptions(preset="edm2-img64-xs-uncond", data="photos-64"))
    assert config.network.label_dim == 0


def test_set_wins_over_what_was_measured():
    options = TrainOptions(preset="photos-xs", data="photos-16", changes=["data.mean=0"])
    assert resolve(options).data.mean == (0.0,)


def test_data_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no-such"):
        resolve(TrainOptions(preset="digits-xs", data="no-such"))


def test_data_of_another_resolution_is_refused_before_anything_is_made():
    with pytest.raises(ConfigError, match=r"network\.img_resolution must be 16"):
        resolve(TrainOptions(preset="digits-xs", data="photos-16"))


def test_preset_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'edm2-img512-s'"):
        resolve(TrainOptions(preset="edm2-img512s"))
