"""Kernel distance, precision and recall: metrics that compare the features themselves.

The formulas are torch-fidelity's; it is given features, so no image is seen twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posthoc_ema.errors import MetricError
from reference_trainer.metrics.inception import load_torch_fidelity

SUBSETS, SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
Features = npt.NDArray[np.float32]


def kernel_distance(generated: Features, real: Features) -> float:
    """Kernel distance: the unbiased squared MMD under the kernel (x.y / d + 1)^3, mean of 100 subsets.

    Binkowski et al., arXiv 1801.01401. It may be slightly below 0 for equal distributions.

    Args:
        generated: `[n, d]`.
        real: `[m, d]`. Subsets hold 1000 vectors of each, or min(n, m) if there are fewer.

    Raises:
        MetricError: a set has fewer than two vectors, or torch-fidelity is missing.
    """
    _need(2, generated, real)
    size = min(SUBSET_SIZE, len(generated), len(real))
    result: dict[str, Any] = load_formulas("kid").kid_features_to_metric(
        torch.from_numpy(generated).double(),
        torch.from_numpy(real).double(),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        verbose=False,
    )
    return float(result["kernel_inception_distance_mean"])


def precision_recall(generated: Features, real: Features) -> tuple[float, float]:
    """Share of generated images near real ones (precision), of real ones near generated ones (recall).

    Near is within the distance to the third neighbour; Kynkaanniemi et al., arXiv 1904.06991.

    Args:
        generated: `[n, d]`.
        real: `[m, d]`; take about as many of both.

    Returns:
        precision and recall, 0..1.

    Raises:
        MetricError: a set has no third neighbours, or torch-fidelity is missing.
    """
    _need(NEIGHBOURS + 1, generated, real)
    result: dict[str, Any] = load_formulas("precision-recall").prc_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(real),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return float(result["precision"]), float(result["recall"])


def load_formulas(measure: str) -> Any:
    """The module of torch-fidelity with a measure's formulas, "kid" or "precision-recall".

    Raises:
        MetricError: torch-fidelity cannot be loaded.
    """
    return load_torch_fidelity({"kid": "metric_kid", "precision-recall": "metric_prc"}[measure])


def _need(count: int, generated: Features, real: Features) -> None:
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < count:
            raise MetricError(
                f"this metric needs the features of at least {count} {name} images, got "
                f"{len(features)}. Take more images."
            )
