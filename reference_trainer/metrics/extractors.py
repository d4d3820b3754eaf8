"""Feature extractors: fixed networks from 8-bit images to vectors, behind one protocol.

`open_extractor` makes one by name: "digits" (ships with the package), "inception" (the original FID)
or "dinov2". The last two need weights that are not ours to ship; see `inception` and `dinov2` for where
they are looked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import nn

from posthoc_ema.errors import ConfigError, MetricError
from posthoc_ema.tensor_files import byte_view

EXTRACTORS = ("digits", "inception", "dinov2")
CHUNK = 64
"""Images that the large networks take at a time, however many they are given: memory stays bounded."""


class Extractor(Protocol):
    """A fixed network from images to feature vectors."""

    @property
    def name(self) -> str:
        """The word for it: "digits", "inception" or "dinov2"."""
        ...

    @property
    def feature_dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def weights_hash(self) -> str:
        """`weights_hash` of the network, so that features of other weights are not compared."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 `[n, feature_dim]`, of uint8 images `[n, c, h, w]` on the same device.

        Raises:
            MetricError: the images do not fit; the message says what would.
        """
        ...


def open_extractor(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Make an extractor.

    Args:
        name: "digits", "inception" or "dinov2".
        weights: file (inception) or folder (dinov2) of its weights; None looks where the library that
            has the network keeps them, and lets it download them.
        device: where it computes.

    Raises:
        ConfigError: the name is unknown, or weights are given for the one that has its own.
        MetricError: the package or the weights are missing, or are not what they should be.

    Example:
        >>> open_extractor("digits").feature_dim
        48
    """
    if name == "digits":
        from reference_trainer.metrics.digit_classifier import DigitExtractor

        if weights is not None:
            raise ConfigError(
                f"the digits metrics use the classifier that comes with the package, got weights "
                f"{weights}. Leave them out."
            )
        return DigitExtractor(device)
    if name == "inception":
        from reference_trainer.metrics.inception import open_inception

        return open_inception(weights, device)
    if name == "dinov2":
        from reference_trainer.metrics.dinov2 import open_dinov2

        return open_dinov2(weights, device)
    raise ConfigError(f"extractor must be one of: {', '.join(EXTRACTORS)}; got '{name}'.")


def weights_hash(network: nn.Module) -> str:
    """xxh3_128 of a network's state (names, dtypes, shapes, values): the same from whatever file it came.

    Args:
        network: its state lies on any device.

    Returns:
        32 hex digits.

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> weights_hash(a) == weights_hash(b)
        False
        >>> _ = b.load_state_dict(a.state_dict())
        >>> weights_hash(a) == weights_hash(b)
        True
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(byte_view(values.numpy()))
    return digest.hexdigest()


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Images as uint8 `[n, 3, h, w]`: gray ones are repeated.

    Args:
        images: uint8 `[n, c, h, w]`, c 1 or 3.

    Raises:
        MetricError: the dtype or the shape differs.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise MetricError(
            "this metric needs uint8 images of shape [n, c, h, w] with c 1 (gray) or 3 (RGB), got "
            f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}."
        )
    return images.expand(-1, 3, -1, -1)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions and products in whole float32 on CUDA, where TF32 would cut them to 10 bits."""
    if device.type != "cuda":
        yield
        return
    switches, name, whole = _precision_switches()
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, whole)
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _precision_switches() -> tuple[list[Any], str, Any]:
    """Where PyTorch keeps the precision of float32 products: the modules, the attribute, its value."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since 2.9; the older switches cannot be read once these were used
        return [cudnn.conv, torch.backends.cuda.matmul], "fp32_precision", "ieee"
    return [cudnn, torch.backends.cuda.matmul], "allow_tf32", False
