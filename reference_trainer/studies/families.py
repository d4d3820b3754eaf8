"""What most studies have in common: runs of a config and seed, and curves over lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from posthoc_ema.plotting import BandCurve, Panel
from reference_trainer.config import TrainConfig
from reference_trainer.studies.records import (
    Guide,
    Numbers,
    Quality,
    Run,
    Scale,
    Weights,
)
from reference_trainer.studies.statistics import Band, Optimum, optimum

LETTERS = ("A", "B", "C", "D", "E", "F", "G")
"""The configs of EDM2 table 1."""


def config_of_letter(scale: Scale, letter: str) -> TrainConfig:
    """The scale's run with another config of the paper."""
    if letter == "G":
        return scale.base
    from reference_trainer.presets import with_config

    return with_config(scale.base, letter)


def seeded_run(name: str, config: TrainConfig, seed: int) -> Run:
    """A run of one seed; its folder is `NAME-seed0` and so on."""
    return Run(name=f"{name}-seed{seed}", config=dataclasses.replace(config, seed=seed))


def config_runs(scale: Scale, letter: str, seeds: Sequence[int]) -> list[Run]:
    """The runs of a config, shared by all studies."""
    config = config_of_letter(scale, letter)
    return [seeded_run(letter, config, seed) for seed in seeds]


def snapshot_time(config: TrainConfig, share: float) -> int:
    """The stored time nearest to a share of the run, in images."""
    every = config.track.snapshot_every
    return max(1, round(share * config.total_images / every)) * every


def curve_of(
    scale: Scale, run: str, *, at: int | None = None, guide: Guide | None = None
) -> list[Quality]:
    """Quality of a run at every length of the scale."""
    return [
        Quality(weights=Weights(run=run, sigma_rel=s, at=at), guide=guide) for s in scale.sigma_rels
    ]


def distances(numbers: Numbers, curve: Sequence[Quality]) -> list[float]:
    """The measured distances of a curve."""
    return [numbers[measurement]["fd"] for measurement in curve]


def best_of(scale: Scale, numbers: Numbers, curve: Sequence[Quality]) -> Optimum:
    """Where a curve over the lengths of the scale is lowest."""
    return optimum(scale.sigma_rels, distances(numbers, curve))


def band_of_curves(label: str, x: Sequence[float], curves: Sequence[Sequence[float]]) -> BandCurve:
    """One curve per seed as a line with a band; the lowest median is circled."""
    bands = [Band.of(values) for values in zip(*curves, strict=True)]
    middle = [band.middle for band in bands]
    i = middle.index(min(middle))
    return BandCurve(
        label=label,
        x=tuple(x),
        low=tuple(band.low for band in bands),
        middle=tuple(middle),
        high=tuple(band.high for band in bands),
        mark=(x[i], middle[i]),
    )


def lengths_text(optima: Sequence[Optimum]) -> str:
    """Best lengths of the seeds for a table; a sign says that some are ends of the range."""
    band = Band.of([o.sigma_rel for o in optima])
    return band.text(2) + ("" if all(o.inside for o in optima) else " *")


def listed(values: Sequence[float], digits: int = 3) -> str:
    """Numbers in a sentence: `0.31, 0.29, 0.35`."""
    return ", ".join(f"{value:.{digits}g}" for value in values)


def quality_panel(
    title: str, scale: Scale, numbers: Numbers, curves: Mapping[str, Sequence[Sequence[Quality]]]
) -> Panel:
    """Distance against length, a band over the seeds for each label.

    Args:
        title: what stands above.
        scale: the scale, whose lengths are the axis.
        numbers: what was measured.
        curves: label to the measured curves, one per seed.
    """
    return Panel(
        title=title,
        xlabel="averaging length sigma_rel",
        ylabel="Frechet distance",
        curves=tuple(
            band_of_curves(label, scale.sigma_rels, [distances(numbers, c) for c in of])
            for label, of in curves.items()
        ),
        log_y=True,
    )
