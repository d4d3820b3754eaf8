"""The topology of the U-Net as plain records (EDM2 section B.1), for any power-of-two resolution.

Encoder, per level: one block that halves the resolution (not at the finest level), then `num_blocks`
blocks. Decoder, per level from the coarsest: two blocks at the coarsest level, or one block that doubles
the resolution; then `num_blocks + 1` blocks that each take one skip connection. Every encoder output,
that of the input convolution included, is one skip connection.
"""

from __future__ import annotations

from dataclasses import dataclass

from reference_trainer.config import NetworkConfig
from reference_trainer.layers import Resampling


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """One residual block: what it takes, what it gives, whether it attends.

    Attributes:
        name: unique within its side, such as `r8_block0`; part of the weights' names.
        in_channels: channels of the main path at the entry, the skip connection not counted.
        skip_channels: channels of the skip connection, 0 when the block takes none.
        out_channels: channels at the exit.
        resampling: change of resolution at the entry.
        attention: whether self-attention follows the residual branch.
    """

    name: str
    in_channels: int
    skip_channels: int
    out_channels: int
    resampling: Resampling
    attention: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetPlan:
    """The whole topology: channels of the input convolution, encoder blocks, decoder blocks."""

    stem_channels: int
    encoder: tuple[BlockPlan, ...]
    decoder: tuple[BlockPlan, ...]


def plan_unet(config: NetworkConfig) -> UNetPlan:
    """Decide the blocks of the U-Net (EDM2 section B.1 with the attention of config B and later).

    Example:
        >>> config = NetworkConfig(img_resolution=8, img_channels=1, label_dim=10, model_channels=32,
        ...     channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
        >>> [block.name for block in plan_unet(config).encoder]
        ['r8_block0', 'r4_down', 'r4_block0']
    """
    stem = config.model_channels * config.channel_mult[0]
    encoder = _plan_encoder(config, stem)
    skips = [stem, *(block.out_channels for block in encoder)]
    return UNetPlan(stem_channels=stem, encoder=encoder, decoder=_plan_decoder(config, skips))


def _plan_encoder(config: NetworkConfig, channels: int) -> tuple[BlockPlan, ...]:
    blocks: list[BlockPlan] = []

    def add(name: str, out: int, resampling: Resampling, attention: bool) -> None:
        nonlocal channels
        blocks.append(
            BlockPlan(
                name=name,
                in_channels=channels,
                skip_channels=0,
                out_channels=out,
                resampling=resampling,
                attention=attention,
            )
        )
        channels = out

    for level, resolution in enumerate(config.resolutions):
        attends = resolution in config.attn_resolutions
        if level > 0:
            add(f"r{resolution}_down", channels, "down", False)
        for i in range(config.num_blocks):
            out = config.model_channels * config.channel_mult[level]
            add(f"r{resolution}_block{i}", out, "keep", attends)
    return tuple(blocks)


def _plan_decoder(config: NetworkConfig, skips: list[int]) -> tuple[BlockPlan, ...]:
    blocks: list[BlockPlan] = []
    channels = skips[-1]

    def add(name: str, skip: int, out: int, resampling: Resampling, attention: bool) -> None:
        nonlocal channels
        blocks.append(
            BlockPlan(
                name=name,
                in_channels=channels,
                skip_channels=skip,
                out_channels=out,
                resampling=resampling,
                attention=attention,
            )
        )
        channels = out

    for level, resolution in reversed(list(enumerate(config.resolutions))):
        attends = resolution in config.attn_resolutions
        if level == len(config.resolutions) - 1:
            add(f"r{resolution}_in0", 0, channels, "keep", True)
            add(f"r{resolution}_in1", 0, channels, "keep", False)
        else:
            add(f"r{resolution}_up", 0, channels, "up", False)
        for i in range(config.num_blocks + 1):
            out = config.model_channels * config.channel_mult[level]
            add(f"r{resolution}_block{i}", skips.pop(), out, "keep", attends)
    return tuple(blocks)
