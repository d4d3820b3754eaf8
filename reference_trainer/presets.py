"""Ready-made configurations: small ones that run here, and every row of the EDM2 paper's tables.

`PRESETS` maps names to functions that make them; `with_config` turns any of them into another config
of the paper (table 1). What a preset costs and gives stands in its docstring, or in `PAPER_RESULTS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

from posthoc_ema import ConfigError
from reference_trainer.config import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
    network_of_config,
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


PHOTOS_16 = DataConfig(
    name="photos-16",
    mean=(-0.15816326772186154, -0.30637160503405914, -0.3823337710084036),
    scale=(0.7905896876055372, 0.9825398119994295, 0.9760970625580109),
)
"""16x16 patches of eight photographs that scikit-image and scikit-learn carry (`data.photos`)."""

PHOTOS_64 = DataConfig(
    name="photos-64",
    mean=(-0.1343568850969789, -0.3058992115243476, -0.385280618793757),
    scale=(0.7903448712242889, 0.9904209530400485, 0.985833305759053),
)
"""64x64 patches of the same photographs."""


def photos_xs() -> TrainConfig:
    """16x16 RGB patches of photographs: 0.76 million parameters, 4096 steps of batch 64.

    Small enough for a CPU. The rate and the noise levels are those of digits-xs and of the paper's
    ImageNet-64; what it reaches has not been measured.
    """
    batch = 64
    return TrainConfig(
        name="photos-xs",
        network=NetworkConfig(
            img_resolution=16,
            img_channels=3,
            label_dim=8,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            clip_act=None,
        ),
        optim=OptimConfig(lr_ref=0.02, t_ref=1000.0, rampup_images=100 * batch),
        loss=LossConfig(p_mean=-0.8, p_std=1.6),
        data=PHOTOS_16,
        track=TrackConfig(snapshot_every=128 * batch),
        batch_size=batch,
        total_images=4096 * batch,
        checkpoint_every=1024 * batch,
        status_every=64 * batch,
    )


def img64_laptop() -> TrainConfig:
    """64x64 RGB on a laptop's GPU: 17.2 million parameters, 51 200 steps of batch 256, bfloat16.

    Trains on the built-in photographs; `--data` takes your own images. By count (`phema train --dry-run`)
    it needs 0.4 GB for weights, moments and averages and 1.4 GB for the activations of a microbatch of
    32. Never trained in full: no GPU was at hand.
    """
    batch = 256
    return TrainConfig(
        name="img64-laptop",
        network=NetworkConfig(
            img_resolution=64,
            img_channels=3,
            label_dim=8,
            model_channels=64,
            num_blocks=1,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr_ref=0.01, t_ref=10_000.0, rampup_images=1000 * batch),
        loss=LossConfig(p_mean=-0.8, p_std=1.6),
        data=PHOTOS_64,
        compute=ComputeConfig(microbatch=32),
        track=TrackConfig(snapshot_every=800 * batch),
        batch_size=batch,
        total_images=51_200 * batch,
        checkpoint_every=3200 * batch,
        status_every=100 * batch,
        telemetry_every=1600 * batch,
    )


MI = 2**20
"""The paper counts training lengths in units of 2^20 images."""


@dataclass(frozen=True, slots=True)
class PaperSize:
    """A size of the paper's networks with what it is trained with (EDM2 table 6).

    Attributes:
        model_channels: base channels.
        lr_ref: alpha_ref.
        dropout: of config G.
        mi_images: length of training in units of 2^20 images.
    """

    model_channels: int
    lr_ref: float
    dropout: float
    mi_images: int


IMG512_SIZES = {
    "xxs": PaperSize(64, 0.0170, 0.0, 2048),
    "xs": PaperSize(128, 0.0120, 0.0, 2048),
    "s": PaperSize(192, 0.0100, 0.0, 2048),
    "m": PaperSize(256, 0.0090, 0.1, 2048),
    "l": PaperSize(320, 0.0080, 0.1, 1792),
    "xl": PaperSize(384, 0.0070, 0.1, 1280),
    "xxl": PaperSize(448, 0.0065, 0.1, 896),
}
"""ImageNet-512 as 64x64x4 latents."""

IMG64_SIZES = {
    "xs": PaperSize(128, 0.0120, 0.0, 1024),
    "s": PaperSize(192, 0.0100, 0.0, 1024),
    "m": PaperSize(256, 0.0090, 0.1, 2048),
    "l": PaperSize(320, 0.0080, 0.1, 1024),
    "xl": PaperSize(384, 0.0070, 0.1, 640),
}
"""ImageNet-64, RGB."""

IMG512_LATENTS = DataConfig(
    name="imagenet-512-latents",
    kind="latents",
    mean=(5.81, 3.25, 0.12, -2.15),
    scale=(0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28),
)
"""Mean and standard deviation of the latents of sd-vae-ft-mse fed with pixels in 0..1 (EDM2 B.1)."""

IMG64_PIXELS = DataConfig(name="imagenet-64")
"""RGB as pixel / 127.5 - 1, without further standardisation (EDM2 B.1)."""


def _edm2(name: str, size: PaperSize, *, latents: bool, conditional: bool) -> TrainConfig:
    """A row of table 6: batch 2048, snapshots every 8 Mi images, of our default lengths."""
    network = NetworkConfig(
        img_resolution=64,
        img_channels=4 if latents else 3,
        label_dim=1000 if conditional else 0,
        model_channels=size.model_channels,
        dropout=size.dropout,
        dtype="float16",
    )
    return TrainConfig(
        name=name,
        network=network,
        optim=OptimConfig(lr_ref=size.lr_ref, t_ref=70_000.0 if latents else 35_000.0),
        loss=LossConfig(p_mean=-0.4, p_std=1.0) if latents else LossConfig(p_mean=-0.8, p_std=1.6),
        data=IMG512_LATENTS if latents else IMG64_PIXELS,
        track=TrackConfig(snapshot_every=8 * MI),
        batch_size=2048,
        total_images=size.mi_images * MI,
        checkpoint_every=128 * MI,
        status_every=MI // 8,
        telemetry_every=MI,
    )


def _edm2_presets() -> dict[str, Callable[[], TrainConfig]]:
    presets: dict[str, Callable[[], TrainConfig]] = {}
    for family, sizes in (("img512", IMG512_SIZES), ("img64", IMG64_SIZES)):
        for label, size in sizes.items():
            for suffix, conditional in (("", True), ("-uncond", False)):
                name = f"edm2-{family}-{label}{suffix}"
                latents = family == "img512"
                presets[name] = functools.partial(
                    _edm2, name, size, latents=latents, conditional=conditional
                )
    return presets


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits-xs": digits_xs,
    "digits-s": digits_s,
    "photos-xs": photos_xs,
    "img64-laptop": img64_laptop,
    **_edm2_presets(),
}
"""Name on the command line to configuration."""


PAPER_RESULTS: dict[str, tuple[float, float]] = {
    "edm2-img512-xs": (3.53, 0.135),
    "edm2-img512-s": (2.56, 0.130),
    "edm2-img512-m": (2.25, 0.100),
    "edm2-img512-l": (2.06, 0.085),
    "edm2-img512-xl": (1.96, 0.085),
    "edm2-img512-xxl": (1.91, 0.070),
    "edm2-img512-s-uncond": (11.67, 0.145),
    "edm2-img64-s": (1.58, 0.075),
    "edm2-img64-m": (1.43, 0.060),
    "edm2-img64-l": (1.33, 0.040),
    "edm2-img64-xl": (1.33, 0.040),
}
"""Preset to the paper's FID without guidance and the sigma_rel that gave it (EDM2 tables 2, 3 and 6;
autoguidance, table 1). Not measured by this project."""


def preset(name: str) -> TrainConfig:
    """The configuration of a name.

    Raises:
        ConfigError: there is no such preset.

    Example:
        >>> preset("edm2-img512-xs").network.model_channels
        128
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        known = ", ".join(n for n in PRESETS if not n.startswith("edm2-"))
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {known}, edm2-img512-s ..."
        raise ConfigError(f"there is no preset {name!r}. {hint}")
    return PRESETS[name]()


