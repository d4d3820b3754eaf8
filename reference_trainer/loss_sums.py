"""Losses between two reports: their sum, and sums by noise level, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LN_SIGMA_EDGES = tuple(range(-5, 6))
"""Borders of the bins of ln sigma; the first and the last bin are open."""

_BINS = len(LN_SIGMA_EDGES) + 1


@dataclass(slots=True)
class LossSums:
    """Sums over the images since the last report, of this process.

    Attributes:
        values: float64 `[1 + 2 bins]` on the device: the loss, then the static loss of each bin of
            ln sigma, then the images of each bin.
        count: elements of all processes that the loss is summed over.
    """

    values: Tensor
    count: int = 0

    @classmethod
    def on(cls, device: torch.device) -> LossSums:
        """Sums of nothing."""
        return cls(torch.zeros(1 + 2 * _BINS, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, static: Tensor, sigma: Tensor, count: int) -> None:
        """Add the images of a step; nothing waits for the device.

        Args:
            loss: training loss of each image, summed over its elements, `[n]`.
            static: lambda(sigma) |D - y|^2 of each image, likewise.
            sigma: noise level of each image, `[n]`.
            count: elements of the whole batch.
        """
        edges = torch.arange(LN_SIGMA_EDGES[0], LN_SIGMA_EDGES[-1] + 1, device=sigma.device)
        bins = torch.bucketize(sigma.log(), edges)
        member = bins[:, None] == torch.arange(_BINS, device=sigma.device)
        # where, not a product: a loss that is no number spoils its own bin only.
        by_bin = torch.where(member, static[:, None], 0.0).sum(0, dtype=torch.float64)
        total = loss.detach().sum(dtype=torch.float64)
        self.values += torch.cat([total[None], by_bin, member.sum(0, dtype=torch.float64)])
        self.count += count

    def reset(self) -> None:
        """Begin anew."""
        self.values.zero_()
        self.count = 0


def mean_loss(values: Tensor, count: int) -> float:
    """Mean training loss per element, of sums over all processes."""
    return float(values[0]) / count


def loss_by_ln_sigma(values: Tensor, elements: int) -> dict[str, float]:
    """Mean static loss per element of each bin that holds images, by the bin's range of ln sigma.

    Args:
        values: sums over all processes.
        elements: of an image.

    Example:
        >>> sums = LossSums.on(torch.device("cpu"))
        >>> one = torch.ones(2)
        >>> sums.add(one, torch.tensor([4.0, 8.0]), torch.tensor([0.9, 0.5]), 8)
        >>> loss_by_ln_sigma(sums.values, elements=4)
        {'-1..0': 1.5}
    """
    names = [f"..{LN_SIGMA_EDGES[0]}"]
    names += [f"{low}..{low + 1}" for low in LN_SIGMA_EDGES[:-1]]
    names += [f"{LN_SIGMA_EDGES[-1]}.."]
    rows = values[1:].reshape(2, _BINS).tolist()
    return {
        name: loss / images / elements
        for name, loss, images in zip(names, *rows, strict=True)
        if images
    }
