"""The best averaging length against the size of the network (EDM2 section 4)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from reference_trainer.config import TrainConfig
from reference_trainer.studies.families import (
    best_of,
    config_runs,
    curve_of,
    lengths_text,
    listed,
    quality_panel,
    seeded_run,
)
from reference_trainer.studies.records import Claim, Numbers, Plan, Report, Run, Scale, Study, Table
from reference_trainer.studies.statistics import Band

WIDTHS = (0.5, 1.0, 2.0)
"""Factors of the channels."""


def _config(scale: Scale, width: float) -> TrainConfig:
    """Another width; alpha_ref falls with its root, about as from XS to XXL (EDM2 table 6)."""
    network, optim = scale.base.network, scale.base.optim
    return dataclasses.replace(
        scale.base,
        network=dataclasses.replace(network, model_channels=int(network.model_channels * width)),
        optim=dataclasses.replace(optim, lr_ref=optim.lr_ref * width**-0.5),
    )


def runs_of_width(scale: Scale, width: float, seeds: Sequence[int]) -> list[Run]:
    """The runs of one width; those of the scale itself are shared with other studies."""
    if width == 1.0:
        return config_runs(scale, "G", seeds)
    config = _config(scale, width)
    return [seeded_run(f"G-width{width:g}", config, seed) for seed in seeds]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """Every width, every seed, every length."""
    del numbers
    runs = [run for width in WIDTHS for run in runs_of_width(scale, width, seeds)]
    return Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in curve_of(scale, run.name)),
    )


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """Whether larger networks are better and want shorter averages."""
    curves = [
        [curve_of(scale, run.name) for run in runs_of_width(scale, width, seeds)]
        for width in WIDTHS
    ]
    best = [[best_of(scale, numbers, curve) for curve in of] for of in curves]
    values = [Band.of([o.value for o in of]) for of in best]
    lengths = [Band.of([o.sigma_rel for o in of]) for of in best]
    channels = [_config(scale, width).network.model_channels for width in WIDTHS]
    shorter = sum(
        large.sigma_rel < small.sigma_rel for small, large in zip(best[0], best[-1], strict=True)
    )
    rows = [
        (str(c), f"{_config(scale, w).optim.lr_ref:.3g}", value.text(), lengths_text(of))
        for c, w, value, of in zip(channels, WIDTHS, values, best, strict=True)
    ]
    return Report(
        claims=(
            Claim(
                text="a larger network is better at its best length",
                holds=all(b.middle < a.middle for a, b in itertools.pairwise(values)),
                evidence=f"best distance with {listed(channels)} channels, medians: "
                + listed([v.middle for v in values]),
            ),
            Claim(
                text="a larger network wants a shorter average",
                holds=shorter == len(seeds),
                evidence=f"best sigma_rel, medians: {listed([v.middle for v in lengths], 2)}; it is "
                f"shorter for the largest than for the smallest in {shorter} of {len(seeds)} seeds",
            ),
        ),
        tables=(
            Table(
                caption="Best Frechet distance and where it lies, config G",
                header=("channels", "alpha_ref", "best distance", "best sigma_rel"),
                rows=tuple(rows),
            ),
        ),
        panels=(
            quality_panel(
                "config G at three widths",
                scale,
                numbers,
                {f"{c} channels": of for c, of in zip(channels, curves, strict=True)},
            ),
        ),
    )


STUDY = Study(
    name="ema-vs-capacity",
    question="Does the best averaging length depend on the size of the network?",
    claim="More capacity asks for a shorter average: the best length for FID falls from 0.135 (XS) to "
    "0.070 (XXL) on ImageNet-512 and from 0.075 (S) to 0.040 (XL) on ImageNet-64 (EDM2 section 4, "
    "table 6).",
    plan=plan,
    report=report,
)
