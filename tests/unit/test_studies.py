"""Studies without training: plans, statistics, and what reports make of numbers that are made up."""

import dataclasses
import math

import pytest
import torch

import posthoc_ema as pe
from reference_trainer.config import TrainConfig
from reference_trainer.precond import Precond
from reference_trainer.presets import with_config
from reference_trainer.studies import (
    STUDIES,
    Claim,
    Guide,
    Magnitudes,
    Plan,
    Quality,
    Report,
    Run,
    Weights,
    ema_by_config,
    first_plan,
    growth,
    per_tensor_ema,
    scale_named,
    study_named,
    to_markdown,
)
from reference_trainer.studies.families import LETTERS, snapshot_time
from reference_trainer.studies.magnitudes import activation_magnitudes, weight_magnitude
from reference_trainer.studies.measuring import mixed
from reference_trainer.studies.records import measurement_key, runs_of
from reference_trainer.studies.running import StudyResult
from reference_trainer.studies.statistics import Band, exponent, optimum

TINY = scale_named("tiny")
SEEDS = (0, 1, 2)


def parabola(sigma_rel, best, lowest=1.0):
    return lowest * (1 + math.log(sigma_rel / best) ** 2)


def made_up(study, scale, distance, magnitude=lambda m: {}):
    """Numbers for all that a study asks for, until it asks for nothing more."""
    numbers, plan = {}, None
    while plan != (wanted := study.plan(scale, SEEDS, numbers)):
        plan = wanted
        numbers = {
            m: {"fd": distance(m)} if isinstance(m, Quality) else magnitude(m)
            for m in plan.measurements
        }
    return numbers


def verdicts(study, scale, distance, magnitude=lambda m: {}):
    numbers = made_up(study, scale, distance, magnitude)
    return [claim.holds for claim in study.report(scale, SEEDS, numbers).claims]


# Statistics


@pytest.mark.parametrize("best", [0.03, 0.05, 0.0707, 0.11])
def test_the_optimum_of_a_parabola_is_found_exactly(best):
    lengths = [0.01, 0.02, 0.05, 0.1, 0.2]
    found = optimum(lengths, [parabola(s, best, 3.0) for s in lengths])
    assert found.sigma_rel == pytest.approx(best, rel=1e-9)
    assert found.value == pytest.approx(3.0, rel=1e-9)
    assert found.inside


@pytest.mark.parametrize(("best", "expected"), [(0.001, 0.01), (1.0, 0.2)])
def test_an_optimum_at_an_end_says_so(best, expected):
    lengths = [0.01, 0.05, 0.2]
    found = optimum(lengths, [parabola(s, best) for s in lengths])
    assert (found.sigma_rel, found.inside) == (expected, False)


def test_the_optimum_of_equal_values_lies_among_them():
    assert optimum([0.01, 0.05, 0.2], [3.0, 1.0, 1.0]).inside
    assert 0.05 < optimum([0.01, 0.05, 0.2, 0.25], [3.0, 1.0, 1.0, 3.0]).sigma_rel < 0.2


def test_too_few_lengths_are_refused():
    with pytest.raises(pe.ConfigError, match="at least 3 lengths"):
        optimum([0.1, 0.2], [1.0, 2.0])


def test_the_exponent_of_a_power_law_is_its_power():
    x = [0.25, 1.0, 4.0, 5.0]
    assert exponent(x, [3 * v**-1.7 for v in x]) == pytest.approx(-1.7)


def test_a_band_is_lowest_median_highest():
    assert Band.of([4.0, 1.0, 2.0]) == Band(1.0, 2.0, 4.0)
    assert Band.of([0.5]).text() == "0.5"
    assert Band.of([0.31, 0.29, 0.35]).text(2) == "0.31 (0.29 to 0.35)"


# Records


def test_keys_of_different_measurements_differ():
    base = Weights(run="a", sigma_rel=0.1)
    guide = Guide(weights=base, weight=2.0)
    measurements = [
        Quality(weights=base),
        Magnitudes(weights=base),
        Quality(weights=dataclasses.replace(base, at=64)),
        Quality(weights=dataclasses.replace(base, sigma_rel=0.2)),
        Quality(weights=dataclasses.replace(base, overrides=(("x.*", 0.2),))),
        Quality(weights=base, guide=guide),
        Quality(weights=base, guide=dataclasses.replace(guide, weight=3.0)),
        Quality(weights=base, guide=dataclasses.replace(guide, interval=(0.1, 1.0))),
    ]
    assert len({measurement_key(m) for m in measurements}) == len(measurements)


def test_a_plan_refuses_runs_of_one_name_and_measurements_of_unknown_runs():
    run = Run(name="a", config=TINY.base)
    with pytest.raises(pe.ConfigError, match="different names"):
        Plan(runs=(run, run), measurements=())
    unknown = Quality(weights=Weights(run="b", sigma_rel=0.1))
    with pytest.raises(pe.ConfigError, match="does not train"):
        Plan(runs=(run,), measurements=(unknown,))


