"""One group of tensors with another averaging length than the rest (EDM2 section 3.3, A.4, D.6)."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_ema.plotting import Panel
from reference_trainer.studies.families import band_of_curves, config_runs, curve_of, distances
from reference_trainer.studies.records import (
    Claim,
    Numbers,
    Plan,
    Quality,
    Report,
    Scale,
    Study,
    Table,
    Weights,
)
from reference_trainer.studies.statistics import Band

LETTERS = ("B", "G")
"""The configs that the paper compares."""

GROUPS = {
    "first convolution": "*.branch.conv0.weight",
    "second convolution": "*.branch.conv1.weight",
    "modulation": "*.branch.emb.weight",
    "attention": "*.attention.*",
    "embedding": "net.embedding.*",
    "input and output": "net.[so][tu]*",
}
"""Title -> shell pattern of tensor names."""

GAIN = 0.02
"""A fall of the distance by less than this share counts as no gain."""


def varied_lengths(scale: Scale, base: float) -> list[float]:
    """The shortest and the longest length and those about a factor 2 from the common one, and it."""
    lengths = scale.sigma_rels
    near = [min(lengths, key=lambda s: abs(s / (base * f) - 1)) for f in (0.5, 2.0)]
    return sorted({lengths[0], *near, base, lengths[-1]})


def _common(scale: Scale, numbers: Numbers, letter: str, seeds: Sequence[int]) -> float:
    """The measured length with the lowest median distance."""
    curves = [curve_of(scale, run.name) for run in config_runs(scale, letter, seeds)]
    medians = [
        Band.of(values).middle
        for values in zip(*(distances(numbers, c) for c in curves), strict=True)
    ]
    return scale.sigma_rels[medians.index(min(medians))]


def _varied(scale: Scale, run: str, base: float, pattern: str) -> list[Quality]:
    """One group's length varied, all others at the common one."""
    return [
        Quality(
            weights=Weights(run=run, sigma_rel=base, overrides=() if s == base else ((pattern, s),))
        )
        for s in varied_lengths(scale, base)
    ]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """First the common length of each config; then, around it, each group."""
    runs = [run for letter in LETTERS for run in config_runs(scale, letter, seeds)]
    curves = [m for run in runs for m in curve_of(scale, run.name)]
    if not all(m in numbers for m in curves):
        return Plan(runs=tuple(runs), measurements=tuple(curves))
    varied = [
        m
        for letter in LETTERS
        for run in config_runs(scale, letter, seeds)
        for pattern in GROUPS.values()
        for m in _varied(scale, run.name, _common(scale, numbers, letter, seeds), pattern)
    ]
    return Plan(runs=tuple(runs), measurements=tuple(dict.fromkeys([*curves, *varied])))


def ratios(
    scale: Scale, seeds: Sequence[int], numbers: Numbers, letter: str, pattern: str
) -> list[list[float]]:
    """Distance with a group varied over that with one length for all: per seed, per length."""
    base = _common(scale, numbers, letter, seeds)
    results = []
    for run in config_runs(scale, letter, seeds):
        values = distances(numbers, _varied(scale, run.name, base, pattern))
        common = values[varied_lengths(scale, base).index(base)]
        results.append([value / common for value in values])
    return results


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """How much the best length of one group alone gains, in B and in G."""
    base = {letter: _common(scale, numbers, letter, seeds) for letter in LETTERS}
    medians = {
        letter: {
            title: _medians(ratios(scale, seeds, numbers, letter, pattern))
            for title, pattern in GROUPS.items()
        }
        for letter in LETTERS
    }
    rows, gains = [], dict.fromkeys(LETTERS, 0.0)
    for letter in LETTERS:
        lengths = varied_lengths(scale, base[letter])
        for title, values in medians[letter].items():
            i = values.index(min(values))
            gains[letter] = max(gains[letter], 1 - values[i])
            change = f"{values[i] - 1:+.1%} at {lengths[i]:g}"
            ends = f"{values[0] - 1:+.1%}, {values[-1] - 1:+.1%}"
            rows.append((letter, f"{base[letter]:g}", title, change, ends))
    return Report(
        claims=(
            Claim(
                text="in B one group of tensors with a length of its own lowers the distance",
                holds=gains["B"] >= GAIN,
                evidence=f"largest gain of a group, medians over seeds: {gains['B']:.1%}",
            ),
            Claim(
                text="in G no group gains from a length of its own",
                holds=gains["G"] < GAIN,
                evidence=f"largest gain of a group, medians over seeds: {gains['G']:.1%}; less than "
                f"{GAIN:.0%} counts as none",
            ),
        ),
        tables=(
            Table(
                caption="Change of the Frechet distance when one group has another length, medians",
                header=("config", "common length", "group", "best", "at shortest, longest"),
                rows=tuple(rows),
            ),
        ),
        panels=tuple(_panel(scale, seeds, numbers, letter, base[letter]) for letter in LETTERS),
    )


def _medians(values: Sequence[Sequence[float]]) -> list[float]:
    return [Band.of(of).middle for of in zip(*values, strict=True)]


def _panel(scale: Scale, seeds: Sequence[int], numbers: Numbers, letter: str, base: float) -> Panel:
    return Panel(
        title=f"config {letter}, the others at {base:g}",
        xlabel="the group's sigma_rel",
        ylabel="distance / that with one length",
        curves=tuple(
            band_of_curves(
                title,
                varied_lengths(scale, base),
                ratios(scale, seeds, numbers, letter, pattern),
            )
            for title, pattern in GROUPS.items()
        ),
    )


STUDY = Study(
    name="per-tensor-ema",
    question="Do parts of the network want averaging lengths of their own?",
    claim="In config B the length of a single tensor changes FID by up to 10 %, some want very short and "
    "some very long averages; in config G all tensors agree, and none gains (EDM2 3.3, A.4).",
    plan=plan,
    report=report,
)
