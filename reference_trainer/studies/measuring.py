"""Measure the networks of one run: synthesize every length that is asked for in one pass, then go on."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posthoc_ema import synthesize
from reference_trainer.checkpoint import load_network
from reference_trainer.config import TrainConfig
from reference_trainer.data import load_dataset
from reference_trainer.guidance import EVERYWHERE, Guide, GuidedNetwork
from reference_trainer.loop import resolve_device
from reference_trainer.metrics import (
    Evaluator,
    find_metrics,
    make_references,
    open_evaluator,
    open_extractor,
    write_references,
)
from reference_trainer.precond import Precond
from reference_trainer.sampling import SamplerConfig, image_batches
from reference_trainer.studies.magnitudes import magnitudes
from reference_trainer.studies.records import (
    Magnitudes,
    Measurement,
    Quality,
    Scale,
    Weights,
)


class Networks:
    """Networks of averages, by what they are averages of; those of one run and time come together.

    Args:
        wanted: everything that will be asked for.
        configs: run -> its configuration.
        folders: run -> its folder.
        device: where the networks go.
    """

    def __init__(
        self,
        wanted: Sequence[Weights],
        configs: Mapping[str, TrainConfig],
        folders: Mapping[str, Path],
        device: torch.device,
    ) -> None:
        self._configs, self._folders, self._device = configs, folders, device
        self._wanted = wanted
        self._tensors: dict[tuple[str, int | None], dict[float, Mapping[str, Any]]] = {}

    def get(self, weights: Weights) -> Precond:
        """The network of an average, in evaluation mode."""
        averages = self._averages(weights.run, weights.at)
        tensors = mixed(averages, weights.sigma_rel, weights.overrides)
        return load_network(tensors, self._configs[weights.run], self._device)

    def _averages(self, run: str, at: int | None) -> dict[float, Mapping[str, Any]]:
        place = (run, at)
        if place not in self._tensors:
            lengths = sorted(
                {s for w in self._wanted if (w.run, w.at) == place for s in lengths_of(w)}
            )
            made = synthesize(self._folders[run] / "snapshots", lengths, at)
            # One time of the measured run at a time; a guide's averages are few.
            self._tensors = {k: v for k, v in self._tensors.items() if k[0] != run}
            self._tensors[place] = dict(zip(lengths, made, strict=True))
        return self._tensors[place]


def lengths_of(weights: Weights) -> list[float]:
    """Every length that an average is made of."""
    return [weights.sigma_rel, *(sigma_rel for _, sigma_rel in weights.overrides)]


def mixed(
    averages: Mapping[float, Mapping[str, Any]],
    sigma_rel: float,
    overrides: Sequence[tuple[str, float]],
) -> dict[str, Any]:
    """Tensors of one length, and those that a pattern names of another; the last that matches counts.

    Args:
        averages: length -> name -> tensor.
        sigma_rel: the length of all others.
        overrides: (shell pattern of names, sigma_rel).
    """
    chosen = {}
    for name in averages[sigma_rel]:
        lengths = [other for pattern, other in overrides if fnmatch.fnmatchcase(name, pattern)]
        chosen[name] = averages[lengths[-1] if lengths else sigma_rel][name]
    return chosen


def measure(
    measurements: Sequence[Measurement],
    scale: Scale,
    configs: Mapping[str, TrainConfig],
    folders: Mapping[str, Path],
    reference: Path,
    device: str,
) -> Iterator[tuple[Measurement, dict[str, float]]]:
    """Measure one after another.

    Args:
        measurements: what to measure.
        scale: how.
        configs: run -> its configuration.
        folders: run -> its folder.
        reference: file of `make_reference`, which may be missing for the metric of the digits.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        Each measurement with its numbers, as soon as they are there.
    """
    target = resolve_device(device)
    wanted = [w for m in measurements for w in _weights_of(m)]
    networks = Networks(wanted, configs, folders, target)
    evaluator = None
    for m in sorted(measurements, key=lambda m: m.weights.at or 0):
        network = networks.get(m.weights)
        if isinstance(m, Magnitudes):
            yield m, magnitudes(network, configs[m.weights.run], target)
        else:
            if evaluator is None:
                known = reference if reference.exists() else None
                evaluator = open_evaluator(scale.metric, reference=known, device=target)
            yield m, quality(guided(m, network, networks), scale, evaluator)


def _weights_of(measurement: Measurement) -> list[Weights]:
    guide = measurement.guide if isinstance(measurement, Quality) else None
    return [measurement.weights, *([guide.weights] if guide else [])]


def guided(measurement: Quality, network: Precond, networks: Networks) -> Precond | GuidedNetwork:
    """The network to sample from: with its guide, if it has one."""
    guide = measurement.guide
    if guide is None:
        return network
    interval = guide.interval or EVERYWHERE
    return GuidedNetwork(network, [Guide(networks.get(guide.weights), guide.weight, interval)])


def quality(
    network: Precond | GuidedNetwork, scale: Scale, evaluator: Evaluator
) -> dict[str, float]:
    """Frechet distance of images from the same seeds for every network, classes in turn.

    Returns:
        "fd", and "accuracy" where the metric gives it.
    """
    seeds = range(scale.num_images)
    labels = [i % network.label_dim for i in seeds] if network.label_dim else None
    sampler = SamplerConfig(num_steps=scale.sampler_steps)
    result = evaluator.measure(
        image_batches(network, seeds, batch_size=scale.batch_size, sampler=sampler, labels=labels)
    )
    (metric,) = evaluator.metrics
    named = {"fd": result[metric.keys[0]], **result}
    return {name: named[name] for name in ("fd", "accuracy") if name in named}


def make_reference(scale: Scale, path: Path, device: str) -> None:
    """Measure the training images themselves, once; the metric of the digits brings its own reference."""
    (metric,) = find_metrics(scale.metric)
    if metric.extractor == "digits" or path.exists():
        return
    extractor = open_extractor(metric.extractor, None, resolve_device(device))
    write_references(path, make_references(load_dataset(scale.base.data), [extractor]))
