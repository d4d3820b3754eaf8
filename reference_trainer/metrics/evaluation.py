"""From images to numbers: the metrics asked for, their extractors and their references, put together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from posthoc_ema.errors import ConfigError, MetricError
from reference_trainer.data import load_dataset
from reference_trainer.metrics.catalogue import Metric, find_metrics
from reference_trainer.metrics.collection import (
    FeatureSet,
    ImageBatch,
    Ranks,
    collect,
    in_batches,
    keep_all,
)
from reference_trainer.metrics.extractors import Extractor, open_extractor
from reference_trainer.metrics.feature_sets import (
    kernel_distance,
    load_formulas,
    precision_recall,
)
from reference_trainer.metrics.frechet import frechet_distance
from reference_trainer.metrics.reference import Reference, check_fits, read_references


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """Measures sets of images against references. Made by `open_evaluator`.

    Attributes:
        metrics: what is measured.
        extractors: extractor name -> network, those that the metrics need.
        references: extractor name -> the real side.
    """

    metrics: tuple[Metric, ...]
    extractors: Mapping[str, Extractor]
    references: Mapping[str, Reference]

    def measure(
        self,
        batches: Iterable[ImageBatch],
        *,
        ranks: Ranks | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """Measure one set of images, each of which is looked at once.

        Args:
            batches: this process's images.
            ranks: the processes that share the set; all of them must call this.
            on_batch: called after each batch with the number of its images.

        Returns:
            The numbers by the keys of the metrics, and "accuracy" where the extractor has classes and the
            images have labels; empty on other processes than the first.

        Raises:
            MetricError: there are too few images, or they do not fit.
        """
        whole = {m.extractor: keep_all for m in self.metrics if m.needs_features}
        sets = collect(
            batches, list(self.extractors.values()), keep=whole, ranks=ranks, on_batch=on_batch
        )
        if ranks is not None and not ranks.is_main:
            return {}
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            numbers |= _numbers(metric, sets[metric.extractor], self.references[metric.extractor])
        for found in sets.values():
            if found.right is not None:
                numbers["accuracy"] = found.right / found.statistics.count
        return numbers


def _numbers(metric: Metric, found: FeatureSet, reference: Reference) -> dict[str, float]:
    if metric.measure == "frechet":
        values: tuple[float, ...] = (frechet_distance(found.statistics, reference.moments),)
    else:
        assert found.features is not None  # kept for these metrics
        assert reference.features is not None  # checked when the reference was opened
        if metric.measure == "kid":
            values = (kernel_distance(found.features, reference.features),)
        else:
            values = precision_recall(found.features, reference.features)
    return dict(zip(metric.keys, values, strict=True))


def open_evaluator(
    metrics: str | Sequence[str],
    *,
    reference: str | Path | None = None,
    weights: Mapping[str, str | Path] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluator:
    """Load what some metrics need.

    Args:
        metrics: names of `METRICS`.
        reference: file of reference statistics; the metrics of digits have theirs with the package.
        weights: extractor name -> its weights, see `open_extractor`.
        device: where the extractors compute.

    Raises:
        ConfigError: a metric is unknown, weights are given for an extractor that is not used, or a metric
            needs a reference and there is none.
        MetricError: an extractor cannot be loaded, or the reference does not go with it.
    """
    chosen, weights = find_metrics(metrics), weights or {}
    names = list(dict.fromkeys(metric.extractor for metric in chosen))
    unused = [name for name in weights if name not in names]
    if unused:
        raise ConfigError(
            f"weights are given for {unused[0]}, and the metrics use {', '.join(names)}. Leave them out."
        )
    for metric in chosen:
        if metric.needs_features:
            load_formulas(metric.measure)  # missing packages are told before any image is made
    stored = {} if reference is None else read_references(reference)
    references = {name: _reference(name, chosen, stored, reference) for name in names}
    extractors = {name: open_extractor(name, weights.get(name), device) for name in names}
    for name in names:
        check_fits(references[name], extractors[name], str(reference or "the package"))
    return Evaluator(chosen, extractors, references)


def _reference(
    name: str,
    metrics: Sequence[Metric],
    stored: Mapping[str, Reference],
    place: str | Path | None,
) -> Reference:
    users = [metric for metric in metrics if metric.extractor == name]
    if name == "digits" and name not in stored:
        return digit_reference()
    if name not in stored:
        held = f"{place} holds statistics of {', '.join(stored)}" if place else "none is given"
        raise ConfigError(
            f"metric {users[0].name} needs reference statistics of the extractor {name}, and {held}. Make "
            f"them with `phema reference make DATA --metric {users[0].name} --out REF.safetensors` and give "
            "--ref."
        )
    wanting = [metric.name for metric in users if metric.needs_features]
    if wanting and stored[name].features is None:
        raise ConfigError(
            f"metric {wanting[0]} compares single features, and {place} holds only statistics of {name}. "
            "Make it with `phema reference make --features 50000`."
        )
    return stored[name]


@functools.lru_cache(maxsize=1)
def digit_reference() -> Reference:
    """All 1797 digits in the features of the shipped classifier: the real side of the digits metrics."""
    digits, extractor = load_dataset("digits"), open_extractor("digits")
    found = collect(
        in_batches(digits.images, batch_size=1024), [extractor], keep={"digits": keep_all}
    )["digits"]
    return Reference(
        "digits",
        found.statistics.moments,
        found.features,
        extractor.weights_hash,
        "digits",
        digits.fingerprint,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Confidence:
    """Several measurements of one thing.

    Attributes:
        mean: their mean.
        min: the smallest; EDM2 reports the smallest FID of three.
        max: the largest.
        standard_error: of the mean; nan for a single measurement.
    """

    mean: float
    min: float
    max: float
    standard_error: float


def confidence(values: Sequence[float]) -> Confidence:
    """Summarise measurements of independent sets of images (other seeds).

    Args:
        values: at least one.

    Raises:
        MetricError: there are none.

    Example:
        >>> confidence([1.0, 2.0, 3.0])
        Confidence(mean=2.0, min=1.0, max=3.0, standard_error=0.5773502691896258)
    """
    if not values:
        raise MetricError("confidence needs at least one measurement, got none.")
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Confidence(float(x.mean()), float(x.min()), float(x.max()), error)
