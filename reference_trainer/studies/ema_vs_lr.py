"""The best averaging length against the learning rate (EDM2 A.3): sigma_rel ~ 1/(alpha_ref^2 t_ref)?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from posthoc_ema.plotting import BandCurve, Panel
from reference_trainer.config import TrainConfig
from reference_trainer.studies.families import (
    band_of_curves,
    best_of,
    config_runs,
    curve_of,
    distances,
    lengths_text,
    seeded_run,
)
from reference_trainer.studies.records import (
    Claim,
    Numbers,
    Plan,
    Quality,
    Report,
    Run,
    Scale,
    Study,
    Table,
)
from reference_trainer.studies.statistics import Band, Optimum, exponent

SETTINGS = ((0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.25))
"""Factors of (alpha_ref, t_ref)."""

NEAR = 0.35
"""An exponent this near to the paper's counts as agreement."""


def _config(scale: Scale, alpha: float, t: float) -> TrainConfig:
    optim = scale.base.optim
    assert optim.t_ref is not None, "config G has a decaying learning rate"
    changed = dataclasses.replace(optim, lr_ref=optim.lr_ref * alpha, t_ref=optim.t_ref * t)
    return dataclasses.replace(scale.base, optim=changed)


def runs_of_setting(scale: Scale, alpha: float, t: float, seeds: Sequence[int]) -> list[Run]:
    """The runs of one setting; that of the scale itself is shared with other studies."""
    if (alpha, t) == (1.0, 1.0):
        return config_runs(scale, "G", seeds)
    config = _config(scale, alpha, t)
    return [seeded_run(f"G-lr{alpha:g}-t{t:g}", config, seed) for seed in seeds]


def plan(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Plan:
    """Every setting, every seed, every length."""
    del numbers
    runs = [run for alpha, t in SETTINGS for run in runs_of_setting(scale, alpha, t, seeds)]
    return Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in curve_of(scale, run.name)),
    )


def report(scale: Scale, seeds: Sequence[int], numbers: Numbers) -> Report:
    """The exponents, and what a fixed length would have cost."""
    curves = [
        [curve_of(scale, run.name) for run in runs_of_setting(scale, alpha, t, seeds)]
        for alpha, t in SETTINGS
    ]
    best = [[best_of(scale, numbers, curve) for curve in of] for of in curves]
    rows = [
        (
            f"{_config(scale, *setting).optim.lr_ref:g}",
            f"{_config(scale, *setting).optim.t_ref:g}",
            f"{setting[0] ** 2 * setting[1]:g}",
            Band.of([o.value for o in of]).text(),
            lengths_text(of),
        )
        for setting, of in zip(SETTINGS, best, strict=True)
    ]
    return Report(
        claims=(*_exponents(best, len(seeds)), _retuned(scale, numbers, curves, best)),
        tables=(
            Table(
                caption="Best Frechet distance and where it lies, config G",
                header=(
                    "alpha_ref",
                    "t_ref",
                    "relative alpha^2 t",
                    "best distance",
                    "best sigma_rel",
                ),
                rows=tuple(rows),
            ),
        ),
        panels=(_curves_panel(scale, numbers, curves), _law_panel(best)),
    )


def _exponents(best: list[list[Optimum]], seeds: int) -> tuple[Claim, ...]:
    alphas = [i for i, (_, t) in enumerate(SETTINGS) if t == 1.0]
    of_alpha = [
        exponent([SETTINGS[i][0] for i in alphas], [best[i][s].sigma_rel for i in alphas])
        for s in range(seeds)
    ]
    of_product = [
        exponent([a**2 * t for a, t in SETTINGS], [of[s].sigma_rel for of in best])
        for s in range(seeds)
    ]
    alpha, product = Band.of(of_alpha), Band.of(of_product)
    return (
        Claim(
            text="a higher learning rate asks for a shorter average",
            holds=alpha.high < 0,
            evidence=f"sigma_rel ~ alpha_ref^e with e = {alpha.text(2)}",
        ),
        Claim(
            text="the best sigma_rel goes as 1/(alpha_ref^2 t_ref)",
            holds=abs(product.middle + 1) <= NEAR,
            evidence=f"sigma_rel ~ (alpha_ref^2 t_ref)^e with e = {product.text(2)}, in the paper -1",
        ),
    )


def _retuned(
    scale: Scale,
    numbers: Numbers,
    curves: list[list[list[Quality]]],
    best: list[list[Optimum]],
) -> Claim:
    """Spread of the distances over the settings: at each one's best length, and at one length for all."""
    tuned = [Band.of([o.value for o in of]).middle for of in best]
    base = SETTINGS.index((1.0, 1.0))
    at_base = [
        Band.of(values).middle
        for values in zip(*(distances(numbers, c) for c in curves[base]), strict=True)
    ]
    i = at_base.index(min(at_base))
    fixed = [Band.of([distances(numbers, c)[i] for c in of]).middle for of in curves]
    spread_tuned, spread_fixed = max(tuned) / min(tuned) - 1, max(fixed) / min(fixed) - 1
    return Claim(
        text="re-tuning the length hides much of a badly chosen learning rate",
        holds=spread_tuned < spread_fixed,
        evidence=f"the worst setting is {spread_tuned:.0%} worse than the best one at its own length, "
        f"{spread_fixed:.0%} at sigma_rel {scale.sigma_rels[i]:g} for all",
    )


def _curves_panel(scale: Scale, numbers: Numbers, curves: list[list[list[Quality]]]) -> Panel:
    return Panel(
        title="distance against length",
        xlabel="averaging length sigma_rel",
        ylabel="Frechet distance",
        curves=tuple(
            band_of_curves(
                f"alpha_ref x {alpha:g}, t_ref x {t:g}",
                scale.sigma_rels,
                [distances(numbers, c) for c in of],
            )
            for (alpha, t), of in zip(SETTINGS, curves, strict=True)
        ),
        log_y=True,
    )


def _law_panel(best: list[list[Optimum]]) -> Panel:
    order = sorted(range(len(SETTINGS)), key=lambda i: SETTINGS[i][0] ** 2 * SETTINGS[i][1])
    x = [SETTINGS[i][0] ** 2 * SETTINGS[i][1] for i in order]
    bands = [Band.of([o.sigma_rel for o in best[i]]) for i in order]
    middle = [band.middle for band in bands]
    anchor = Band.of([o.sigma_rel for o in best[SETTINGS.index((1.0, 1.0))]]).middle
    law = tuple(anchor / value for value in x)
    return Panel(
        title="best length against alpha_ref^2 t_ref",
        xlabel="alpha_ref^2 t_ref, relative",
        ylabel="best sigma_rel",
        curves=(
            BandCurve(
                label="measured",
                x=tuple(x),
                low=tuple(band.low for band in bands),
                middle=tuple(middle),
                high=tuple(band.high for band in bands),
            ),
            BandCurve(label="1/(alpha_ref^2 t_ref)", x=tuple(x), low=law, middle=law, high=law),
        ),
        log_y=True,
    )


STUDY = Study(
    name="ema-vs-lr",
    question="Does the best averaging length follow the learning rate?",
    claim="The best length shrinks as the learning rate grows, about as sigma_rel ~ 1/(alpha_ref^2 "
    "t_ref); with the length re-tuned all learning rates within a factor of 5 come within 10 % of the "
    "best, with a fixed length they are up to 72 % worse (EDM2 A.3).",
    plan=plan,
    report=report,
)
