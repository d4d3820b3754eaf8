"""The Inception-v3 network of the original FID (TensorFlow's of 2015-12-05), from torch-fidelity.

torch-fidelity carries its architecture, its way of resizing (TensorFlow 1's bilinear, to 299x299) and the
address of its weights.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from posthoc_ema.errors import MetricError, SnapshotFormatError
from posthoc_ema.importers.torch_files import open_pickle
from reference_trainer.metrics.extractors import CHUNK, as_rgb, full_precision, weights_hash

NAME = "inception"
LAYER = "2048"  # torch-fidelity names layers by their width; this is the pooled one of FID, KID and recall


class InceptionExtractor:
    """Inception-v3 behind the `Extractor` protocol.

    Args:
        network: torch-fidelity's FeatureExtractorInceptionV3, with one layer asked for.
        device: where it computes.
    """

    name = NAME

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.weights_hash = weights_hash(network)
        self._network = network.to(self.device)
        (layer,) = network.features_list
        self.feature_dim = int(layer)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Extractor`."""
        with torch.no_grad(), full_precision(self.device):
            parts = [self._network(part)[0] for part in as_rgb(images).split(CHUNK)]
        return torch.cat(parts)


def open_inception(
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    layer: str = LAYER,
) -> InceptionExtractor:
    """Make the extractor of FID and KID.

    Args:
        weights: file of torch-fidelity's weights (`.pth`) or the same tensors as `.safetensors`; None
            takes the file in PyTorch's cache, or downloads it there.
        device: where it computes.
        layer: "64", "192", "768" or "2048".

    Raises:
        MetricError: torch-fidelity cannot be used, or the weights are missing, damaged or of another
            network.
    """
    module = load_torch_fidelity("feature_extractor_inceptionv3")
    state = _download(module) if weights is None else _read(Path(weights))
    # The class loads its weights with a full pickle reader. What it is given here is a file of tensors
    # that we write ourselves, in memory.
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=file
        )
    except RuntimeError as error:
        raise MetricError(
            f"{weights or 'the downloaded file'} holds weights of another network than torch-fidelity's "
            f"Inception-v3: {_first(error)}. Get {_file_name(module)} from {module.URL_INCEPTION_V3}."
        ) from None
    return InceptionExtractor(network, device)


def load_torch_fidelity(module: str) -> Any:
    """Import a module of torch-fidelity.

    Raises:
        MetricError: the package, or one that it needs, is missing or does not fit.
    """
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError as error:
        raise MetricError(
            f"the metrics fid, kid and precision-recall need {error.name}, which is not installed: "
            "pip install 'posthoc-ema[metrics]'."
        ) from None
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision built for another torch
        raise MetricError(
            f"torch-fidelity cannot be loaded: {_first(error)}. Install the torchvision that belongs to "
            f"torch {torch.__version__}, from the same place."
        ) from None


def _file_name(module: Any) -> str:
    return str(module.URL_INCEPTION_V3).rpartition("/")[2]


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2]).rstrip(".:")[:200]


def _download(module: Any) -> Mapping[str, torch.Tensor]:
    """The weights from PyTorch's cache, downloaded by its hub if they are not there."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(module)
    try:
        return torch.hub.load_state_dict_from_url(
            module.URL_INCEPTION_V3,
            map_location="cpu",
            progress=sys.stderr.isatty(),
            check_hash=True,
            weights_only=True,
        )
    except (URLError, OSError) as error:
        raise MetricError(
            f"the weights of Inception-v3 are not on this machine and could not be downloaded "
            f"({_first(error)}). Get {module.URL_INCEPTION_V3} and put it at {place}, or give its path "
            "with --weights."
        ) from None
    except Exception as error:  # a cached file that is cut short, with one of many exceptions
        raise MetricError(
            f"{place}: cannot be read: {_first(error)}. Remove it, and it is downloaded again."
        ) from None


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a weights file, by name; nothing in it is executed."""
    if not path.is_file():
        raise MetricError(f"{path}: there is no such file of weights. Check --weights.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with open_pickle(path) as value:
            return {name: torch.tensor(tensor.read()) for name, tensor in value.items()}
    except SnapshotFormatError:
        raise
    except Exception as error:  # of safetensors, or values that are no tensors
        raise MetricError(
            f"{path}: is no file of weights: {_first(error)}. It must map names to tensors."
        ) from None
