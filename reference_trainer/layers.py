"""Magnitude-preserving layers of EDM2 (arXiv 2312.02696, sections 2.3 and B.4 to B.7).

Every layer keeps the expected magnitude of its activations: if the entries of the input have root mean
square 1, so have those of the output. One function or module per equation; the networks are built of
them in `reference_trainer.networks`. Activations are `[n, c, h, w]`, embeddings `[n, c]`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

EPSILON = 1e-4
"""Guard of every normalisation, added to the root mean square (outside the root)."""

SILU_MAGNITUDE = 0.596
"""Root mean square of silu(a) for a ~ N(0, 1); 0.596469 to more digits, the paper rounds."""

Resampling = Literal["keep", "down", "up"]


class _Normalize(torch.autograd.Function):
    """y = gain a / (epsilon + |a| / sqrt(N)), its derivative in closed form.

    With m = epsilon + |a| / sqrt(N):  dL/da = gain g / m - y (g . y) / (gain |a| sqrt(N)).
    Worth a function of its own because every weight passes through it in every step: a third of the
    small operations of a step on a CPU would be those that autograd makes of the formula.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, dim: int | tuple[int, ...], gain: float) -> Tensor:
        norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True, dtype=torch.float32)
        inverse_root_n = math.sqrt(norm.numel() / a.numel())
        factor = norm.mul(inverse_root_n).add_(EPSILON).reciprocal_().mul_(gain)
        y = a * factor.to(a.dtype)
        ctx.save_for_backward(y, norm, factor)
        ctx.dim, ctx.ratio = dim, inverse_root_n / gain
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        y, norm, factor = ctx.saved_tensors
        g32, y32 = g.to(torch.float32), y.to(torch.float32)
        # Where |a| = 0, y is 0 too, and so is the second term.
        along = (g32 * y32).sum(ctx.dim, keepdim=True).mul_(ctx.ratio) / norm.clamp(min=1e-30)
        return torch.addcmul(g32 * factor, y32, along, value=-1).to(g.dtype), None, None


def rms_normalize(a: Tensor, dim: int | tuple[int, ...], gain: float = 1.0) -> Tensor:
    """Scale to root mean square `gain` over the axes `dim` (EDM2 eqs. 29, 47).

    n(a) = a / (epsilon + |a| / sqrt(N)) with N entries along `dim`. The norm is computed in float32
    whatever the dtype of `a`. Differentiable once, backwards.

    Args:
        a: any shape.
        dim: the axis or axes that are reduced together.
        gain: factor of the result, not 0.

    Returns:
        Same shape and dtype as `a`.

    Example:
        >>> rms_normalize(torch.tensor([[3.0, 3.0]]), dim=1).round(decimals=3)
        tensor([[1., 1.]])
    """
    y: Tensor = _Normalize.apply(a, dim, gain)
    return y


def mp_silu(a: Tensor) -> Tensor:
    """silu(a) / 0.596 (EDM2 section B.7)."""
    return functional.silu(a) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Weighted sum ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (EDM2 section B.7).

    Args:
        a: main path, any shape.
        b: the branch that is added, same shape.
        t: share of `b`, in [0, 1].

    Example:
        >>> round(float(mp_sum(torch.tensor(1.0), torch.tensor(0.0), 0.3)), 5)
        0.91915
    """
    share_a, share_b = mp_sum_shares(t)
    return torch.add(a * share_a, b, alpha=share_b)


def mp_sum_shares(t: float) -> tuple[float, float]:
    """The two factors (1 - t) / sqrt((1 - t)^2 + t^2) and t / sqrt((1 - t)^2 + t^2) of `mp_sum`."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate channels so that each input contributes by its share, not by its size (EDM2 section B.7).

    sqrt((N_a + N_b) / ((1 - t)^2 + t^2)) * [(1 - t) / sqrt(N_a) a, t / sqrt(N_b) b].

    Args:
        a: main path, `[n, N_a, h, w]`.
        b: skip connection, `[n, N_b, h, w]`.
        t: share of `b`, in [0, 1].

    Returns:
        `[n, N_a + N_b, h, w]`.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    common = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    scale_a, scale_b = common * (1 - t) / math.sqrt(n_a), common * t / math.sqrt(n_b)
    return torch.cat([a * scale_a, b * scale_b], dim=1)


