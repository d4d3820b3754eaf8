"""Latents of images by an autoencoder of diffusers (`AutoencoderKL`), and back.

EDM2 feeds pixels as pixel / 255 in 0..1 and decodes the same range, although the autoencoder was trained on
-1..1; its published statistics belong to that convention. Both are offered, and an encoded data set says
which it used.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posthoc_ema import ConfigError

INPUT_RANGES = ("0..1", "-1..1")
"""How pixels 0..255 are fed to the autoencoder: pixel / 255 (EDM2), or pixel / 127.5 - 1."""


@dataclass(frozen=True, slots=True)
class Autoencoder:
    """An autoencoder of images. Made by `load_autoencoder`.

    Attributes:
        model: the `AutoencoderKL`, in evaluation mode.
        input_range: one of `INPUT_RANGES`.
        device: where it computes.
        identity: 16 hex digits of its weights and configuration.
    """

    model: Any
    input_range: str
    device: torch.device
    identity: str

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.model.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along a side: 8 for Stable Diffusion's."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Distribution of the latents of images.

        Args:
            pixels: uint8 `[n, 3 or 1, h, w]`; gray is repeated.

        Returns:
            Means and then standard deviations, float32 `[n, 2c, h / factor, w / factor]`, on the CPU. They
            are the autoencoder's own numbers, without its scaling factor.
        """
        x = pixels.to(self.device, torch.float32)
        x = x / 255 if self.input_range == "0..1" else x / 127.5 - 1
        distribution = self.model.encode(x.expand(-1, 3, -1, -1)).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: the autoencoder's own numbers, `[n, c, h, w]`; from network units z = x / scale + mean.

        Returns:
            uint8 `[n, 3, h * factor, w * factor]`, on the CPU; values are clamped, and truncated as EDM2
            does.
        """
        x = self.model.decode(latents.to(self.device, torch.float32)).sample.float()
        x = x if self.input_range == "0..1" else (x + 1) / 2
        return (x.clamp(0, 1) * 255).to(torch.uint8).cpu()


def load_autoencoder(
    source: str, *, input_range: str = "0..1", device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load an `AutoencoderKL`.

    Args:
        source: a folder that diffusers saved (of the autoencoder, or of a pipeline with one in `vae/`), or a
            name on the Hugging Face Hub, which diffusers looks up in its cache and downloads if needed.
        input_range: one of `INPUT_RANGES`.
        device: where it computes.

    Raises:
        ConfigError: diffusers is not installed, or there is no such autoencoder.
    """
    if input_range not in INPUT_RANGES:
        raise ConfigError(
            f"input range must be one of {', '.join(INPUT_RANGES)}, got {input_range!r}."
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            "latents need diffusers, which is not installed. Run: pip install diffusers"
        ) from None
    inner = Path(source) / "vae"
    folder = str(inner) if (inner / "config.json").is_file() else source
    try:
        with warnings.catch_warnings(), _quiet_hub():
            warnings.simplefilter("ignore")  # of diffusers about its own use of huggingface_hub
            model = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"autoencoder {source!r} cannot be loaded: {reason}. Give a folder with config.json and "
            "diffusion_pytorch_model.safetensors of an AutoencoderKL, such as stabilityai/sd-vae-ft-mse."
        ) from None
    model = model.to(device).eval().requires_grad_(False)
    return Autoencoder(model, input_range, torch.device(device), _identity(model))


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No lines about each attempt to reach the Hub: the error in the end says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _identity(model: Any) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()
