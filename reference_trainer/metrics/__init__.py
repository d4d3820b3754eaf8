"""Image quality as a number: distances to real images in the features of a fixed network.

`evaluate_images` measures images in memory; `open_evaluator` measures streams of them, over several
processes. The metrics are in `METRICS`: `fid`, `fd-dinov2`, `fd-digits`, `kid`, `precision-recall` ...
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import MetricError
from reference_trainer.metrics.catalogue import METRICS, Metric, find_metrics
from reference_trainer.metrics.collection import ImageBatch, blocks, collect, in_batches, of_dataset
from reference_trainer.metrics.digit_classifier import digit_reference_statistics
from reference_trainer.metrics.evaluation import (
    Confidence,
    Evaluator,
    confidence,
    open_evaluator,
)
from reference_trainer.metrics.extractors import EXTRACTORS, Extractor, open_extractor
from reference_trainer.metrics.frechet import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    gaussian_distance,
)
from reference_trainer.metrics.reference import Reference, read_references, write_references
from reference_trainer.metrics.reference_import import import_references
from reference_trainer.metrics.reference_making import choose, make_references

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Confidence",
    "Evaluator",
    "Extractor",
    "FeatureStatistics",
    "ImageBatch",
    "Metric",
    "Moments",
    "Reference",
    "blocks",
    "choose",
    "collect",
    "confidence",
    "digit_reference_statistics",
    "evaluate_images",
    "find_metrics",
    "frechet_distance",
    "gaussian_distance",
    "import_references",
    "in_batches",
    "make_references",
    "of_dataset",
    "open_evaluator",
    "open_extractor",
    "read_references",
    "write_references",
]

_BATCH = {"digits": 1024, "inception": 64, "dinov2": 64}


def evaluate_images(
    images: npt.NDArray[np.uint8],
    metric: str = "fd-digits",
    *,
    labels: npt.ArrayLike | None = None,
    reference: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, float | int]:
    """Measure the quality of generated images in memory, by one metric.

    A Frechet distance falls with the number of images, so compare only numbers from equally many. For
    `fd-digits`, real digits drawn with replacement give about 0.1 to 0.16 at 1797 images, 0.4 to 0.7 at
    500 and 1.5 to 3 at 100; pixel noise of standard deviation 20 (of 255) gives 1.2, of 40 gives 5.

    Args:
        images: uint8 `[n, c, h, w]`, n at least 2, c 1 or 3; `[n, 1, 8, 8]` for the digits metrics.
        metric: a name of `METRICS`. `"fd-digits"` is the Frechet distance to all 1797 digits in the 48
            features of the shipped digit classifier.
        labels: class that each image was asked to show, `[n]`; adds the accuracy to digits metrics.
        reference: file of reference statistics; the digits metrics need none.
        weights: of the extractor, see `open_extractor`.
        device: where the extractor computes.

    Returns:
        The metric's numbers by its keys (`fd`: at least 0, smaller is better), `num_images`, and with
        labels `accuracy`, the share of images that the classifier finds to show their class.

    Raises:
        ConfigError: the metric is unknown, or needs a reference.
        MetricError: the images or labels have the wrong shape, or there are fewer than two.
    """
    (chosen,) = find_metrics([metric])
    evaluator = open_evaluator(
        [metric],
        reference=reference,
        weights={} if weights is None else {chosen.extractor: weights},
        device=device,
    )
    if images.ndim == 0:
        raise MetricError("images must have shape [n, c, h, w], got a single number.")
    asked = None if labels is None else np.asarray(labels, dtype=np.int64)
    batches = in_batches(images, asked, batch_size=_BATCH[chosen.extractor])
    return {**evaluator.measure(batches), "num_images": len(images)}
