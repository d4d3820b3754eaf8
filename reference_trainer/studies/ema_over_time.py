"""The best averaging length in the course of training (EDM2 section 4 and A.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reference_trainer.studies.families import (
    best_of,
    config_runs,
    curve_of,
    lengths_text,
    listed,
    quality_panel,
    snapshot_time,
)
from reference_trainer.studies.records import Claim, Numbers, Plan, Report, Scale, Study, Table
from reference_trainer.studies.statistics import Band

SHARES = (0.25, 0.5, 1.0)
"""Points of the run, as shares of its length."""


def _times(scale: Scale) -> list[int]:
    return [snapshot_time(scale.base, share) for share in SHARES]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """Config G, every length at every time."""
    del numbers
    runs = config_runs(scale, "G", seeds)
    curves = [curve_of(scale, run.name, at=at) for run in runs for at in _at(scale)]
    return Plan(runs=tuple(runs), measurements=tuple(m for curve in curves for m in curve))


def _at(scale: Scale) -> list[int | None]:
    """The times as they are measured: the end without a number, as other studies name it."""
    return [None if at == scale.base.total_images else at for at in _times(scale)]


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """Whether quality and best length move as in the paper."""
    runs, times = config_runs(scale, "G", seeds), _times(scale)
    curves = [[curve_of(scale, run.name, at=at) for run in runs] for at in _at(scale)]
    best = [[best_of(scale, numbers, curve) for curve in of] for of in curves]
    values = [Band.of([o.value for o in of]) for of in best]
    lengths = [Band.of([o.sigma_rel for o in of]) for of in best]
    steps = [at // scale.base.batch_size for at in times]
    rows = [
        (str(step), value.text(), lengths_text(of))
        for step, value, of in zip(steps, values, best, strict=True)
    ]
    return Report(
        claims=(
            Claim(
                text="quality at the best length improves throughout training",
                holds=all(b.middle < a.middle for a, b in itertools.pairwise(values)),
                evidence=f"best distance at {listed(SHARES)} of the run, medians: "
                + listed([v.middle for v in values]),
            ),
            Claim(
                text="the best relative length grows with training time",
                holds=all(
                    last.sigma_rel > first.sigma_rel
                    for first, last in zip(best[0], best[-1], strict=True)
                ),
                evidence=f"best sigma_rel, medians: {listed([v.middle for v in lengths], 2)}; from the "
                "first time to the last it grew in "
                f"{sum(z.sigma_rel > a.sigma_rel for a, z in zip(best[0], best[-1], strict=True))}"
                f" of {len(seeds)} seeds",
            ),
        ),
        tables=(
            Table(
                caption="Best Frechet distance and where it lies, config G",
                header=("steps", "best distance", "best sigma_rel"),
                rows=tuple(rows),
            ),
        ),
        panels=(
            quality_panel(
                "config G at three times",
                scale,
                numbers,
                {f"{step} steps": of for step, of in zip(steps, curves, strict=True)},
            ),
        ),
    )


STUDY = Study(
    name="ema-over-time",
    question="Does the best averaging length change in the course of training?",
    claim="Quality improves throughout training, and the best length slowly drifts to larger relative "
    "values (EDM2 section 4 and A.2, config G without guidance).",
    plan=plan,
    report=report,
)
