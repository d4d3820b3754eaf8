"""DINOv2 ViT-L/14 as a feature extractor, from transformers.

Images are resized to 224x224 (bicubic with antialiasing, in float, neither clipped nor rounded),
normalised by ImageNet's mean and deviation; the feature is the class token behind the last layer norm
(EDM2, arXiv 2312.02696, appendix A.5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from posthoc_ema.errors import MetricError
from reference_trainer.metrics.extractors import CHUNK, as_rgb, full_precision, weights_hash

NAME = "dinov2"
MODEL = "facebook/dinov2-large"
SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_OFFSET = 0.1


class DinoExtractor:
    """DINOv2 behind the `Extractor` protocol.

    Args:
        network: transformers' Dinov2Model.
        device: where it computes.
    """

    name = NAME

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.weights_hash = weights_hash(network)
        self.feature_dim = int(network.config.hidden_size)
        fit_positions(network, SIDE)
        self._network = network.eval().requires_grad_(False).to(self.device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Extractor`."""
        with torch.no_grad(), full_precision(self.device):
            parts = [
                self._network(pixel_values=normalised(part)).pooler_output
                for part in as_rgb(images).split(CHUNK)
            ]
        return torch.cat(parts)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """The network's input: float32 `[n, 3, 224, 224]` of uint8 RGB images `[n, 3, h, w]`."""
    x = functional.interpolate(
        images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
    )
    mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (_MEAN, _DEVIATION))
    return (x / 255 - mean) / deviation


def fit_positions(network: Any, side: int) -> None:
    """Resample a network's table of positions once, for images of `side` pixels, as DINOv2 itself does.

    DINOv2 resamples its table (37x37) by the factor (side / patch + 0.1) / 37 and keeps the 0.1 in the
    coordinates; transformers resamples by the plain ratio, which gives slightly other features. With a
    table of the right size it leaves it as it is.

    Args:
        network: transformers' Dinov2Model; changed in place.
        side: of the images.
    """
    embeddings = network.embeddings
    table = embeddings.position_embeddings
    patch = int(network.config.patch_size)
    old, new = round((table.shape[1] - 1) ** 0.5), side // patch
    if old == new:
        return
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (new + _OFFSET) / old
    with torch.no_grad():
        resampled = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        rows = resampled.permute(0, 2, 3, 1).reshape(1, new * new, -1)
        embeddings.position_embeddings = nn.Parameter(torch.cat((table[:, :1], rows), dim=1))


def open_dinov2(
    weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> DinoExtractor:
    """Make the extractor of FD_DINOv2.

    Args:
        weights: folder with `config.json` and `model.safetensors`; None takes `facebook/dinov2-large`
            from the Hugging Face cache, or downloads it there.
        device: where it computes.

    Raises:
        MetricError: transformers is missing, or the weights are missing, damaged or of another network.
    """
    with _quiet():
        network = _load(weights)
    return DinoExtractor(network, device)


def _load(weights: str | Path | None) -> Any:
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise MetricError(
            f"the dinov2 metrics need transformers ({str(error).splitlines()[0][:150]}): "
            "pip install 'posthoc-ema[metrics]'."
        ) from None
    if weights is not None and not (Path(weights) / "config.json").is_file():
        raise MetricError(
            f"{weights}: is no folder of DINOv2 weights. It must hold config.json and model.safetensors "
            f"of {MODEL}."
        )
    try:
        loaded: Any = Dinov2Model.from_pretrained(
            str(weights or MODEL), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if weights is None:
            raise MetricError(_offline(error)) from None
        raise MetricError(
            f"{weights}: cannot be loaded as DINOv2: {str(error).strip().splitlines()[0][:200]}. Get "
            f"config.json and model.safetensors of https://huggingface.co/{MODEL} anew."
        ) from None
    network, told = loaded
    missing = sorted(told["missing_keys"])
    if missing:
        raise MetricError(
            f"{weights or MODEL}: lacks {len(missing)} tensors of DINOv2, {missing[0]} for example. Get "
            f"config.json and model.safetensors of https://huggingface.co/{MODEL} anew."
        )
    return network


def _offline(error: BaseException) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"the weights of DINOv2 are not on this machine ({HF_HUB_CACHE}) and could not be downloaded "
        f"({type(error).__name__}). Put config.json and model.safetensors of "
        f"https://huggingface.co/{MODEL} into a folder and give it with --weights."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers on stderr."""
    try:
        from transformers.utils import logging
    except ImportError:  # said where the model is loaded
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
