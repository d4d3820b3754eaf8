"""Layers of the EDM2 networks (arXiv 2312.02696, sections 2 and B), one function or module per equation.

The magnitude-preserving ones keep the expected magnitude of their activations: if the entries of the
input have root mean square 1, so have those of the output. The older ones of configs A to F stand beside
them; `reference_trainer.networks` builds networks of both. Activations are `[n, c, h, w]`, embeddings
`[n, c]`.
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
Weights = Literal["plain", "normalized", "forced"]
Init = Literal["normal", "uniform", "zero"]


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
    if torch.compiler.is_compiling():  # the compiler fuses the formula and its derivative itself
        return _normalized(a, dim, gain)
    y: Tensor = _Normalize.apply(a, dim, gain)
    return y


def _normalized(a: Tensor, dim: int | tuple[int, ...], gain: float) -> Tensor:
    norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True, dtype=torch.float32)
    factor = gain / (EPSILON + norm * math.sqrt(norm.numel() / a.numel()))
    return a * factor.to(a.dtype)


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
    return a * share_a + b * share_b


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


class Fourier(nn.Module):
    """Random Fourier features cos(2 pi (f_i c + phi_i)), times sqrt(2) in config G (EDM2 B.3, B.7).

    The frequencies N(0, 1) and phases U(0, 1) are buffers: drawn once, never trained, never averaged.

    Args:
        num_channels: number of features.
        magnitude: factor of the features; sqrt(2) gives them unit magnitude.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int, magnitude: float = math.sqrt(2)) -> None:
        super().__init__()
        self.magnitude = magnitude
        self.register_buffer("freqs", torch.randn(num_channels))
        self.register_buffer("phases", torch.rand(num_channels))

    def forward(self, c: Tensor) -> Tensor:
        """Features `[n, num_channels]`, float32, of numbers `c` `[n]`."""
        angle = torch.outer(c.to(torch.float32), self.freqs) + self.phases
        return angle.mul(2 * math.pi).cos().mul(self.magnitude)


