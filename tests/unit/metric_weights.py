"""Weights of feature networks, made on the spot; and torch-fidelity where there is no torchvision.

torch-fidelity imports torchvision for its own data sets and for other networks than Inception-v3. Where the
torchvision that belongs to this torch is not installed, an empty module takes its place while torch-fidelity
is imported, and goes again.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types

import torch


def _empty_torchvision():
    modules = {"torchvision": types.ModuleType("torchvision")}
    for name in ("datasets", "models", "transforms", "transforms.functional"):
        modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, type(name, (), {}))
    return modules


@contextlib.contextmanager
def _some_torchvision():
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        yield
        return
    modules = _empty_torchvision()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


with _some_torchvision():
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def random_inception(seed=0):
    """State of torch-fidelity's Inception-v3 with random weights that keep activations at unit size."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **options):
            """Weights are drawn instead."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=nothing)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                size = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return network.state_dict()


def write_inception(path, seed=0):
    """A weights file as torch-fidelity's own."""
    torch.save(random_inception(seed), path)
    return path


def write_dinov2(folder, seed=0, **options):
    """A folder of a tiny DINOv2 as `save_pretrained` writes it: 32 features, 2 layers."""
    from transformers import Dinov2Config, Dinov2Model

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "layerscale_value": 1.0,
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dinov2Model(Dinov2Config(**settings))
        with torch.no_grad():
            network.embeddings.position_embeddings.normal_()
    network.save_pretrained(folder)
    return folder


def fidelity(first, second, weights, **options):
    """torch-fidelity's own metrics of two sets of images, uint8 `[n, 3, h, w]`."""

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    settings = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
    return torch_fidelity.calculate_metrics(
        input1=Images(first),
        input2=Images(second),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        **settings,
        **options,
    )
