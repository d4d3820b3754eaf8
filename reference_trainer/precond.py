"""The preconditioned denoiser D(x; sigma) and the uncertainty u(sigma) (EDM2 eqs. 4 to 8 and 21)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc_ema import ConfigError
from reference_trainer.config import DataConfig, NetworkConfig
from reference_trainer.layers import MPConv, MPFourier
from reference_trainer.networks import UNet

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
        data_mean: pixels are mapped as (pixel / 127.5 - 1 - data_mean) * data_scale.
        data_scale: see `data_mean`.
    """

    def __init__(self, network: NetworkConfig, data: DataConfig) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = network.img_resolution, network.img_channels
        self.label_dim = network.label_dim
        self.sigma_data, self.data_mean, self.data_scale = data.sigma_data, data.mean, data.scale
        self.dtype = DTYPES[network.dtype]
        self.net = UNet(network)
        self.logvar_fourier = MPFourier(network.logvar_channels)
        self.logvar = MPConv(network.logvar_channels, 1, kernel=0)

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

        dtype = self.dtype if x.device.type != "cpu" else torch.float32
        f = self.net((c_in * x).to(dtype), c_noise, self._one_hot(labels, x))
        d = c_skip * x + c_out * f.to(torch.float32)
        return (d, self.uncertainty(c_noise)) if return_logvar else d

    def uncertainty(self, c_noise: Tensor) -> Tensor:
        """u(sigma), a log variance, `[n, 1, 1, 1]` of c_noise = ln(sigma) / 4 `[n]` (EDM2 B.2)."""
        return self.logvar(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)

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
