"""What `phema train --data` makes of a preset."""

import pytest

from phema.train_config import TrainOptions, resolve
from posthoc_ema import ConfigError
from reference_trainer.presets import preset


def test_data_brings_its_mapping_channels_and_classes():
    config = resolve(TrainOptions(preset="digits-xs", data="photos-16"))
    assert (config.network.img_channels, config.network.label_dim) == (3, 8)
    assert config.data == preset("photos-xs").data


def test_data_of_the_preset_changes_nothing():
    assert resolve(TrainOptions(preset="photos-xs", data="photos-16")) == preset("photos-xs")


def test_data_keeps_the_published_mapping_of_the_papers_presets():
    config = resolve(TrainOptions(preset="edm2-img64-xs", data="photos-64"))
    assert config.data.mean == (0.0,)
    assert config.network.label_dim == 8


def test_data_leaves_an_unconditional_network_unconditional():
    config = resolve(TrainOptions(preset="edm2-img64-xs-uncond", data="photos-64"))
    assert config.network.label_dim == 0


def test_set_wins_over_what_was_measured():
    options = TrainOptions(preset="digits-xs", data="photos-16", changes=["data.mean=0"])
    assert resolve(options).data.mean == (0.0,)


def test_data_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no-such"):
        resolve(TrainOptions(preset="digits-xs", data="no-such"))