def with_config(config: TrainConfig, letter: str) -> TrainConfig:
    """A preset as config A, B, ... G of the paper: network, loss, learning rate, batch (EDM2 table 1).

    What the paper changes with the config is changed here in the same proportion: the learning rate is
    that of config G times 0.01 (A) or 0.02 (B, C) and decays only from E on, the batch is doubled in A,
    whose noise levels are those of EDM, the loss is scaled by 100 up to C, dropout is 10 % up to F.
    Averages are tracked alike in all; the paper's config A has one exponential average instead.

    Args:
        config: a preset, as config G.
        letter: "A" to "G"; "G" gives `config` itself.

    Raises:
        ConfigError: there is no such config.

    Example:
        >>> with_config(preset("edm2-img512-s"), "C").optim.lr_ref
        0.0002
    """
    network = network_of_config(config.network, letter)
    if letter == "G":
        return config
    optim, loss = config.optim, config.loss
    factor = {"A": 0.01, "B": 0.02, "C": 0.02}.get(letter, 1.0)
    optim = dataclasses.replace(
        optim,
        lr_ref=optim.lr_ref * factor,
        t_ref=optim.t_ref if letter in "EF" else None,
        beta2=0.999 if letter == "A" else optim.beta2,
        loss_scale=100.0 if letter in "ABC" else optim.loss_scale,
    )
    if letter == "A":
        # The noise levels of EDM, which are the same for every data set.
        loss = LossConfig(p_mean=-1.2, p_std=1.2, weighting="static")
    return dataclasses.replace(
        config,
        name=f"{config.name}-config-{letter.lower()}",
        network=dataclasses.replace(network, dropout=0.1),
        optim=optim,
        loss=loss,
        batch_size=config.batch_size * (2 if letter == "A" else 1),
    )
