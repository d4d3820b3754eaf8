"""The effect of the averaging length on each of the configs A to G (EDM2 figure 5a)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reference_trainer.studies.families import (
    LETTERS,
    best_of,
    config_runs,
    curve_of,
    distances,
    lengths_text,
    listed,
    quality_panel,
)
from reference_trainer.studies.records import (
    Claim,
    Numbers,
    Plan,
    Quality,
    Report,
    Scale,
    Study,
    Table,
)
from reference_trainer.studies.statistics import Band, Optimum

PAPER = {"B": 0.090, "C": 0.075, "D": 0.225, "E": 0.145, "F": 0.100, "G": 0.130}
"""Best lengths of the paper (figure 5a); config A has a traditional average."""


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """Every config, every seed, every length."""
    del numbers
    runs = [
        run for seed in seeds for letter in LETTERS for run in config_runs(scale, letter, [seed])
    ]
    return Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in curve_of(scale, run.name)),
    )


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """Best length and distance per config; which of the paper's statements they bear out."""
    curves = {
        letter: [curve_of(scale, run.name) for run in config_runs(scale, letter, seeds)]
        for letter in LETTERS
    }
    best = {
        letter: [best_of(scale, numbers, curve) for curve in curves[letter]] for letter in LETTERS
    }
    rise = {
        letter: Band.of([_rise(numbers, curve) for curve in curves[letter]]) for letter in LETTERS
    }
    return Report(
        claims=_claims(best, rise),
        tables=(_table(best, rise),),
        panels=(
            quality_panel("configs A to D", scale, numbers, {c: curves[c] for c in LETTERS[:4]}),
            quality_panel("configs D to G", scale, numbers, {c: curves[c] for c in LETTERS[3:]}),
        ),
    )


def _rise(numbers: Numbers, curve: Sequence[Quality]) -> float:
    """How much worse the worst measured length is than the best one: how much the length matters."""
    values = distances(numbers, curve)
    return max(values) / min(values)


def _claims(best: dict[str, list[Optimum]], rise: dict[str, Band]) -> tuple[Claim, ...]:
    medians = [Band.of([o.value for o in best[letter]]).middle for letter in LETTERS]
    lengths = {letter: Band.of([o.sigma_rel for o in best[letter]]).middle for letter in LETTERS}
    longest = sum(
        all(best["D"][i].sigma_rel >= best[letter][i].sigma_rel for letter in LETTERS)
        for i in range(len(best["D"]))
    )
    falls = all(later < earlier for earlier, later in itertools.pairwise(medians))
    return (
        Claim(
            text="each config is better than the one before it, at its own best length",
            holds=falls,
            evidence=f"best distance from A to G, medians: {listed(medians)}",
        ),
        Claim(
            text="G is better than A in every seed",
            holds=all(g.value < a.value for a, g in zip(best["A"], best["G"], strict=True)),
            evidence=f"A {_values(best['A'])}, G {_values(best['G'])}",
        ),
        Claim(
            text="D needs the longest average of all",
            holds=longest == len(best["D"]) and lengths["D"] > lengths["G"],
            evidence=f"in {longest} of {len(best['D'])} seeds; best lengths, medians: "
            + ", ".join(f"{letter} {value:.2g}" for letter, value in lengths.items()),
        ),
        Claim(
            text="the length matters more in G than in B",
            holds=rise["G"].middle > rise["B"].middle,
            evidence=f"worst over best measured distance: B {rise['B'].text()}, G {rise['G'].text()}",
        ),
    )


def _values(best: Sequence[Optimum]) -> str:
    return listed([o.value for o in best])


def _table(best: dict[str, list[Optimum]], rise: dict[str, Band]) -> Table:
    rows = [
        (
            letter,
            Band.of([o.value for o in best[letter]]).text(),
            lengths_text(best[letter]),
            f"{PAPER[letter]:g}" if letter in PAPER else "-",
            rise[letter].text(),
        )
        for letter in LETTERS
    ]
    return Table(
        caption="Best Frechet distance and where it lies",
        header=("config", "best distance", "best sigma_rel", "in the paper", "worst / best"),
        rows=tuple(rows),
    )


STUDY = Study(
    name="ema-by-config",
    question="Which averaging length is best for each of the configs A to G?",
    claim="The best length differs from config to config and lies in a narrow range (EDM2 3.3, "
    "figure 5a): B 0.090, C 0.075, D 0.225, E 0.145, F 0.100, G 0.130; each config improves on the "
    "one before it (table 1).",
    plan=plan,
    report=report,
)
