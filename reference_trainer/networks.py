"""The U-Nets of EDM2, configs A to G.

`topology.plan_unet` decides the blocks as plain records; `UNet` only builds and connects what the plan
says. The configs share the plan: every choice of `NetworkConfig` is one decision in one of the modules
below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_trainer.config import NetworkConfig
from reference_trainer.layers import (
    SILU_MAGNITUDE,
    Conv,
    Fourier,
    GroupNorm,
    Init,
    Positional,
    Resampling,
    Weights,
    attend,
    mp_cat,
    mp_sum_shares,
    resample,
    rms_normalize,
)
from reference_trainer.topology import BlockPlan, plan_unet


@dataclass(frozen=True, slots=True)
class Parts:
    """Makes the layers that a configuration asks for, and knows the constants of its functions.

    Magnitude-preserving functions differ from plain ones by constant factors. These are moved into the
    gain of a convolution beside them: same function, fewer passes over memory.

    Attributes:
        config: the network's configuration.
    """

    config: NetworkConfig

    @property
    def magnitude_preserving(self) -> bool:
        """Whether fixed functions keep unit magnitude (config G)."""
        return self.config.functions == "magnitude-preserving"

    @property
    def silu_gain(self) -> float:
        """What undoes the shrinking by silu in the layer after it."""
        return 1 / SILU_MAGNITUDE if self.magnitude_preserving else 1.0

    def sum_shares(self, balance: float) -> tuple[float, float]:
        """Factors of main path and branch in a sum: those of `mp_sum`, or 1 and 1."""
        return mp_sum_shares(balance) if self.magnitude_preserving else (1.0, 1.0)

    def conv(self, in_channels: int, out_channels: int, kernel: int, *, last: bool = False) -> Conv:
        """A layer; `last` is where a residual branch or the network ends."""
        zero = last and self.config.init == "zero-residual"
        init: Init = "zero" if zero else "normal" if self.config.init == "normal" else "uniform"
        weights = cast(Weights, self.config.weights)
        bias = self.config.biases
        return Conv(in_channels, out_channels, kernel, weights=weights, init=init, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        """What precedes an activation: group normalisation, or nothing."""
        if self.config.norm == "pixel":
            return nn.Identity()
        return GroupNorm(channels, affine=self.config.norm == "group")

    def features(self, channels: int) -> nn.Module:
        """Features of the noise level."""
        if self.config.embedding == "positional":
            return Positional(channels)
        return Fourier(channels, math.sqrt(2) if self.magnitude_preserving else 1.0)


class ResidualBranch(nn.Module):
    """norm, silu, conv3x3, modulation by the embedding, silu, dropout, conv3x3 (EDM2 sections B.1, B.7).

    Args:
        in_channels: channels at the entry.
        out_channels: channels at the exit.
        config: the network's configuration.
        resampling: change of resolution inside the branch.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: NetworkConfig, resampling: Resampling
    ) -> None:
        super().__init__()
        parts = Parts(config)
        emb_channels = embedding_channels(config)
        self.dropout, self.resampling = config.dropout, resampling
        self.silu_gain, self.share = parts.silu_gain, parts.sum_shares(config.res_balance)[1]
        self.shifts = config.modulation == "scale-shift"
        self.norm0 = parts.norm(in_channels)
        self.conv0 = parts.conv(in_channels, out_channels, 3)
        self.norm1 = parts.norm(out_channels)
        self.emb = parts.conv(emb_channels, out_channels * (2 if self.shifts else 1), 0)
        self.emb_gain = nn.Parameter(torch.zeros(1)) if config.gains else None
        self.conv1 = parts.conv(out_channels, out_channels, 3, last=True)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`[n, in, h, w]` and `[n, emb]` to `[n, out, h', w']`, times its share in the sum."""
        y = resample(functional.silu(self.norm0(x)), self.resampling)
        y = self.norm1(self.conv0(y, gain=self.silu_gain))
        modulation = self.emb(emb, gain=1.0 if self.emb_gain is None else self.emb_gain)
        modulation = modulation[:, :, None, None]
        if self.shifts:
            scale, shift = modulation.chunk(2, dim=1)
            y = torch.addcmul(shift.to(y.dtype), y, (scale + 1).to(y.dtype))
        else:
            y = y * (modulation + 1).to(y.dtype)
        y = functional.silu(y)
        if self.dropout:
            y = functional.dropout(y, self.dropout, training=self.training)
        return self.conv1(y, gain=self.share * self.silu_gain)

    def fold(self, dtype: torch.dtype) -> None:
        """Store the weights that are applied; the embedding stays in float32."""
        self.conv0.fold(self.silu_gain, dtype)
        self.conv1.fold(self.share * self.silu_gain, dtype)
        self.emb.fold(1.0 if self.emb_gain is None else self.emb_gain)


class Block(nn.Module):
    """One residual block of encoder or decoder: branch beside the main path, attention, clamp.

    In the newer topology ("edm2") resampling and, in the encoder, the change of channels come first, on
    the main path; in the older one ("adm") the branch has its own resampling and the 1x1 convolution
    stands beside it.

    Args:
        plan: the block's record.
        config: the network's configuration.
        encoder: whether the block is one of the encoder's.
    """

    def __init__(self, plan: BlockPlan, config: NetworkConfig, *, encoder: bool) -> None:
        super().__init__()
        parts = Parts(config)
        early = config.block == "edm2"
        entry, out = plan.in_channels + plan.skip_channels, plan.out_channels
        self.takes_skip = plan.skip_channels > 0
        self.resampling: Resampling = plan.resampling
        self.resamples_first = early
        self.converts_first = early and encoder
        self.pixel_norm = config.norm == "pixel" and encoder
        self.concat_balance = config.concat_balance if parts.magnitude_preserving else None
        self.clip = config.clip_act
        self.share_x = parts.sum_shares(config.res_balance)[0]
        self.conv_skip = parts.conv(entry, out, 1) if entry != out else None
        branch_entry = out if self.converts_first else entry
        inside: Resampling = "keep" if early else plan.resampling
        self.branch = ResidualBranch(branch_entry, out, config, inside)
        self.attention = Attention(out, config) if plan.attention else None

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """`[n, in, h, w]`, `[n, emb]` and `[n, skip, h, w]` to `[n, out, h', w']`."""
        x = x if skip is None else self._joined(x, skip)
        if self.resamples_first:
            x = resample(x, self.resampling)
        if self.converts_first:
            x = self._converted(x)
        if self.pixel_norm:
            x = rms_normalize(x, dim=1)
        y = self.branch(x, emb)
        if not self.resamples_first:
            x = resample(x, self.resampling)
        if not self.converts_first:
            x = self._converted(x)
        x = torch.add(y, x, alpha=self.share_x)
        x = x if self.attention is None else self.attention(x)
        # hardtanh is clamp with a cheaper backward.
        return x if self.clip is None else functional.hardtanh(x, -self.clip, self.clip)

    def fold(self, dtype: torch.dtype) -> None:
        """Store the weights that are applied."""
        self.branch.fold(dtype)
        if self.conv_skip is not None:
            self.conv_skip.fold(dtype=dtype)
        if self.attention is not None:
            self.attention.fold(dtype)

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.concat_balance is None:
            return torch.cat([x, skip], dim=1)
        return mp_cat(x, skip, self.concat_balance)

    def _converted(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)


class Attention(nn.Module):
    """Self-attention with its residual sum (EDM2 sections B.1, B.3 and B.7).

    Args:
        channels: channels of the main path.
        config: the network's configuration.
    """

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        parts = Parts(config)
        self.cosine, self.in_float32 = config.attention == "cosine", config.attention_float32
        self.num_heads = max(1, channels // config.channels_per_head)
        self.share_x, self.share_y = parts.sum_shares(config.attn_balance)
        self.norm = nn.Identity() if self.cosine else parts.norm(channels)
        self.qkv = parts.conv(channels, 3 * channels, 1)
        self.proj = parts.conv(channels, channels, 1, last=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to the same shape."""
        qkv = self.qkv(self.norm(x))
        y = attend(qkv, self.num_heads, cosine=self.cosine, in_float32=self.in_float32)
        return torch.add(self.proj(y, gain=self.share_y), x, alpha=self.share_x)

    def fold(self, dtype: torch.dtype) -> None:
        """Store the weights that are applied."""
        self.qkv.fold(dtype=dtype)
        self.proj.fold(self.share_y, dtype)


