"""Config G of EDM2 as its formulas read: what the reference trainer's speed is measured against.

Written from the equations of arXiv 2312.02696 (sections 2.3 and B.7) as directly as possible, in plain
autograd operations: every layer normalises its weight in every forward pass, constant factors multiply
activations where the formulas have them, attention is two einsums and a softmax, memory is contiguous,
and weights are float32 and cast layer by layer to the dtype of the activations. The parameters have
names of their own; `load_from` takes the values of a reference network over, so that both compute the
same function.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def normalize(a, dim):
    """n(a) = a / (1e-4 + |a| / sqrt(N)), the norm in float32."""
    norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True, dtype=torch.float32)
    rms = norm * math.sqrt(norm.numel() / a.numel())
    return a / (rms + 1e-4).to(a.dtype)


def mp_silu(a):
    return functional.silu(a) / 0.596


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a, b, t):
    n_a, n_b = a.shape[1], b.shape[1]
    common = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    scaled = common * (1 - t) / math.sqrt(n_a) * a, common * t / math.sqrt(n_b) * b
    return torch.cat(scaled, dim=1)


def mp_fourier(c, freqs, phases):
    return math.sqrt(2) * torch.cos(2 * math.pi * (c[:, None] * freqs + phases))


class Conv(nn.Module):
    """Convolution (linear layer if size is 0) of rows of norm 1; training resets what is stored."""

    def __init__(self, channels_in, channels_out, size):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *[size] * (size and 2)))

    def forward(self, x, gain=1.0):
        axes = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, axes))
        w = normalize(self.weight, axes) * (gain / math.sqrt(self.weight[0].numel()))
        w = w.to(x.dtype)
        if self.size:
            return functional.conv2d(x, w, padding=self.size // 2)
        return x @ w.t()


class Block(nn.Module):
    """Encoder or decoder block: resample, (join), residual branch, attention, clamp."""

    def __init__(self, config, side, channels_in, channels_out, scale=1, attention=False):
        super().__init__()
        self.side, self.scale, self.config = side, scale, config
        branch_in = channels_out if side == "enc" else channels_in
        self.change = (
            Conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        )
        self.first = Conv(branch_in, channels_out, 3)
        self.modulate = Conv(4 * config.model_channels, channels_out, 0)
        self.modulate_gain = nn.Parameter(torch.zeros(()))
        self.second = Conv(channels_out, channels_out, 3)
        self.heads = max(1, channels_out // config.channels_per_head) if attention else 0
        if attention:
            self.qkv = Conv(channels_out, 3 * channels_out, 1)
            self.project = Conv(channels_out, channels_out, 1)

    def resample(self, x):
        if self.scale < 1:
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2, mode="nearest") if self.scale > 1 else x

    def attend(self, x):
        n, c, h, w = x.shape
        qkv = self.qkv(x).reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = normalize(qkv, 3).unbind(1)
        logits = torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(c // self.heads)
        y = torch.einsum("nhqk,nhck->nhcq", logits.softmax(dim=3), v).reshape(n, c, h, w)
        return mp_sum(x, self.project(y), self.config.attn_balance)

    def forward(self, x, embedding):
        x = self.resample(x)
        if self.side == "enc":
            x = normalize(self.change(x), 1)
        y = self.first(mp_silu(x))
        factor = self.modulate(embedding, self.modulate_gain) + 1
        y = mp_silu(y * factor[:, :, None, None].to(y.dtype))
        y = functional.dropout(y, self.config.dropout, self.training)
        y = self.second(y)
        if self.side == "dec":
            x = self.change(x)
        x = mp_sum(x, y, self.config.res_balance)
        if self.heads:
            x = self.attend(x)
        return (
            x
            if self.config.clip_act is None
            else x.clamp(-self.config.clip_act, self.config.clip_act)
        )


class PlainNetwork(nn.Module):
    """The denoiser D(x; sigma) with config G's U-Net and the uncertainty u(sigma)."""

    def __init__(self, config, sigma_data=0.5):
        super().__init__()
        self.config, self.sigma_data = config, sigma_data
        self.dtype = getattr(torch, config.dtype)
        base, out = config.model_channels, [config.model_channels * m for m in config.channel_mult]
        for name, number in (("noise", base), ("u", config.logvar_channels)):
            self.register_buffer(f"{name}_freqs", torch.randn(number))
            self.register_buffer(f"{name}_phases", torch.rand(number))
        self.noise = Conv(base, 4 * base, 0)
        self.label = Conv(config.label_dim, 4 * base, 0) if config.label_dim else None
        self.entry = Conv(config.img_channels + 1, out[0], 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.takes_skip = []
        self._build_encoder(config, out)
        self._build_decoder(config, out)
        self.exit = Conv(out[0], config.img_channels, 3)
        self.exit_gain = nn.Parameter(torch.zeros(()))
        self.u = Conv(config.logvar_channels, 1, 0)

    def _build_encoder(self, config, out):
        self.skips = [out[0]]
        for level, c in enumerate(out):
            attends = config.img_resolution >> level in config.attn_resolutions
            if level:
                self.encoder.append(Block(config, "enc", out[level - 1], out[level - 1], 0.5))
                self.skips.append(out[level - 1])
            for _ in range(config.num_blocks):
                self.encoder.append(Block(config, "enc", self.skips[-1], c, 1, attends))
                self.skips.append(c)

    def _build_decoder(self, config, out):
        skips, c = list(self.skips), out[-1]

        def add(channels_in, channels_out, scale, attends, takes):
            self.decoder.append(Block(config, "dec", channels_in, channels_out, scale, attends))
            self.takes_skip.append(takes)

        for level in reversed(range(len(out))):
            attends = config.img_resolution >> level in config.attn_resolutions
            if level == len(out) - 1:
                add(c, c, 1, True, False)
                add(c, c, 1, False, False)
            else:
                add(c, c, 2, False, False)
            for _ in range(config.num_blocks + 1):
                add(c + skips.pop(), out[level], 1, attends, True)
                c = out[level]

    def embed(self, c_noise, labels):
        e = self.noise(mp_fourier(c_noise, self.noise_freqs, self.noise_phases))
        if self.label is not None:
            one_hot = functional.one_hot(labels, self.config.label_dim).to(torch.float32)
            e = mp_sum(e, self.label(one_hot * math.sqrt(self.config.label_dim)), 0.5)
        return mp_silu(e)

    def raw(self, x, c_noise, labels):
        """F of the preconditioning."""
        e = self.embed(c_noise, labels)
        x = self.entry(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = block(x, e)
            skips.append(x)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            if takes_skip:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = block(x, e)
        return self.exit(x, self.exit_gain)

    def forward(self, x, sigma, labels=None, return_logvar=False):
        """D(x; sigma) `[n, c, h, w]` and, if asked for, u(sigma) `[n, 1, 1, 1]`; sigma `[n]`."""
        s, d = sigma[:, None, None, None], self.sigma_data
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / (s**2 + d**2).sqrt()
        c_in = 1 / (s**2 + d**2).sqrt()
        c_noise = sigma.log() / 4
        f = self.raw((c_in * x).to(self.dtype), c_noise, labels)
        denoised = c_skip * x + c_out * f.to(torch.float32)
        if not return_logvar:
            return denoised
        u = self.u(mp_fourier(c_noise, self.u_freqs, self.u_phases))
        return denoised, u[:, :, None, None]

    @torch.no_grad()
    def load_from(self, reference):
        """Take over the values of a `reference_trainer.precond.Precond` of the same configuration."""
        for _, mine, theirs in paired(self, reference):
            mine.copy_(theirs.reshape(mine.shape))
        return self


def paired(plain, reference):
    """Name, tensor of the plain network, tensor of the reference network; every one, or an error."""
    theirs = reference.state_dict()
    mine = {_reference_name(name, reference): v for name, v in plain.state_dict().items()}
    if set(mine) != set(theirs):
        raise ValueError(f"not paired: {sorted(set(mine) ^ set(theirs))}")
    return [(name, value, theirs[name]) for name, value in mine.items()]


TOP = {
    "noise_freqs": "net.embedding.features.freqs",
    "noise_phases": "net.embedding.features.phases",
    "u_freqs": "logvar_features.freqs",
    "u_phases": "logvar_features.phases",
    "noise.weight": "net.embedding.noise.weight",
    "label.weight": "net.embedding.label.weight",
    "entry.weight": "net.stem.weight",
    "exit.weight": "net.out.weight",
    "exit_gain": "net.out_gain",
    "u.weight": "logvar.weight",
}
IN_BLOCK = {
    "change.weight": "conv_skip.weight",
    "first.weight": "branch.conv0.weight",
    "modulate.weight": "branch.emb.weight",
    "modulate_gain": "branch.emb_gain",
    "second.weight": "branch.conv1.weight",
    "qkv.weight": "attention.qkv.weight",
    "project.weight": "attention.proj.weight",
}


def _reference_name(name, reference):
    if name in TOP:
        return TOP[name]
    side, index, rest = name.split(".", 2)
    side = side[:3]
    block = list(getattr(reference.net, side))[int(index)]
    return f"net.{side}.{block}.{IN_BLOCK[rest]}"
