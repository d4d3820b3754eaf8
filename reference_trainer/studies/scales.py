"""How large a study is: `tiny` (seconds, to see it work), `digits` (two cores), `gpu` (a serious size)."""

from __future__ import annotations

import dataclasses
import difflib

from posthoc_ema import ConfigError
from reference_trainer.config import OptimConfig, TrackConfig, TrainConfig
from reference_trainer.presets import PRESETS
from reference_trainer.studies.records import Scale


def _resized(
    base: TrainConfig,
    *,
    channels: int,
    batch: int,
    steps: int,
    snapshots: int,
    lr: float,
    t_ref: float,
    rampup: int,
) -> TrainConfig:
    """A run of the same data with another network, length and learning rate; `rampup` in steps."""
    every = steps // snapshots * batch
    return dataclasses.replace(
        base,
        network=dataclasses.replace(base.network, model_channels=channels),
        optim=OptimConfig(lr_ref=lr, t_ref=t_ref, rampup_images=rampup * batch),
        track=TrackConfig(snapshot_every=every),
        batch_size=batch,
        total_images=steps * batch,
        checkpoint_every=steps // 2 * batch,
        status_every=steps // 4 * batch,
    )


def tiny() -> Scale:
    """24 steps of a network of 8 channels: shows that everything works, and nothing else."""
    base = _resized(
        PRESETS["digits-xs"](),
        channels=8,
        batch=8,
        steps=24,
        snapshots=12,
        lr=0.05,
        t_ref=8.0,
        rampup=4,
    )
    return Scale(
        name="tiny",
        base=dataclasses.replace(base, name="study-tiny"),
        sigma_rels=(0.05, 0.1, 0.2),
        num_images=60,
        sampler_steps=2,
        batch_size=60,
        metric="fd-digits",
        cost="seconds; the numbers mean nothing",
    )


def digits() -> Scale:
    """512 steps of batch 16 of a network of 16 channels on the handwritten digits."""
    base = _resized(
        PRESETS["digits-xs"](),
        channels=16,
        batch=16,
        steps=512,
        snapshots=64,
        lr=0.05,
        t_ref=192.0,
        rampup=32,
    )
    return Scale(
        name="digits",
        base=dataclasses.replace(base, name="study-digits"),
        sigma_rels=(0.02, 0.04, 0.07, 0.11, 0.17, 0.25),
        num_images=1000,
        sampler_steps=8,
        batch_size=250,
        metric="fd-digits",
        cost="about 15 s of one core per run and 1.5 s per measurement",
    )


def gpu() -> Scale:
    """51 200 steps of batch 256 of 17 million parameters on 64x64 photographs: preset img64-laptop."""
    preset = PRESETS["img64-laptop"]()
    return Scale(
        name="gpu",
        base=dataclasses.replace(preset, name="study-gpu"),
        sigma_rels=(0.01, 0.015, 0.025, 0.04, 0.06, 0.08, 0.1, 0.13, 0.18, 0.25),
        num_images=10_000,
        sampler_steps=32,
        batch_size=512,
        metric="fid",
        cost="13 million images of 64x64 per run, for a GPU; never run here",
    )


SCALES = {"tiny": tiny, "digits": digits, "gpu": gpu}
"""Name on the command line to scale."""


def scale_named(name: str) -> Scale:
    """The scale of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCALES:
        near = difflib.get_close_matches(name, SCALES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"scale must be one of: {', '.join(SCALES)}; got {name!r}. Did you mean {near!r}?"
        )
    return SCALES[name]()
