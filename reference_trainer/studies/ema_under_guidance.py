"""Averaging length and quality under guidance (EDM2 figure 6; arXiv 2406.02507; arXiv 2404.07724)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from posthoc_ema.plotting import Panel
from reference_trainer.config import TrainConfig
from reference_trainer.studies.families import (
    band_of_curves,
    config_runs,
    curve_of,
    distances,
    listed,
    seeded_run,
)
from reference_trainer.studies.records import (
    Claim,
    Guide,
    Numbers,
    Plan,
    Quality,
    Report,
    Run,
    Scale,
    Study,
    Table,
    Weights,
)
from reference_trainer.studies.statistics import Band

GUIDE_SIGMA_REL = 0.1
"""Averaging length of the guides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to guide.

    Attributes:
        name: for people.
        guide: name of the guiding runs.
        weights: guidance weights w that are tried.
        interval: noise levels where it acts, None for all.
    """

    name: str
    guide: str
    weights: tuple[float, ...]
    interval: tuple[float, float] | None = None


METHODS = (
    Method(name="autoguidance", guide="guide-weaker", weights=(1.25, 1.5, 2.0)),
    Method(name="classifier-free", guide="guide-unconditional", weights=(1.15, 1.3, 1.6)),
    Method(
        name="classifier-free in an interval",
        guide="guide-unconditional",
        weights=(1.3, 1.6, 2.0),
        interval=(0.3, 5.0),
    ),
)
"""What is compared; the main network is that of the scale, small and briefly trained."""


def _guide_config(scale: Scale, guide: str) -> TrainConfig:
    """A guide of half the channels: a quarter of the training, or half of it without labels."""
    base = scale.base
    network = dataclasses.replace(base.network, model_channels=base.network.model_channels // 2)
    total = base.total_images // 4
    if guide == "guide-unconditional":
        network, total = dataclasses.replace(network, label_dim=0), base.total_images // 2
    return dataclasses.replace(
        base,
        network=network,
        total_images=total,
        checkpoint_every=total,
        status_every=total,
        telemetry_every=None,
    )


def guide_runs(scale: Scale, guide: str, seeds: Sequence[int]) -> list[Run]:
    """The guiding networks; those of a seed guide the main network of that seed."""
    return [seeded_run(guide, _guide_config(scale, guide), seed) for seed in seeds]


def guided_lengths(scale: Scale) -> tuple[float, ...]:
    """Lengths of the main network under guidance: every other one of the scale."""
    return scale.sigma_rels[::2]


def _curve(scale: Scale, method: Method, weight: float, seed: int) -> list[Quality]:
    guide = Guide(
        weights=Weights(run=f"{method.guide}-seed{seed}", sigma_rel=GUIDE_SIGMA_REL),
        weight=weight,
        interval=method.interval,
    )
    return [
        Quality(weights=Weights(run=f"G-seed{seed}", sigma_rel=s), guide=guide)
        for s in guided_lengths(scale)
    ]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """The unguided curve, and every method with every weight at some lengths."""
    del numbers
    main = config_runs(scale, "G", seeds)
    guides = [
        run
        for guide in dict.fromkeys(method.guide for method in METHODS)
        for run in guide_runs(scale, guide, seeds)
    ]
    guided = [
        m
        for seed in seeds
        for method in METHODS
        for weight in method.weights
        for m in _curve(scale, method, weight, seed)
    ]
    unguided = [m for run in main for m in curve_of(scale, run.name)]
    return Plan(runs=(*main, *guides), measurements=(*unguided, *guided))


@dataclass(frozen=True, slots=True)
class _Best:
    """The lowest distance of a method in one seed, and where it was found."""

    distance: float
    weight: float
    sigma_rel: float


def _best_unguided(scale: Scale, numbers: Numbers, seed: int) -> _Best:
    """Over the same lengths as the guided ones."""
    lengths = guided_lengths(scale)
    values = [
        numbers[m]["fd"] for m in curve_of(scale, f"G-seed{seed}") if m.weights.sigma_rel in lengths
    ]
    return _Best(min(values), 1.0, lengths[values.index(min(values))])


def _best_guided(scale: Scale, numbers: Numbers, method: Method, seed: int) -> _Best:
    found = [
        _Best(numbers[m]["fd"], weight, m.weights.sigma_rel)
        for weight in method.weights
        for m in _curve(scale, method, weight, seed)
    ]
    return min(found, key=lambda best: best.distance)


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """How far each method lowers the distance, and at which length."""
    unguided = [_best_unguided(scale, numbers, seed) for seed in seeds]
    guided = {
        method.name: [_best_guided(scale, numbers, method, seed) for seed in seeds]
        for method in METHODS
    }
    rows = [_row("none", unguided), *(_row(name, of) for name, of in guided.items())]
    return Report(
        claims=(
            *(_lowers(name, unguided, of) for name, of in guided.items()),
            _interval_helps(guided),
            *(_shorter(name, unguided, of) for name, of in guided.items()),
        ),
        tables=(
            Table(
                caption="Lowest Frechet distance, and weight and main network's length it was found at",
                header=("guidance", "distance", "weight, by seed", "sigma_rel, by seed"),
                rows=tuple(rows),
            ),
        ),
        panels=tuple(_panel(scale, seeds, numbers, method) for method in METHODS),
    )


def _row(name: str, best: Sequence[_Best]) -> tuple[str, ...]:
    return (
        name,
        Band.of([b.distance for b in best]).text(),
        listed([b.weight for b in best]),
        listed([b.sigma_rel for b in best]),
    )


def _lowers(name: str, unguided: Sequence[_Best], guided: Sequence[_Best]) -> Claim:
    pairs = [f"{u.distance:.3g} to {g.distance:.3g}" for u, g in zip(unguided, guided, strict=True)]
    return Claim(
        text=f"guidance ({name}) lowers the distance in every seed",
        holds=all(g.distance < u.distance for u, g in zip(unguided, guided, strict=True)),
        evidence=", ".join(pairs),
    )


def _interval_helps(guided: dict[str, list[_Best]]) -> Claim:
    whole, limited = guided["classifier-free"], guided["classifier-free in an interval"]
    better = sum(b.distance < a.distance for a, b in zip(whole, limited, strict=True))
    return Claim(
        text="classifier-free guidance is better in an interval of noise levels than at all of them",
        holds=better == len(whole),
        evidence=f"in {better} of {len(whole)} seeds",
    )


def _shorter(name: str, unguided: Sequence[_Best], guided: Sequence[_Best]) -> Claim:
    shorter = sum(g.sigma_rel < u.sigma_rel for u, g in zip(unguided, guided, strict=True))
    return Claim(
        text=f"guidance ({name}) wants a shorter average",
        holds=shorter == len(unguided),
        evidence=f"in {shorter} of {len(unguided)} seeds",
    )


def _panel(scale: Scale, seeds: Sequence[int], numbers: Numbers, method: Method) -> Panel:
    lengths = guided_lengths(scale)
    unguided = [
        [
            numbers[m]["fd"]
            for m in curve_of(scale, f"G-seed{seed}")
            if m.weights.sigma_rel in lengths
        ]
        for seed in seeds
    ]
    curves = [band_of_curves("no guidance", lengths, unguided)]
    curves += [
        band_of_curves(
            f"w = {weight:g}",
            lengths,
            [distances(numbers, _curve(scale, method, weight, seed)) for seed in seeds],
        )
        for weight in method.weights
    ]
    return Panel(
        title=method.name,
        xlabel="main network's sigma_rel",
        ylabel="Frechet distance",
        curves=tuple(curves),
        log_y=True,
    )


STUDY = Study(
    name="ema-under-guidance",
    question="How does guidance change quality and the best averaging length?",
    claim="Guidance lowers FID: EDM2-S 2.56 to 2.23 with classifier-free guidance (and the best length "
    "falls from 0.130 to 0.025), to 1.68 in an interval of noise levels, to 1.34 with autoguidance, "
    "whose two networks want lengths of their own (EDM2 figure 6; arXiv 2404.07724; arXiv 2406.02507).",
    plan=plan,
    report=report,
)