def resample(x: Tensor, mode: Resampling) -> Tensor:
    """Halve by 2x2 means, double by 2x2 replication, or keep (EDM2 B.7: no magnitude compensation)."""
    if mode == "down":
        return functional.avg_pool2d(x, 2)
    if mode == "up":
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class MPFourier(nn.Module):
    """Random Fourier features sqrt(2) cos(2 pi (f_i c + phi_i)) (EDM2 section B.7).

    The frequencies N(0, 1) and phases U(0, 1) are buffers: drawn once, never trained, never averaged.

    Args:
        num_channels: number of features.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels))
        self.register_buffer("phases", torch.rand(num_channels))

    def forward(self, c: Tensor) -> Tensor:
        """Features `[n, num_channels]`, float32, of numbers `c` `[n]`."""
        angle = torch.outer(c.to(torch.float32), self.freqs) + self.phases
        return angle.mul(2 * math.pi).cos().mul(math.sqrt(2))


class MPConv(nn.Module):
    """Convolution or linear layer with normalised weights and no bias (EDM2 eqs. 46, 47, 66).

    The stored weight of each output has norm sqrt(fan_in); what is applied has norm 1. Two
    normalisations, and both are needed (EDM2 B.5): the training forward first resets the stored weight
    in place, so that the effective learning rate cannot decay by growth of the weights; then the applied
    weight is a differentiable function of it, so that the gradient is orthogonal to the weight. In
    evaluation only the second happens, which is also what makes averaged weights usable: an average of
    unit vectors is shorter than one.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel: side of the square kernel (odd), or 0 for a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        spatial = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *spatial))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Apply to `x` (`[n, c, h, w]`, or `[n, c]` for a linear layer), scaled by `gain`."""
        if self.training:
            self.force_norm()
        w = self.unit_weight(gain).to(x.dtype)
        if self.kernel:
            return functional.conv2d(x, w, padding=self.kernel // 2)
        return functional.linear(x, w)

    @torch.no_grad()
    def force_norm(self) -> None:
        """Reset every stored row to norm sqrt(fan_in), in place (EDM2 eq. 66)."""
        self.weight.copy_(rms_normalize(self.weight, self._fan_in_axes))

    def unit_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight that is applied: rows of norm `gain`, float32 (EDM2 eq. 47)."""
        inverse_root_n = 1 / math.sqrt(self.weight[0].numel())
        w = self.weight.to(torch.float32)
        if isinstance(gain, Tensor):
            return rms_normalize(w, self._fan_in_axes, inverse_root_n) * gain
        return rms_normalize(w, self._fan_in_axes, inverse_root_n * gain)

    @property
    def _fan_in_axes(self) -> tuple[int, ...]:
        return (1, 2, 3) if self.kernel else (1,)


class CosineAttention(nn.Module):
    """Self-attention with normalised queries, keys and values (EDM2 sections B.3 and B.7).

    With d channels per head the logits are q.k / sqrt(d) = sqrt(d) cos(angle). The channels of `qkv` are
    ordered by query, key, value, then head, then channel within the head.

    Args:
        channels: channels of the main path.
        num_heads: a divisor of `channels`.
        balance: share of the attention branch in the sum, t of `mp_sum`.
    """

    def __init__(self, channels: int, num_heads: int, balance: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.share_x, self.share_y = mp_sum_shares(balance)
        self.qkv = MPConv(channels, 3 * channels, kernel=1)
        self.proj = MPConv(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to the same shape, the residual sum included."""
        n, c, h, w = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1)  # a view: activations are in channels-last memory
        qkv = qkv.reshape(n, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = rms_normalize(qkv, dim=4).transpose(1, 3).unbind(2)  # each [n, heads, h * w, d]
        y = functional.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
        return torch.add(self.proj(y, gain=self.share_y), x, alpha=self.share_x)  # mp_sum
