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

DIGITS = DataConfig(name="digits", mean=-0.38938256298624063, scale=0.5 / 0.7517718239306926)
"""scikit-learn's digits; mean and standard deviation of pixel / 127.5 - 1 over all 1797 images."""


def digits_xs() -> TrainConfig:
    """The demo: a small network on handwritten digits, 8x8 pixels, 10 classes."""
    steps, batch = 3000, 64
    return TrainConfig(
        name="digits-xs",
        network=NetworkConfig(
            img_resolution=8,
            img_channels=1,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            clip_act=None,
        ),
        optim=OptimConfig(lr_ref=0.01, t_ref=1000.0, rampup_images=100 * batch),
        loss=LossConfig(p_mean=-0.4, p_std=1.0),
        data=DIGITS,
        track=TrackConfig(snapshot_every=steps * batch // 32 // batch * batch),
        batch_size=batch,
        total_images=steps * batch,
        checkpoint_every=500 * batch,
        status_every=50 * batch,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits-xs": digits_xs,
}
"""Name on the command line to configuration."""
