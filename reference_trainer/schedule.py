"""The learning rate as a function of the images seen (EDM2 eq. 67)."""

from __future__ import annotations

import math

from reference_trainer.config import OptimConfig


def learning_rate(nimg: int, batch_size: int, config: OptimConfig) -> float:
    """alpha_ref / sqrt(max(t / t_ref, 1)) * min(nimg / rampup_images, 1) with t = nimg / batch_size.

    `nimg` is counted before the step, so with a ramp-up the first step has learning rate 0.

    Args:
        nimg: images seen before the step.
        batch_size: images per step.
        config: the optimizer's configuration.

    Example:
        >>> config = OptimConfig(lr_ref=0.01, t_ref=100.0, rampup_images=640)
        >>> [round(learning_rate(n * 64, 64, config), 4) for n in (0, 5, 10, 100, 400)]
        [0.0, 0.005, 0.01, 0.01, 0.005]
    """
    rate = config.lr_ref
    if config.t_ref is not None:
        rate /= math.sqrt(max(nimg / batch_size / config.t_ref, 1.0))
    if config.rampup_images:
        rate *= min(nimg / config.rampup_images, 1.0)
    return rate
