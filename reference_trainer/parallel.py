"""One network, several processes: replicas (DDP) or shards (FSDP2), and gradients in several passes.

Whatever the number of processes and of passes, the gradients that the optimizer sees are those of the mean
over the whole batch, up to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from posthoc_ema import ConfigError
from reference_trainer.config import ComputeConfig, LossConfig, TrainConfig
from reference_trainer.distributed import DistributedContext
from reference_trainer.losses import TrainingLoss
from reference_trainer.precond import Precond
from reference_trainer.seeds import seeded

_NAMES = inspect.signature(DistributedDataParallel).parameters
_CONSTANT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}
"""Buffers never change, so they need not be sent in every pass; older versions of PyTorch name it so."""


def images_per_pass(config: TrainConfig, ranks: DistributedContext) -> int:
    """Images of one forward pass of one process.

    Raises:
        ConfigError: the batch does not divide into equal parts.
    """
    share, left_over = divmod(config.batch_size, ranks.world_size)
    if left_over:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, which is {ranks.world_size}, "
            f"got {config.batch_size}."
        )
    micro = config.compute.microbatch or share
    if share % micro:
        raise ConfigError(
            f"compute.microbatch must divide the {share} images that each of {ranks.world_size} processes "
            f"has of a batch, got {micro}. Try {next_lower_divisor(share, micro)}."
        )
    return micro


def next_lower_divisor(number: int, below: float) -> int:
    """The largest divisor of `number` that is at most `below`, at least 1.

    Example:
        >>> next_lower_divisor(24, 7)
        6
    """
    return next(k for k in range(max(1, min(number, math.floor(below))), 0, -1) if number % k == 0)


@contextlib.contextmanager
def without_false_alarms() -> Iterator[None]:
    """Leave out two warnings of torch that are about speed, and about views that nobody changes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        yield


def shard(network: Precond, ranks: DistributedContext) -> None:
    """Spread the weights over the processes, block by block (FSDP2), in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in (*network.net.enc.values(), *network.net.dec.values()):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def new_loss(
    network: Precond, loss: LossConfig, compute: ComputeConfig, ranks: DistributedContext
) -> nn.Module:
    """The loss of a network as it is called in training: compiled and replicated, if asked for."""
    module: nn.Module = TrainingLoss(network, loss)
    if compute.compile:
        module.compile()
    if ranks.world_size > 1 and compute.parallel == "ddp":
        return DistributedDataParallel(module, gradient_as_bucket_view=True, **_CONSTANT_BUFFERS)
    return module


def settle_buckets(loss: nn.Module, config: TrainConfig, ranks: DistributedContext) -> None:
    """Have replicas lay out for good the buffers in which gradients travel; leaves no gradients.

    They do so after their first backward pass, and in which order three or more processes sum depends on
    the layout: a resumed run would otherwise begin with another one than it had. So the first pass is this
    one, of images that are nothing.
    """
    if not isinstance(loss, DistributedDataParallel):
        return
    network, n = config.network, images_per_pass(config, ranks)
    shape = (n, network.img_channels, network.img_resolution, network.img_resolution)
    images = torch.zeros(shape, device=ranks.device)
    labels = torch.zeros(n, dtype=torch.int64, device=ranks.device)
    with seeded(config.seed, ranks.device):  # dropout
        each, _ = loss(images, labels, torch.ones(n, device=ranks.device), images)
        each.sum().backward()
    loss.zero_grad(set_to_none=True)


@contextlib.contextmanager
def gradient_pass(loss: nn.Module, network: Precond, *, last: bool) -> Iterator[None]:
    """One forward and backward pass of a step: processes exchange gradients in the last one only."""
    if is_sharded(network):
        network.set_requires_gradient_sync(last)  # type: ignore[operator]
    if isinstance(loss, DistributedDataParallel) and not last:
        with loss.no_sync():
            yield
    else:
        yield


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; its module takes a second to import, and is not for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has been applied; see `is_cut`."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(network, module.FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, outside autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process holds a part; all processes call it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, cut and placed like another one; every process has the whole.

    Args:
        tensor: the whole, anywhere.
        example: a tensor of the same shape, plain or cut.
    """
    tensor = tensor.to(example.device)
    if not is_cut(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = example.device_mesh, example.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
