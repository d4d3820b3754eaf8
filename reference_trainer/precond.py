"""The preconditioned denoiser D(x; sigma) and the uncertainty u(sigma) (EDM2 eqs. 4 to 8 and 21)."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc_ema import ConfigError
from reference_trainer.config import DataConfig, NetworkConfig
from reference_trainer.layers import Conv
from reference_trainer.networks import Parts, UNet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Precond(nn.Module):
    """Denoiser: clean images expected from noisy ones.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), everything outside F in float32. At the start of
    training F is zero, hence D = c_skip x. The uncertainty u(sigma) is trained along and not needed
    afterwards; it is part of the state dict.

    Args:
        network: configuration of F.
        data: mapping of pixels and sigma_data.

    Attributes:
        img_resolution: side of the images.
        img_channels: channels of the images.
        label_dim: number of classes, 0 when unconditional.
        sigma_data: standard deviation of the images in network units.
        data_mean: values are mapped as (v - data_mean) * data_scale, one number or one per channel; v is
            pixel / 127.5 - 1, or the latent.
        data_scale: see `data_mean`.
        dtype: dtype of the activations in F.
    """

    def __init__(self, network: NetworkConfig, data: DataConfig) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = network.img_resolution, network.img_channels
        self.label_dim = network.label_dim
        self.sigma_data, self.data_mean, self.data_scale = data.sigma_data, data.mean, data.scale
        self.dtype = DTYPES[network.dtype]
        self.net = UNet(network)
        self.has_uncertainty = network.logvar_channels > 0
        if self.has_uncertainty:
            self.logvar_features = Parts(network).features(network.logvar_channels)
            self.logvar = Parts(network).conv(network.logvar_channels, 1, 0)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        return_logvar: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Denoise.

        Args:
            x: noisy images in network units, `[n, c, h, w]`.
            sigma: noise level, a number or `[n]`, positive.
            labels: class indices `[n]` (integers) or one-hot rows `[n, label_dim]`; None is the zero
                row. An unconditional network ignores them.
            return_logvar: return u(sigma) too.

        Returns:
            D, float32 `[n, c, h, w]`; with `return_logvar` the pair of D and u, u of shape `[n, 1, 1, 1]`.

        Raises:
            ConfigError: the shape of `x` or `labels` is not the network's.
        """
        self._check(x, labels)
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        sigma = sigma.expand(x.shape[0])
        s, s_data = sigma[:, None, None, None], self.sigma_data
        c_skip = s_data**2 / (s**2 + s_data**2)
        c_out = s * s_data / (s**2 + s_data**2).sqrt()
        c_in = 1 / (s**2 + s_data**2).sqrt()
        c_noise = sigma.log() / 4

        f = self.net((c_in * x).to(self.dtype), c_noise, self._one_hot(labels, x))
        d = c_skip * x + c_out * f.to(torch.float32)
        return (d, self.uncertainty(c_noise)) if return_logvar else d

    def uncertainty(self, c_noise: Tensor) -> Tensor:
        """u(sigma), a log variance, `[n, 1, 1, 1]` of c_noise = ln(sigma) / 4 `[n]` (EDM2 B.2).

        Raises:
            ConfigError: the network was made without (logvar_channels 0).
        """
        if not self.has_uncertainty:
            raise ConfigError(
                "this network has no u(sigma): network.logvar_channels must be positive, got 0. "
                "Use loss.weighting 'static', or give it one."
            )
        return self.logvar(self.logvar_features(c_noise)).reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def force_weight_norm(self) -> None:
        """Reset the stored weights of "forced" layers to norm sqrt(fan_in), in place (EDM2 eq. 66).

        A training step calls this before its first forward pass; the forward pass changes nothing. Does
        nothing for other kinds of weights. Weights may be sharded along their first axis (FSDP2).
        """
        for module in self.modules():
            if isinstance(module, Conv):
                module.force_norm()

    def folded(self, dtype: torch.dtype | None = None) -> Self:
        """A copy for evaluation whose weights are normalised and scaled once, and not in every pass.

        Args:
            dtype: dtype of the activations and of the weights of convolutions; None keeps the
                network's. The embedding stays in float32.

        Returns:
            The copy, in evaluation mode, without gradients. It cannot be trained or folded again.

        Example:
            >>> from reference_trainer.presets import PRESETS
            >>> config = PRESETS["digits-xs"]()
            >>> network = Precond(config.network, config.data)
            >>> network.folded(torch.bfloat16).net.stem.weight.dtype
            torch.bfloat16
        """
        copied = copy.deepcopy(self).eval().requires_grad_(False)
        copied.dtype = self.dtype if dtype is None else dtype
        copied.net.fold(copied.dtype)
        if copied.has_uncertainty:
            copied.logvar.fold()
        return copied

    def _one_hot(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if self.label_dim == 0:
            return None
        if labels is None:
            return torch.zeros(x.shape[0], self.label_dim, device=x.device)
        if labels.ndim == 1:
            labels = functional.one_hot(labels.to(torch.int64), self.label_dim)
        return labels.to(x.device, torch.float32)

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if tuple(x.shape[1:]) != expected:
            raise ConfigError(
                f"images must have the shape (n, {', '.join(map(str, expected))}) of this network, "
                f"got {tuple(x.shape)}."
            )
        if labels is None or self.label_dim == 0:
            return
        if labels.shape not in ((x.shape[0],), (x.shape[0], self.label_dim)):
            raise ConfigError(
                f"labels must be indices of shape ({x.shape[0]},) or one-hot rows of shape "
                f"({x.shape[0]}, {self.label_dim}), got shape {tuple(labels.shape)}."
            )