def test_a_finding_says_what_holds_and_what_does_not():
    yes, no = Claim(text="x", holds=True, evidence="1"), Claim(text="y", holds=False, evidence="2")
    report = Report(claims=(yes, no), tables=(), panels=())
    assert report.finding == "Holds here: x (1). Does not hold here: y (2)."
    assert dataclasses.replace(report, claims=(no,)).finding == "Does not hold here: y (2)."


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(pe.ConfigError, match="Did you mean 'growth'"):
        study_named("grow")
    with pytest.raises(pe.ConfigError, match="Did you mean 'digits'"):
        scale_named("digit")


# Plans


@pytest.mark.parametrize("scale", ["tiny", "digits", "gpu"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_plan_asks_for_averages_that_will_be_stored(name, scale):
    scale = scale_named(scale)
    plan = first_plan(study_named(name), scale, SEEDS)
    configs = {run.name: run.config for run in plan.runs}
    assert {run.config.seed for run in plan.runs} == set(SEEDS)
    for measurement in plan.measurements:
        at = measurement.weights.at
        config = configs[measurement.weights.run]
        assert at is None or (
            at % config.track.snapshot_every == 0 and 0 < at <= config.total_images
        )


@pytest.mark.parametrize("scale", ["tiny", "digits", "gpu"])
def test_runs_of_one_name_are_the_same_run_in_all_studies(scale):
    scale = scale_named(scale)
    found = {}
    for study in STUDIES.values():
        for run in first_plan(study, scale, SEEDS).runs:
            assert found.setdefault(run.name, run.config) == run.config


def test_times_are_those_of_snapshots():
    config = scale_named("digits").base
    assert snapshot_time(config, 1.0) == config.total_images
    assert snapshot_time(config, 1e-9) == config.track.snapshot_every


def test_a_run_of_each_config_differs_in_its_network():
    plan = first_plan(study_named("ema-by-config"), TINY, (0,))
    assert [run.name for run in plan.runs] == [f"{letter}-seed0" for letter in LETTERS]
    assert len({run.config.network for run in plan.runs}) == len(LETTERS)


# Reports: numbers as in the paper bear the claims out, others do not


def letter_of(measurement):
    return measurement.weights.run.partition("-")[0]


def test_by_config_the_numbers_of_the_paper_hold_and_equal_ones_do_not():
    study, scale = study_named("ema-by-config"), scale_named("digits")
    fid = dict(zip(LETTERS, (8.0, 7.24, 6.96, 3.75, 3.02, 2.71, 2.56), strict=True))
    best = {"A": 0.034, **ema_by_config.PAPER}

    def paper(m):
        narrow = 3 if letter_of(m) == "G" else 1
        log = math.log(m.weights.sigma_rel / best[letter_of(m)])
        return fid[letter_of(m)] * (1 + narrow * log**2)

    assert verdicts(study, scale, paper) == [True] * 4
    assert verdicts(study, scale, lambda m: parabola(m.weights.sigma_rel, 0.1)) == [False] * 4


def test_over_time_a_growing_length_holds_and_a_constant_one_does_not():
    study, scale = study_named("ema-over-time"), scale_named("digits")

    def time(m):
        return m.weights.at or scale.base.total_images

    def paper(m):
        share = time(m) / scale.base.total_images
        return parabola(m.weights.sigma_rel, 0.1 * share**0.3, share**-0.5)

    assert verdicts(study, scale, paper) == [True, True]
    assert verdicts(study, scale, lambda m: parabola(m.weights.sigma_rel, 0.1)) == [False, False]


def test_against_the_learning_rate_the_law_holds_and_a_constant_does_not():
    study, scale = study_named("ema-vs-lr"), scale_named("digits")
    scale = dataclasses.replace(scale, sigma_rels=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.28))
    optim = {run.name: run.config.optim for run in first_plan(study, scale, SEEDS).runs}
    base = scale.base.optim

    def product(m):
        of = optim[m.weights.run]
        return (of.lr_ref / base.lr_ref) ** 2 * of.t_ref / base.t_ref

    law = verdicts(study, scale, lambda m: parabola(m.weights.sigma_rel, 0.04 / product(m)))
    assert law == [True, True, True]
    assert verdicts(study, scale, lambda m: product(m) * parabola(m.weights.sigma_rel, 0.04)) == [
        False,
        False,
        False,
    ]


def test_against_capacity_shorter_for_larger_holds_and_the_reverse_does_not():
    study, scale = study_named("ema-vs-capacity"), scale_named("digits")
    width = {
        run.name: run.config.network.model_channels for run in first_plan(study, scale, SEEDS).runs
    }

    def distance(m, sign):
        relative = width[m.weights.run] / scale.base.network.model_channels
        return parabola(m.weights.sigma_rel, 0.08 * relative ** (-0.5 * sign), relative**-sign)

    assert verdicts(study, scale, lambda m: distance(m, 1)) == [True, True]
    assert verdicts(study, scale, lambda m: distance(m, -1)) == [False, False]


def test_under_guidance_gains_hold_and_losses_do_not():
    study, scale = study_named("ema-under-guidance"), scale_named("digits")

    def distance(m, gain):
        if m.guide is None:
            return parabola(m.weights.sigma_rel, 0.25)
        limited = 0.9 if m.guide.interval else 1.0
        return gain * limited**gain * parabola(m.weights.sigma_rel, 0.02)

    gained = verdicts(study, scale, lambda m: distance(m, 0.5))
    lost = verdicts(
        study, scale, lambda m: (2 if m.guide else 1) * parabola(m.weights.sigma_rel, 0.07)
    )
    assert gained == [True] * len(gained)
    assert lost == [False] * len(lost)


def test_per_tensor_a_gain_in_b_alone_holds():
    study, scale = study_named("per-tensor-ema"), scale_named("digits")

    def distance(m, letters):
        value = parabola(m.weights.sigma_rel, 0.07)
        if letter_of(m) in letters and m.weights.overrides:
            (_pattern, sigma_rel), *_ = m.weights.overrides
            value *= 0.9 if sigma_rel > 0.2 else 1.1
        return value

    assert verdicts(study, scale, lambda m: distance(m, "B")) == [True, True]
    assert verdicts(study, scale, lambda m: distance(m, "G")) == [False, False]


def growing(m, exponents):
    power = exponents.get(letter_of(m), {})
    return {kind: m.weights.at ** power.get(kind, 0.0) for kind in growth.KINDS}


def test_growth_as_in_the_paper_holds_and_growth_elsewhere_does_not():
    study, scale = study_named("growth"), scale_named("digits")
    paper = {"C": {"activations": 0.5}, "D": {"weights": 0.3}}
    other = {letter: {"activations": 0.1, "weights": 0.1} for letter in "EFG"}
    assert verdicts(study, scale, None, lambda m: growing(m, paper)) == [True] * 4
    assert verdicts(study, scale, None, lambda m: growing(m, other)) == [False] * 4


def test_markdown_marks_ends_of_the_range_and_explains_the_mark(tmp_path):
    study, scale = study_named("ema-over-time"), scale_named("digits")
    for best, marked in ((0.001, True), (0.08, False)):
        numbers = made_up(study, scale, lambda m, best=best: parabola(m.weights.sigma_rel, best))
        result = StudyResult(
            study=study,
            scale=scale,
            seeds=SEEDS,
            report=study.report(scale, SEEDS, numbers),
            numbers=numbers,
            folder=tmp_path,
        )
        assert ("`*`: an end" in to_markdown(result)) is marked


# Networks


def network_of(letter):
    config = with_config(TINY.base, letter)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Precond(config.network, config.data).eval()


@pytest.mark.parametrize("letter", per_tensor_ema.LETTERS)
def test_groups_of_tensors_share_nothing_and_are_not_empty(letter):
    names = [name for name, _ in network_of(letter).named_parameters()]
    found = []
    for pattern in per_tensor_ema.GROUPS.values():
        averages = {0.1: dict.fromkeys(names, "a"), 0.2: dict.fromkeys(names, "b")}
        tensors = mixed(averages, 0.1, ((pattern, 0.2),))
        group = [name for name, value in tensors.items() if value == "b"]
        assert group, pattern
        found += group
    assert len(found) == len(set(found))


def test_the_last_override_that_matches_counts():
    averages = {s: {"a.x": s, "a.y": s, "b": s} for s in (0.1, 0.2, 0.3)}
    made = mixed(averages, 0.1, (("a.*", 0.2), ("*.y", 0.3)))
    assert made == {"a.x": 0.2, "a.y": 0.3, "b": 0.1}


def test_weight_magnitude_is_that_of_the_stored_weights():
    network = network_of("D")
    before = weight_magnitude(network)
    assert before == pytest.approx(1.0, abs=0.05)  # drawn from N(0, 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert weight_magnitude(network) == pytest.approx(2 * before)


@pytest.mark.parametrize("letter", "BG")
def test_activations_are_measured_at_every_resolution_and_nothing_stays_behind(letter):
    network = network_of(letter)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    found = activation_magnitudes(network, images, torch.ones(16), torch.zeros(16).long())
    assert set(found) == {"r8", "r4"}
    assert all(0.1 < value < 10 for value in found.values())
    assert not any(module._forward_hooks for module in network.modules())


def test_in_config_g_activations_begin_at_unit_magnitude():
    network = network_of("G")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator) * 0.5
    found = activation_magnitudes(network, images, torch.full((64,), 0.01), None)
    assert all(value == pytest.approx(1.0, abs=0.25) for value in found.values())


def test_runs_of_a_guided_measurement_are_both():
    guide = Guide(weights=Weights(run="b", sigma_rel=0.1), weight=2.0)
    assert runs_of(Quality(weights=Weights(run="a", sigma_rel=0.1), guide=guide)) == ["a", "b"]


def test_configurations_of_all_runs_survive_their_json():
    for study in STUDIES.values():
        for run in first_plan(study, TINY, (0,)).runs:
            assert TrainConfig.from_json(run.config.to_json()) == run.config
