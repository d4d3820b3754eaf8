"""Presets: the rows of the paper's tables (arXiv 2312.02696, tables 1 and 6)."""

from __future__ import annotations

import pytest

from posthoc_ema import ConfigError
from reference_trainer.config import CONFIGS
from reference_trainer.presets import PRESETS, preset, with_config

MI = 2**20
TABLE_6 = {  # preset: alpha_ref, dropout, Mi images
    "edm2-img512-xxs": (0.0170, 0.0, 2048),
    "edm2-img512-xs": (0.0120, 0.0, 2048),
    "edm2-img512-s": (0.0100, 0.0, 2048),
    "edm2-img512-m": (0.0090, 0.1, 2048),
    "edm2-img512-l": (0.0080, 0.1, 1792),
    "edm2-img512-xl": (0.0070, 0.1, 1280),
    "edm2-img512-xxl": (0.0065, 0.1, 896),
    "edm2-img64-xs": (0.0120, 0.0, 1024),
    "edm2-img64-s": (0.0100, 0.0, 1024),
    "edm2-img64-m": (0.0090, 0.1, 2048),
    "edm2-img64-l": (0.0080, 0.1, 1024),
    "edm2-img64-xl": (0.0070, 0.1, 640),
}
TABLE_1 = {  # config: batch, alpha_ref, t_ref, P_mean, P_std, beta2, loss scale, dropout
    "A": (4096, 1e-4, None, -1.2, 1.2, 0.999, 100, 0.1),
    "B": (2048, 2e-4, None, -0.4, 1.0, 0.99, 100, 0.1),
    "C": (2048, 2e-4, None, -0.4, 1.0, 0.99, 100, 0.1),
    "D": (2048, 1e-2, None, -0.4, 1.0, 0.99, 1, 0.1),
    "E": (2048, 1e-2, 70_000, -0.4, 1.0, 0.99, 1, 0.1),
    "F": (2048, 1e-2, 70_000, -0.4, 1.0, 0.99, 1, 0.1),
    "G": (2048, 1e-2, 70_000, -0.4, 1.0, 0.99, 1, 0.0),
}


@pytest.mark.parametrize("suffix", ["", "-uncond"])
@pytest.mark.parametrize("name", TABLE_6)
def test_presets_are_the_rows_of_table_6(name, suffix):
    config, latents = preset(name + suffix), "img512" in name
    assert config.name == name + suffix
    assert config.network.label_dim == (0 if suffix else 1000)
    assert (config.network.img_resolution, config.network.img_channels) == (64, 4 if latents else 3)
    row = (config.optim.lr_ref, config.network.dropout, config.total_images / MI)
    assert row == TABLE_6[name]
    assert config.optim.t_ref == (70_000 if latents else 35_000)
    noise = (config.loss.p_mean, config.loss.p_std)
    assert noise == ((-0.4, 1.0) if latents else (-0.8, 1.6))
    assert (config.batch_size, config.optim.rampup_images) == (2048, 10_000_000)
    assert (config.track.snapshot_every, config.checkpoint_every) == (8 * MI, 128 * MI)


def test_presets_of_edm2_are_those_of_table_6_and_no_others():
    names = {name.removesuffix("-uncond") for name in PRESETS if name.startswith("edm2-")}
    assert names == set(TABLE_6)


@pytest.mark.parametrize("letter", TABLE_1)
def test_configs_are_trained_as_in_table_1(letter):
    config = with_config(preset("edm2-img512-s"), letter)
    optim, loss = config.optim, config.loss
    row = (config.batch_size, optim.lr_ref, optim.t_ref, loss.p_mean, loss.p_std, optim.beta2)
    assert (*row, optim.loss_scale, config.network.dropout) == pytest.approx(TABLE_1[letter])
    assert loss.weighting == ("static" if letter == "A" else "uncertainty")
    assert config.total_images == 2**31


@pytest.mark.parametrize("name", PRESETS)
def test_configs_compose_with_every_preset(name):
    for letter in CONFIGS:
        config = with_config(preset(name), letter)
        assert type(config).from_json(config.to_json()) == config


def test_presets_and_configs_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'edm2-img512-xs'"):
        preset("edm2-img512-xss")
    with pytest.raises(ConfigError, match="one of A, B, C, D, E, F, G, got 'H'"):
        with_config(preset("digits-xs"), "H")
