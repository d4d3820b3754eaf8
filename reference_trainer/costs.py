"""What a network and a run cost, counted without computing: parameters, operations, memory, storage.

Networks are built and run on torch's meta device, which has shapes and no data: the largest one takes
a few seconds and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reference_trainer.config import DataConfig, NetworkConfig, TrainConfig
from reference_trainer.precond import Precond

_REDUCTIONS = frozenset({"linalg_vector_norm", "sum", "mean", "native_group_norm", "avg_pool2d"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """What a run needs.

    Attributes:
        num_parameters: trained numbers, those of u(sigma) included.
        gflops_per_evaluation: see `gflops_per_evaluation`.
        training_zflops: 10^21 operations of the whole run: 3 evaluations' worth per image, forwards and
            backwards (EDM2 table 6).
        state_bytes: weights, gradients, Adam's moments and the tracked averages, in float32.
        activation_bytes: what a forward pass keeps for the backward pass, of one microbatch.
        snapshot_times: how many times averages are stored.
    """

    num_parameters: int
    gflops_per_evaluation: float
    training_zflops: float
    state_bytes: int
    activation_bytes: int
    snapshot_times: int


def num_parameters(network: NetworkConfig) -> int:
    """Trained numbers of a network, those of u(sigma) included.

    Example:
        >>> latents = NetworkConfig(img_resolution=64, img_channels=4, label_dim=1000)
        >>> round(num_parameters(latents) / 1e6, 1)  # config G, size S: EDM2 table 1
        280.2
    """
    return sum(parameter.numel() for parameter in _on_meta(network).parameters())


def gflops_per_evaluation(network: NetworkConfig) -> float:
    """10^9 operations of one evaluation of the denoiser, counted as in the EDM2 paper (table 1).

    A multiply-add of a convolution, a linear layer or attention is one operation; so is an element of
    the result of an elementwise operation, and an element that a reduction reads. The normalisation of
    the weights is in the count, as it evidently is in the paper's; a folded network does without.

    Example:
        >>> latents = NetworkConfig(img_resolution=64, img_channels=4, label_dim=1000)
        >>> round(gflops_per_evaluation(latents))  # the paper has 102.2
        101
    """
    model = _on_meta(network).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as products, _Elements() as elements:
        _evaluate(model, network, 1)
    return float(products.get_total_flops() / 2 + elements.count) / 1e9


def activation_bytes(network: NetworkConfig, images: int) -> int:
    """Bytes that one training forward pass of `images` images keeps for its backward pass."""
    model, seen = _on_meta(network).train(), {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor is held, so that no other storage can take its place in memory.
            seen[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = _evaluate(model, network, images)
    del result
    return sum(size for size, _ in seen.values())


def run_cost(config: TrainConfig, *, num_processes: int = 1) -> RunCost:
    """What a run needs, per process where it is memory.

    Args:
        config: the run.
        num_processes: processes among which the batch is divided; with compute.parallel "fsdp2" the
            state is too.
    """
    network, count = config.network, num_parameters(config.network)
    gflops = gflops_per_evaluation(network)
    share = max(1, config.batch_size // num_processes)
    microbatch = min(share, config.compute.microbatch or share)
    profiles = len(config.track.sigma_rels) + len(config.track.direct_sigma_rels)
    shards = num_processes if config.compute.parallel == "fsdp2" else 1
    # One image tells what every image needs: activations are proportional, weights' copies are not.
    one, two = activation_bytes(network, 1), activation_bytes(network, 2)
    return RunCost(
        num_parameters=count,
        gflops_per_evaluation=gflops,
        training_zflops=3 * gflops * config.total_images * 1e9 / 1e21,
        state_bytes=4 * count * (4 + profiles) // shards,
        activation_bytes=one + (two - one) * (microbatch - 1),
        snapshot_times=-(-config.total_images // config.track.snapshot_every),
    )


def _on_meta(network: NetworkConfig) -> Precond:
    with torch.device("meta"):
        return Precond(network, DataConfig())


def _evaluate(model: Precond, network: NetworkConfig, images: int) -> Tensor:
    side = network.img_resolution
    with torch.device("meta"):
        x = torch.empty(images, network.img_channels, side, side)
        one_hot = torch.empty(images, network.label_dim) if network.label_dim else None
        result = model(x, torch.ones(images), one_hot)
    assert isinstance(result, Tensor)
    return result


class _Elements(TorchDispatchMode):
    """Counts elements of the results of elementwise operations, and those that reductions read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _REDUCTIONS:
            self.count += args[0].numel()
        elif torch.Tag.pointwise in func.tags and name != "_to_copy" and isinstance(out, Tensor):
            self.count += out.numel()
        return out