class Positional(nn.Module):
    """Cosines and sines of c at the frequencies 10000^(-k / (N / 2)), k < N / 2 (configs A and B).

    Args:
        num_channels: N, the number of features; even.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_frequencies = num_channels // 2

    def forward(self, c: Tensor) -> Tensor:
        """Features `[n, num_channels]`, float32, of numbers `c` `[n]`."""
        # Made anew, not kept: a buffer outside of the state dict is lost in a network that is made on
        # the meta device and filled from a file.
        k = torch.arange(self.num_frequencies, dtype=torch.float32, device=c.device)
        angle = torch.outer(c.to(torch.float32), 10000.0 ** (-k / self.num_frequencies))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Conv(nn.Module):
    """Convolution or linear layer, its weights plain or normalised (EDM2 eqs. 46, 47, 66).

    "normalized" applies rows of norm 1, a differentiable function of what is stored, so that the gradient
    is orthogonal to the weight (config D). "forced" needs `force_norm` before every step besides, which
    resets the stored rows to norm sqrt(fan_in), so that the effective learning rate cannot decay by growth
    of the weights (EDM2 B.5). The normalisation of what is applied is also what makes averaged weights
    usable: an average of unit vectors is shorter than one.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel: side of the square kernel (odd), or 0 for a linear layer.
        weights: see above; "plain" applies what is stored.
        init: "normal" N(0, 1), "uniform" in +-1/sqrt(fan_in), or "zero". A bias is drawn likewise.
        bias: whether there is one.

    Attributes:
        folded: the stored weight is what is applied, gains included (evaluation copies only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        weights: Weights = "forced",
        init: Init = "normal",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.weights, self.folded = kernel, weights, False
        spatial = (kernel, kernel) if kernel else ()
        fan_in = in_channels * max(kernel, 1) ** 2
        self.weight = nn.Parameter(_drawn((out_channels, in_channels, *spatial), init, fan_in))
        self.bias = nn.Parameter(_drawn((out_channels,), init, fan_in)) if bias else None

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Apply to `x` (`[n, c, h, w]`, or `[n, c]` for a linear layer), the weight scaled by `gain`."""
        w = self.weight if self.folded else self.applied_weight(gain).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kernel:
            return functional.conv2d(x, w, bias, padding=self.kernel // 2)
        return functional.linear(x, w, bias)

    @torch.no_grad()
    def force_norm(self) -> None:
        """Reset every stored row to norm sqrt(fan_in), in place (EDM2 eq. 66); only if "forced"."""
        if self.weights == "forced":
            weight = local_part(self.weight)
            if weight.numel():
                axes, inverse_root_n = self._fan_in_axes, 1 / math.sqrt(weight[0].numel())
                norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
                weight.mul_(norm.mul_(inverse_root_n).add_(EPSILON).reciprocal_())

    def applied_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight that is applied, float32: rows of norm `gain`, or `gain` times what is stored."""
        w = self.weight.to(torch.float32)
        if self.weights == "plain":
            return w if isinstance(gain, float) and gain == 1.0 else w * gain
        inverse_root_n = 1 / math.sqrt(self.weight[0].numel())
        if isinstance(gain, Tensor):
            return rms_normalize(w, self._fan_in_axes, inverse_root_n) * gain
        return rms_normalize(w, self._fan_in_axes, inverse_root_n * gain)

    @torch.no_grad()
    def fold(self, gain: Tensor | float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        """Store what is applied, so that evaluations need not compute it again; cannot be undone."""
        w = self.applied_weight(gain).to(dtype)
        # Convolutions of activations in this memory format otherwise reorder the weight every time.
        w = w.to(memory_format=torch.channels_last) if self.kernel else w
        self.weight, self.folded = nn.Parameter(w, requires_grad=False), True

    @property
    def _fan_in_axes(self) -> tuple[int, ...]:
        return (1, 2, 3) if self.kernel else (1,)


def _drawn(shape: tuple[int, ...], init: Init, fan_in: int) -> Tensor:
    if init == "normal":
        return torch.randn(shape)
    if init == "zero":
        return torch.zeros(shape)
    return (torch.rand(shape) * 2 - 1) / math.sqrt(fan_in)


def local_part(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is sharded along its first axis; a plain tensor itself."""
    shard = getattr(tensor, "to_local", None)  # torch.distributed's DTensor
    return tensor if shard is None else shard()


class GroupNorm(nn.Module):
    """Group normalisation (configs A and B), or division by the group's root mean square (C to E).

    With `affine`, mean and deviation are taken out and a learned scale and bias applied (epsilon 1e-5,
    inside the root). Without, b = a / (1e-4 + RMS(a)) over pixels and the group's channels (EDM2 B.3).
    There are 32 groups, or as many as leave 4 channels to each, as in EDM.

    Args:
        channels: channels of the input.
        affine: see above.
    """

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.num_groups = math.gcd(channels, min(32, max(1, channels // 4)))
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to the same shape and dtype."""
        if self.weight is not None:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)  # type: ignore[union-attr]
            return functional.group_norm(x, self.num_groups, weight, bias, eps=1e-5)
        n, c, h, w = x.shape
        # Channels innermost, as the activations lie in memory: a view and not a copy.
        groups = x.permute(0, 2, 3, 1).reshape(n, h * w, self.num_groups, c // self.num_groups)
        y = rms_normalize(groups, dim=(1, 3))
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


def attend(qkv: Tensor, num_heads: int, *, cosine: bool, in_float32: bool = False) -> Tensor:
    """Self-attention over the pixels: softmax(q.k / sqrt(d)) v (EDM2 sections B.1, B.3 and B.7).

    With `cosine`, queries, keys and values are normalised over the d channels of each head, so the
    logits are sqrt(d) cos(angle).

    Args:
        qkv: `[n, 3 c, h, w]`, channels ordered by query, key, value, then head, then channel within it.
        num_heads: a divisor of c.
        cosine: see above.
        in_float32: compute in float32 whatever the dtype of `qkv`.

    Returns:
        `[n, c, h, w]`, dtype of `qkv`.
    """
    n, channels, h, w = qkv.shape
    c = channels // 3
    heads = qkv.permute(0, 2, 3, 1)  # a view: activations are in channels-last memory
    heads = heads.reshape(n, h * w, 3, num_heads, c // num_heads)
    heads = heads.to(torch.float32) if in_float32 else heads
    heads = rms_normalize(heads, dim=4) if cosine else heads
    q, k, v = heads.transpose(1, 3).unbind(2)  # each [n, heads, h * w, d]
    y = _scaled_dot_product(q, k, v).to(qkv.dtype)
    return y.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q.k / sqrt(d)) v for `[n, heads, pixels, d]`.

    On a processor torch's fused kernels lose against three plain steps for as few pixels as there are
    here (five times, backwards). Three axes and not four, or the compiler puts the fused kernel back.
    """
    n, heads, pixels, d = q.shape
    if q.device.type != "cpu" or pixels > 256:
        return functional.scaled_dot_product_attention(q, k, v)
    q, k, v = (tensor.reshape(n * heads, pixels, d) for tensor in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)) * (1 / math.sqrt(d))
    return torch.bmm(logits.softmax(dim=2), v).reshape(n, heads, pixels, d)
