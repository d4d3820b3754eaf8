"""Growth of activations and weights per config (EDM2 figures 3 and 15)."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_ema.plotting import BandCurve, Panel
from reference_trainer.studies.families import LETTERS, config_runs, snapshot_time
from reference_trainer.studies.records import (
    Claim,
    Magnitudes,
    Numbers,
    Plan,
    Report,
    Scale,
    Study,
    Table,
    Weights,
)
from reference_trainer.studies.statistics import Band, exponent

SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Points of the run, as shares of its length."""

SETTLED = 3 / 8
"""Slopes are measured from this point on: before it every network finds its working point."""

SIGMA_REL = 0.05
"""Length of the averages that are looked at; the paper too looks at averaged weights (A.6)."""

GROWS, FLAT = 0.1, 0.05
"""Slopes of ln magnitude against ln time that count as growth, and as none."""

KINDS = ("activations", "weights")


def _times(scale: Scale) -> list[int]:
    return sorted({snapshot_time(scale.base, share) for share in SHARES})


def measurements_of(scale: Scale, run: str) -> list[Magnitudes]:
    """The magnitudes of a run at every time."""
    return [
        Magnitudes(weights=Weights(run=run, sigma_rel=SIGMA_REL, at=at)) for at in _times(scale)
    ]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """Every config, every seed, at every time."""
    del numbers
    runs = [
        run for seed in seeds for letter in LETTERS for run in config_runs(scale, letter, [seed])
    ]
    return Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in measurements_of(scale, run.name)),
    )


def slopes_of(
    scale: Scale,
    seeds: Sequence[int],
    numbers: Numbers,
    kind: str,
    letters: Sequence[str] = LETTERS,
) -> dict[str, list[float]]:
    """Slope of ln magnitude against ln time after the beginning, per config and seed.

    Args:
        scale: the scale.
        seeds: the seeds.
        numbers: what was measured.
        kind: "activations", "weights" or "activations-r8" and so on.
        letters: the configs.
    """
    times = _times(scale)
    first = times.index(snapshot_time(scale.base, SETTLED))
    return {
        letter: [
            exponent(
                times[first:],
                [numbers[m][kind] for m in measurements_of(scale, run.name)[first:]],
            )
            for run in config_runs(scale, letter, seeds)
        ]
        for letter in letters
    }


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """The slopes, and whether they are those of the paper's figure."""
    slopes = {kind: slopes_of(scale, seeds, numbers, kind) for kind in KINDS}
    rows = [
        (letter, *(Band.of(slopes[kind][letter]).text(2) for kind in KINDS)) for letter in LETTERS
    ]
    return Report(
        claims=(
            _grows("activations grow in C", slopes["activations"]["C"]),
            _grows("weights grow in D", slopes["weights"]["D"]),
            _flat("activations of E to G do not grow", slopes["activations"]),
            _flat("weights of E to G do not grow", slopes["weights"]),
        ),
        tables=(
            Table(
                caption=f"Slope of ln magnitude against ln time, from {SETTLED:.0%} of the run on",
                header=("config", *KINDS),
                rows=tuple(rows),
            ),
        ),
        panels=tuple(_panel(scale, seeds, numbers, kind) for kind in KINDS),
    )


def _grows(text: str, slopes: Sequence[float]) -> Claim:
    return Claim(
        text=text,
        holds=min(slopes) > GROWS,
        evidence=f"slope {Band.of(slopes).text(2)}, growth is more than {GROWS:g}",
    )


def _flat(text: str, slopes: dict[str, list[float]]) -> Claim:
    shown = {letter: Band.of(slopes[letter]) for letter in "EFG"}
    return Claim(
        text=text,
        holds=all(band.high < FLAT for band in shown.values()),
        evidence="slopes "
        + ", ".join(f"{letter} {band.text(2)}" for letter, band in shown.items())
        + f"; below {FLAT:g} is none",
    )


def _panel(scale: Scale, seeds: Sequence[int], numbers: Numbers, kind: str) -> Panel:
    """Magnitudes relative to the first ones, against the images seen."""
    times = _times(scale)
    curves = []
    for letter in LETTERS:
        of = [
            [numbers[m][kind] for m in measurements_of(scale, run.name)]
            for run in config_runs(scale, letter, seeds)
        ]
        relative = [[value / values[0] for value in values] for values in of]
        bands = [Band.of(values) for values in zip(*relative, strict=True)]
        curves.append(
            BandCurve(
                label=letter,
                x=tuple(times),
                low=tuple(band.low for band in bands),
                middle=tuple(band.middle for band in bands),
                high=tuple(band.high for band in bands),
            )
        )
    return Panel(
        title=f"magnitude of {kind}",
        xlabel="images seen",
        ylabel=f"root mean square / that at {times[0]}",
        curves=tuple(curves),
        log_y=True,
    )


STUDY = Study(
    name="growth",
    question="Do activations and weights grow in the course of training?",
    claim="Activations grow without bound in config C, weights in D, whose layers preserve the magnitude "
    "of activations; forced weight normalisation stops both, from E on (EDM2 2.2 to 2.3, figures 3 "
    "and 15).",
    plan=plan,
    report=report,
)
