"""The feature extractor of the `fd-digits` metric: a small convolutional classifier of 8x8 digits.

Its weights ship with the package; `python -m reference_trainer.metrics.train_digit_classifier`
made them and `classifier_card` tells how. On the 359 digits that training never saw (`held_out`)
it names 99.2 % rightly.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import nn

from posthoc_ema.errors import MetricError
from reference_trainer.data import load_dataset
from reference_trainer.metrics.extractors import full_precision, weights_hash
from reference_trainer.metrics.frechet import FeatureStatistics

WEIGHTS_FILE = Path(__file__).with_name("digit_classifier.safetensors")
CARD_KEY = "digit_classifier"
FEATURE_DIM = 48
_BATCH = 1024


class DigitClassifier(nn.Module):
    """Three convolutions, a hidden layer of 48 (the features), ten logits; 28,426 parameters.

    The activations are smooth, so that no feature is constant over the digits and their covariance
    has full rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 48, FEATURE_DIM),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURE_DIM, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the penultimate layer, `[n, 48]`, of 8-bit images `[n, 1, 8, 8]`."""
        out: torch.Tensor = self.trunk(images.float() / 127.5 - 1)
        return out

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, `[n, 10]`, of 8-bit images `[n, 1, 8, 8]`."""
        out: torch.Tensor = self.head(self.features(images))
        return out


@functools.lru_cache(maxsize=1)
def load_digit_classifier() -> DigitClassifier:
    """Return the shipped classifier, in eval mode, without gradients (one shared instance)."""
    with safe_open(WEIGHTS_FILE, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    classifier = DigitClassifier()
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


def classifier_card() -> dict[str, Any]:
    """Return what the weights file says of itself: accuracy, split, settings, versions."""
    with safe_open(WEIGHTS_FILE, framework="np") as file:
        card: dict[str, Any] = json.loads(file.metadata()[CARD_KEY])
    return card


def held_out(num_items: int) -> npt.NDArray[np.bool_]:
    """Mark the digits that training never saw: every fifth one, bool `[num_items]`."""
    return np.arange(num_items) % 5 == 4


class DigitExtractor:
    """The shipped classifier behind the `Extractor` protocol.

    Args:
        device: where it computes.
    """

    name = "digits"
    feature_dim = FEATURE_DIM

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._network = load_digit_classifier()
        if self.device.type != "cpu":
            self._network = copy.deepcopy(self._network).to(self.device)
        self.weights_hash = weights_hash(self._network)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Extractor`; the images are uint8 `[n, 1, 8, 8]`."""
        check_digits(images)
        with torch.no_grad(), full_precision(self.device):
            return self._network.features(images)

    def classes(self, features: torch.Tensor) -> torch.Tensor:
        """Classes, int64 `[n]`, that the classifier sees in its features `[n, 48]`."""
        with torch.no_grad():
            return self._network.head(features).argmax(dim=1)


def check_digits(images: torch.Tensor | npt.NDArray[np.uint8]) -> None:
    """Raise MetricError unless these are uint8 images of shape `[n, 1, 8, 8]`."""
    kind = str(images.dtype).removeprefix("torch.")
    if kind != "uint8" or images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
        raise MetricError(
            f"the digits metric needs uint8 images of shape [n, 1, 8, 8], got {kind} "
            f"{list(images.shape)}. It measures models of the 'digits' data set; for other images "
            "use --metric fid or fd-dinov2 with --ref."
        )


def digit_outputs(
    images: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Features and predicted classes of digits, in one pass.

    Args:
        images: uint8 `[n, 1, 8, 8]`.

    Returns:
        features, float64 `[n, 48]`, and classes, int64 `[n]`.

    Raises:
        MetricError: shape or dtype differ.
    """
    check_digits(images)
    classifier = load_digit_classifier()
    features = [np.zeros((0, FEATURE_DIM))]
    classes = [np.zeros(0, np.int64)]
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            batch = torch.tensor(images[start : start + _BATCH])
            hidden = classifier.features(batch)
            features.append(hidden.double().numpy())
            classes.append(classifier.head(hidden).argmax(dim=1).numpy())
    return np.concatenate(features), np.concatenate(classes)


def digit_features(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Features of digits, float64 `[n, 48]`; see `digit_outputs` for arguments and errors."""
    return digit_outputs(images)[0]


@functools.lru_cache(maxsize=1)
def digit_reference_statistics() -> FeatureStatistics:
    """Feature statistics of all 1797 digits, the reference side of `fd-digits`."""
    return FeatureStatistics.empty(FEATURE_DIM).updated(
        digit_features(load_dataset("digits").images)
    )
