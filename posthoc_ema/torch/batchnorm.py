"""Running statistics of BatchNorm for weights that training never ran with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from posthoc_ema.errors import ConfigError
from posthoc_ema.torch.swap import Backup


def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None
) -> None:
    """Recompute the running statistics of BatchNorm layers for the weights that are in the model now.

    Statistics belong to weights: those that training gathered fit the raw weights, not an average. Call
    it inside `swapped` (the statistics of training come back at its end), or on a model that was loaded
    with synthesized weights. Each statistic becomes the mean over the batches
    (`torch.optim.swa_utils.update_bn`). The model runs in train mode meanwhile, dropout included; its
    train flags are put back.

    Args:
        model: the module; nothing happens if it has no BatchNorm.
        batches: inputs of the model, or tuples and lists whose first element is one. A few hundred
            samples do; they should be training data.
        device: where inputs are moved first; by default they stay where they are.

    Raises:
        ConfigError: there was no batch; the statistics are as before.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> recalibrate_batchnorm(model, [torch.tensor([[1.0], [3.0]])])
        >>> model[0].running_mean.item()
        2.0
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    backup = Backup(model, [])
    count = 0

    def counted() -> Iterator[Any]:
        nonlocal count
        for batch in batches:
            count += 1
            yield batch

    done = False
    try:
        where = None if device is None else torch.device(device)
        update_bn(counted(), model, where)
        done = count > 0 or not layers
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        backup.restore_flags() if done else backup.restore()
    if not done:
        raise ConfigError(
            "recalibrate_batchnorm needs at least one batch, got none. Pass batches of inputs, such as "
            "a DataLoader of training data."
        )
