"""The U-Net of EDM2, config G, for any power-of-two resolution.

`plan_unet` decides the topology as plain records, one per block; `UNet` only builds and connects what
the plan says. The other configurations of the paper (A to F) share the plan and differ in the modules
that a record is turned into.

Encoder, per level: one block that halves the resolution (not at the finest level), then `num_blocks`
blocks. Decoder, per level from the coarsest: two blocks at the coarsest level, or one block that doubles
the resolution; then `num_blocks + 1` blocks that each take one skip connection. Every encoder output,
that of the input convolution included, is one skip connection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_trainer.config import NetworkConfig
from reference_trainer.layers import (
    SILU_MAGNITUDE,
    CosineAttention,
    MPConv,
    MPFourier,
    Resampling,
    mp_cat,
    mp_silu,
    mp_sum,
    mp_sum_shares,
    resample,
    rms_normalize,
)


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


class ResidualBranch(nn.Module):
    """conv3x3(mp_silu(x)), modulated by the embedding, mp_silu, dropout, conv3x3 (EDM2 section B.7).

    Constant factors of activations (that of mp_silu, the branch's share in the sum that follows) are
    moved into the gain of a convolution beside them: same function, fewer passes over memory.

    Args:
        in_channels: channels at the entry.
        out_channels: channels at the exit.
        emb_channels: channels of the embedding.
        dropout: probability of dropping an activation.
        share: factor of the output.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, dropout: float, share: float
    ) -> None:
        super().__init__()
        self.dropout, self.share = dropout, share
        self.conv0 = MPConv(in_channels, out_channels, kernel=3)
        self.emb = MPConv(emb_channels, out_channels, kernel=0)
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv1 = MPConv(out_channels, out_channels, kernel=3)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`[n, in, h, w]` and `[n, emb]` to `[n, out, h, w]`."""
        y = self.conv0(functional.silu(x), gain=1 / SILU_MAGNITUDE)
        modulation = self.emb(emb, gain=self.emb_gain) + 1
        y = functional.silu(y * modulation[:, :, None, None].to(y.dtype))
        if self.dropout:
            y = functional.dropout(y, self.dropout, training=self.training)
        return self.conv1(y, gain=self.share / SILU_MAGNITUDE)


class Block(nn.Module):
    """What the two kinds of block share: branch, 1x1 convolution, attention, clamp.

    Args:
        plan: the block's record.
        branch_channels: channels at the entry of the residual branch.
        config: the network's configuration.
    """

    def __init__(self, plan: BlockPlan, branch_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        self.resampling: Resampling = plan.resampling
        self.clip = config.clip_act
        self.share_x, share_y = mp_sum_shares(config.res_balance)
        entry, out = plan.in_channels + plan.skip_channels, plan.out_channels
        emb_channels = embedding_channels(config)
        self.conv_skip = MPConv(entry, out, kernel=1) if entry != out else nn.Identity()
        self.branch = ResidualBranch(branch_channels, out, emb_channels, config.dropout, share_y)
        heads = max(1, out // config.channels_per_head)
        self.attention = (
            CosineAttention(out, heads, config.attn_balance) if plan.attention else nn.Identity()
        )

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch `y`, which has its share already, to the main path `x`; attend, clamp."""
        x = self.attention(torch.add(y, x, alpha=self.share_x))  # mp_sum
        # hardtanh is clamp with a cheaper backward.
        return x if self.clip is None else functional.hardtanh(x, -self.clip, self.clip)


class EncoderBlock(Block):
    """Block of the encoder: resample, change channels, pixel norm, then branch (EDM2 B.6, B.7)."""

    def __init__(self, plan: BlockPlan, config: NetworkConfig) -> None:
        super().__init__(plan, plan.out_channels, config)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`[n, in, h, w]` and `[n, emb]` to `[n, out, h', w']`."""
        x = rms_normalize(self.conv_skip(resample(x, self.resampling)), dim=1)
        return self.finish(x, self.branch(x, emb))


class DecoderBlock(Block):
    """Block of the decoder: take the skip connection, resample, branch, change channels."""

    def __init__(self, plan: BlockPlan, config: NetworkConfig) -> None:
        super().__init__(plan, plan.in_channels + plan.skip_channels, config)
        self.concat_balance = config.concat_balance
        self.takes_skip = plan.skip_channels > 0

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
        """`[n, in, h, w]`, `[n, emb]` and `[n, skip, h, w]` to `[n, out, h', w']`."""
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        x = resample(x, self.resampling)
        return self.finish(self.conv_skip(x), self.branch(x, emb))


def embedding_channels(config: NetworkConfig) -> int:
    """Channels of the embedding of noise level and label: 4 times the base channels."""
    return 4 * config.model_channels


class Embedding(nn.Module):
    """Noise level and label to one vector (EDM2 section B.7).

    Args:
        config: the network's configuration.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels = embedding_channels(config)
        self.label_dim, self.balance = config.label_dim, config.label_balance
        self.fourier = MPFourier(config.model_channels)
        self.noise = MPConv(config.model_channels, channels, kernel=0)
        self.label = MPConv(config.label_dim, channels, kernel=0) if config.label_dim else None

    def forward(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """`[n]` and one-hot `[n, label_dim]` (ignored when unconditional) to float32 `[n, emb]`."""
        emb = self.noise(self.fourier(c_noise))
        if self.label is not None and labels is not None:
            scaled = labels.to(torch.float32) * math.sqrt(self.label_dim)
            emb = mp_sum(emb, self.label(scaled), self.balance)
        return mp_silu(emb)


class UNet(nn.Module):
    """The network F of the preconditioning, config G.

    Args:
        config: size and shape.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        plan = plan_unet(config)
        self.embedding = Embedding(config)
        self.stem = MPConv(config.img_channels + 1, plan.stem_channels, kernel=3)
        self.enc = nn.ModuleDict({p.name: EncoderBlock(p, config) for p in plan.encoder})
        self.dec = nn.ModuleDict({p.name: DecoderBlock(p, config) for p in plan.decoder})
        self.out = MPConv(plan.decoder[-1].out_channels, config.img_channels, kernel=3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Apply F.

        Args:
            x: scaled noisy images, `[n, c, h, w]`, in the dtype of the activations.
            c_noise: noise conditions, `[n]`.
            labels: one-hot `[n, label_dim]`, or None for an unconditional network.

        Returns:
            `[n, c, h, w]`, dtype of `x`.
        """
        emb = self.embedding(c_noise, labels)
        # The constant channel lets a network without biases make offsets (EDM2 B.3).
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        # Reductions over channels are some 10 times faster in this memory format, convolutions too.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for encoder in self.enc.values():
            x = encoder(x, emb)
            skips.append(x)
        for decoder in self.dec.values():
            x = decoder(x, emb, skips.pop() if decoder.takes_skip else None)
        return self.out(x, gain=self.out_gain)
