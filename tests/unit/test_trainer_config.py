"""Configuration records: validation, JSON, what an error says."""

import dataclasses

import pytest

from posthoc_ema import ConfigError
from reference_trainer.config import NetworkConfig, TrackConfig, TrainConfig, differing_fields
from reference_trainer.presets import PRESETS


@pytest.fixture
def config():
    return PRESETS["digits-xs"]()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json_and_carries_its_name(name):
    preset = PRESETS[name]()
    assert TrainConfig.from_json(preset.to_json()) == preset
    assert preset.name == name
    assert PRESETS[name].__doc__


def test_demo_preset_has_thirty_two_snapshots_of_two_averages(config):
    every, total = config.track.snapshot_every, config.total_images
    assert len({*range(every, total, every), total}) == 32
    assert config.track.sigma_rels == (0.04, 0.15)
    assert config.total_images == 2048 * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sead": 1}, "sead is no field of TrainConfig. Did you mean seed?"),
        ({"zzz": 1}, "zzz is no field of TrainConfig. Known: network"),
        ({"optim": {"lr_reff": 0.1}}, "optim.lr_reff is no field.*optim.lr_ref?"),
        ({"seed": 1.5}, "seed must be of type int, got 1.5"),
        ({"seed": True}, "seed must be of type int"),
        ({"optim": {"lr_ref": "0.1"}}, "optim.lr_ref must be a finite number"),
        ({"optim": {"lr_ref": float("nan")}}, "optim.lr_ref must be a finite number"),
        ({"optim": []}, "optim must be an object"),
        ({"track": {}}, "track.snapshot_every is missing"),
        ({"track": {"snapshot_every": 64, "sigma_rels": "x"}}, "track.sigma_rels must be a list"),
    ],
)
def test_bad_values_are_errors_that_name_the_field(config, change, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict({**config.to_dict(), **change})


def test_text_that_is_no_json_object_is_refused():
    for text in ("{", "[]", "3"):
        with pytest.raises(ConfigError, match="JSON"):
            TrainConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "total_images",
            100,
            "total_images must be a positive multiple of batch_size = 64.*Try 64",
        ),
        ("status_every", 0, "status_every must be a positive multiple"),
        ("checkpoint_every", -64, "checkpoint_every must be a positive multiple"),
        (
            "track",
            TrackConfig(snapshot_every=65),
            "track.snapshot_every must be a positive multiple",
        ),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("seed", -1, "seed must not be negative"),
    ],
)
def test_run_lengths_must_be_multiples_of_the_batch(config, field, value, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, **{field: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"img_resolution": 12}, "power of two"),
        ({"img_resolution": 1}, "at least 2, because channel_mult has 2 levels"),
        ({"attn_resolutions": (16,)}, "levels of the network, which are 8, 4"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"model_channels": 100, "channels_per_head": 64, "channel_mult": (1, 2)}, "equal heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"res_balance": 1.5}, "res_balance"),
        ({"clip_act": 0.0}, "clip_act"),
        ({"dtype": "float64"}, "dtype"),
        ({"label_dim": -1}, "label_dim"),
    ],
)
def test_network_config_refuses_what_cannot_be_built(values, words):
    base = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "channel_mult": (1, 2)}
    with pytest.raises(ConfigError, match=words):
        NetworkConfig(**{**base, "attn_resolutions": (), **values})


@pytest.mark.parametrize("sigma_rels", [(), (0.0,), (0.3,), (float("nan"),), (0.1, 0.1)])
def test_track_config_refuses_impossible_widths(sigma_rels):
    with pytest.raises(ConfigError, match="sigma_rels"):
        TrackConfig(snapshot_every=64, sigma_rels=sigma_rels)


def test_differing_fields_are_dotted_names_with_both_values(config):
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr_ref=0.02))
    assert differing_fields(config, other) == ["optim.lr_ref (0.05 and 0.02)"]
    assert differing_fields(config, config) == []