def embedding_channels(config: NetworkConfig) -> int:
    """Channels of the embedding of noise level and label: 4 times the base channels."""
    return 4 * config.model_channels


class Embedding(nn.Module):
    """Noise level and label to one vector, in float32 (EDM2 sections B.1 and B.7).

    Args:
        config: the network's configuration.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        parts, channels = Parts(config), embedding_channels(config)
        self.features = parts.features(config.model_channels)
        self.noise = parts.conv(config.model_channels, channels, 0)
        self.noise1 = parts.conv(channels, channels, 0) if config.embedding_layers == 2 else None
        self.label = None
        if config.label_dim:
            # Configs A and B draw class embeddings from N(0, 1), whatever the other layers do.
            init: Init = "uniform" if config.init == "uniform" else "normal"
            weights = cast(Weights, config.weights)
            self.label = Conv(config.label_dim, channels, 0, weights=weights, init=init)
        self.label_scale = math.sqrt(config.label_dim) if config.scale_labels else 1.0
        self.shares = parts.sum_shares(config.label_balance)
        self.silu_gain = parts.silu_gain

    def forward(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """`[n]` and one-hot `[n, label_dim]` (ignored when unconditional) to float32 `[n, emb]`."""
        emb = self.noise(self.features(c_noise))
        if self.noise1 is not None:
            emb = self.noise1(functional.silu(emb), gain=self.silu_gain)
        if self.label is not None and labels is not None:
            share_noise, share_label = self.shares
            of_label = self.label(labels.to(torch.float32) * self.label_scale)
            # Not torch.add with its alpha: beside a linear layer, torch.compile loses it (torch 2.13).
            emb = emb * share_noise + of_label * share_label
        return functional.silu(emb) * self.silu_gain

    def fold(self) -> None:
        """Store the weights that are applied."""
        self.noise.fold()
        if self.noise1 is not None:
            self.noise1.fold(self.silu_gain)
        if self.label is not None:
            self.label.fold()


class UNet(nn.Module):
    """The network F of the preconditioning.

    Args:
        config: size, shape and kind.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        parts, plan = Parts(config), plan_unet(config)
        last = plan.decoder[-1].out_channels
        # The constant channel lets a network without biases make offsets (EDM2 B.3).
        self.constant_channel = not config.biases
        self.activates_output = config.block == "adm"
        self.silu_gain = parts.silu_gain if self.activates_output else 1.0
        self.embedding = Embedding(config)
        self.stem = parts.conv(config.img_channels + self.constant_channel, plan.stem_channels, 3)
        self.enc = nn.ModuleDict({p.name: Block(p, config, encoder=True) for p in plan.encoder})
        self.dec = nn.ModuleDict({p.name: Block(p, config, encoder=False) for p in plan.decoder})
        self.out_norm = parts.norm(last) if self.activates_output else nn.Identity()
        self.out = parts.conv(last, config.img_channels, 3, last=True)
        self.out_gain = nn.Parameter(torch.zeros(1)) if config.gains else None

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
        if self.constant_channel:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        # Reductions over channels are some 10 times faster in this memory format, convolutions too.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for encoder in self.enc.values():
            x = encoder(x, emb)
            skips.append(x)
        for decoder in self.dec.values():
            x = decoder(x, emb, skips.pop() if decoder.takes_skip else None)
        if self.activates_output:
            x = functional.silu(self.out_norm(x))
        gain = self.silu_gain if self.out_gain is None else self.out_gain * self.silu_gain
        return self.out(x, gain=gain)

    def fold(self, dtype: torch.dtype) -> None:
        """Store the weights that are applied; those of convolutions in `dtype`."""
        self.embedding.fold()
        self.stem.fold(dtype=dtype)
        for block in (*self.enc.values(), *self.dec.values()):
            cast(Block, block).fold(dtype)
        gain = self.silu_gain if self.out_gain is None else self.out_gain * self.silu_gain
        self.out.fold(gain, dtype)
