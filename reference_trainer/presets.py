"""Ready-made configurations, each a function whose docstring says what it costs and what it gives."""

from __future__ import annotations

from collections.abc import Callable

from reference_trainer.config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)

DIGITS = DataConfig(name="digits", mean=(-0.38938256298624063,), scale=(0.5 / 0.7517718239306926,))
"""scikit-learn's digits; mean and standard deviation of pixel / 127.5 - 1 over all 1797 images."""


def _digits_network(
    *, model_channels: int, num_blocks: int, channels_per_head: int = 64
) -> NetworkConfig:
    """Two levels, 8x8 and 4x4, with attention at the coarser one."""
    return NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=model_channels,
        channel_mult=(1, 2),
        num_blocks=num_blocks,
        attn_resolutions=(4,),
        channels_per_head=channels_per_head,
        clip_act=None,  # it guards float16, and costs time in float32
    )


def digits_xs() -> TrainConfig:
    """The demo: 0.76 million parameters, 2048 steps of batch 64, 32 snapshots of 0.05 and 0.10.

    About three minutes on two CPU cores. Frechet distance of 1000 images at 12 steps, three seeds:
    0.19 to 0.23 at the best length, 0.56 to 0.62 with the raw weights (docs/benchmarks/demo.md).
    """
    batch = 64
    return TrainConfig(
        name="digits-xs",
        network=_digits_network(model_channels=32, num_blocks=1),
        # A high learning rate: the raw weights are noisy, so that the averaging length matters.
        optim=OptimConfig(lr_ref=0.05, t_ref=667.0, rampup_images=100 * batch),
        loss=LossConfig(p_mean=-0.4, p_std=1.0),
        data=DIGITS,
        track=TrackConfig(snapshot_every=64 * batch),
        batch_size=batch,
        total_images=2048 * batch,
        checkpoint_every=512 * batch,
        status_every=64 * batch,
    )


def digits_s() -> TrainConfig:
    """Larger and longer: 2.37 million parameters, 10 000 steps of batch 64, 50 snapshots.

    Its first 50 steps ran at 193 images/s on one CPU thread, which makes about an hour in all; what
    it reaches has not been measured.
    """
    batch = 64
    return TrainConfig(
        name="digits-s",
        network=_digits_network(model_channels=48, num_blocks=2, channels_per_head=48),
        optim=OptimConfig(lr_ref=0.01, t_ref=2000.0, rampup_images=100 * batch),
        loss=LossConfig(p_mean=-0.4, p_std=1.0),
        data=DIGITS,
        track=TrackConfig(snapshot_every=200 * batch),
        batch_size=batch,
        total_images=10_000 * batch,
        checkpoint_every=1000 * batch,
        status_every=100 * batch,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits-xs": digits_xs,
    "digits-s": digits_s,
}
"""Name on the command line to configuration."""
