"""Which averages to keep: choices against brute force, against peers' habits, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from posthoc_ema import ConfigError, InvalidProfileError, PointProfile, PowerProfile, fit
from posthoc_ema.inner_products import residual_norms
from posthoc_ema.least_squares import LeastSquares
from posthoc_ema.retention import choose, keep_online, targets_of

TRACKED = (0.05, 0.10)
RANGE = (0.03, 0.20)


def store(num_times, tracked=TRACKED, interval=1):
    return [PowerProfile(interval * k, s) for k in range(1, num_times + 1) for s in tracked]


def worst(inputs, noise=0.0, lengths=RANGE):
    """Worst error over the range at the last time, by the fit that syntheses use; sqrt(time)."""
    targets = [PowerProfile(inputs[-1].t, float(s)) for s in targets_of(lengths)]
    found = fit(inputs, targets, noise=noise)
    return float(np.sqrt(found.residual**2 + noise * np.sum(found.coefficients**2, axis=0)).max())


def evenly(num_times, keep, tracked=TRACKED):
    """Both averages of even times: the best thinning that does not look at errors."""
    times = [round(num_times * k / (keep // 2)) for k in range(1, keep // 2 + 1)]
    return [PowerProfile(t, s) for t in times for s in tracked]


# ---- least squares on subsets


def test_least_squares_are_those_of_the_fit():
    inputs, targets = store(8), [PowerProfile(8, s) for s in (0.03, 0.07, 0.2)]
    found = LeastSquares(inputs, np.full(16, 1e-4), targets, 8.0).solve(np.arange(16))
    expected = fit(inputs, targets, noise=1e-4)
    squared = expected.residual**2 + 1e-4 * np.sum(expected.coefficients**2, axis=0)
    assert np.allclose(found.x, expected.coefficients, atol=1e-6)
    assert np.allclose(8 * found.f, squared, rtol=1e-6)


def test_least_squares_under_a_density_are_its_integrals():
    def pace(tau):
        return 1 / np.maximum(tau, 1.0)

    inputs, targets = store(4), [PowerProfile(4, 0.03)]
    found = LeastSquares(inputs, np.zeros(8), targets, 4.0, pace).solve(np.arange(8))
    norm = residual_norms(inputs, targets, found.x, "random-walk", pace)
    assert 4 * found.f == pytest.approx(norm**2, rel=1e-4)


def test_least_squares_survive_copies_of_an_average():
    inputs = [PowerProfile(4, 0.1)] * 3
    found = LeastSquares(inputs, np.zeros(3), [PowerProfile(4, 0.1)], 4.0).solve(np.arange(3))
    assert np.allclose(found.x, 1 / 3, atol=0.05)
    assert found.f[0] < 1e-7


# ---- choices


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_choice_is_the_best_of_all_subsets(keep):
    inputs = store(5)
    every = [
        worst([inputs[i] for i in kept])
        for kept in itertools.combinations(range(10), keep)
        if kept[-1] >= 8  # one of the last time stays
    ]
    choice = choose(inputs, 0.0, RANGE, keep=keep)
    assert len(choice.kept) == keep
    assert choice.worst == pytest.approx(min(every), rel=1e-3)


def test_choice_of_16_of_128_is_five_times_better_than_even_thinning():
    """The must-show figure, as predicted with weights that walk evenly: 5.9 times."""
    inputs = store(64)
    choice = choose(inputs, 0.0, RANGE, keep=16)
    kept = [inputs[i] for i in choice.kept]
    assert len(kept) == 16
    assert worst(kept) < worst(evenly(64, 16)) / 5
    assert worst(kept) < worst([*inputs[7::8]]) / 10  # every eighth file: one length, 16 times
    assert worst(kept) < worst(inputs[-16:]) / 50


def test_choice_says_the_errors_that_the_fit_will_have():
    inputs = store(16)
    choice = choose(inputs, 1e-5, RANGE, keep=8, scale=3.0)
    assert choice.worst == pytest.approx(
        3 * worst([inputs[i] for i in choice.kept], 1e-5), rel=1e-4
    )
    assert choice.errors_before.max() == pytest.approx(3 * worst(inputs, 1e-5), rel=1e-3)
    assert sorted(choice.kept + choice.removed) == list(range(32))
    assert np.array_equal(choice.sigma_rels, targets_of(RANGE))


def test_choice_for_true_errors_of_random_walks(rng):
    """Averages of walks themselves, not the formula: the choice is better there as well."""
    num_times, steps = 32, 1024
    inputs = store(num_times, interval=steps // num_times)
    targets = [PowerProfile(steps, float(s)) for s in targets_of(RANGE)]

    def averages(profiles):
        tau = np.arange(steps + 1)
        return np.stack([-np.diff(p.tail(tau)) for p in profiles]) @ walks

    walks = np.cumsum(rng.normal(size=(steps, 600)), axis=0)
    true = averages(targets)

    def error(kept):
        x = fit(kept, targets).coefficients
        return np.sqrt(np.mean((x.T @ averages(kept) - true) ** 2, axis=1)).max()

    choice = choose(inputs, 0.0, RANGE, keep=16)
    evenly_kept = [PowerProfile(p.t * steps // num_times, p.sigma_rel) for p in evenly(32, 16)]
    assert error([inputs[i] for i in choice.kept]) < error(evenly_kept) / 4


def test_choice_for_all_lengths_alike_has_the_lower_mean_and_the_higher_worst():
    inputs = store(16)
    by_worst, by_mean = (
        choose(inputs, 1e-6, RANGE, keep=8, criterion=c) for c in ("worst", "mean-log")
    )
    assert np.log(by_mean.errors).mean() < np.log(by_worst.errors).mean()
    assert by_worst.worst < by_mean.worst


def test_choice_by_size_fits_and_spends_what_it_may():
    inputs = store(16)
    sizes = np.tile([3.0, 1.0], 16)
    choice = choose(inputs, 0.0, RANGE, max_bytes=17, sizes=sizes)
    assert choice.size == sizes[list(choice.kept)].sum() <= 17
    assert choice.size > 14
    dear = choose(inputs, 0.0, RANGE, max_bytes=17, sizes=3.0)
    assert choice.worst < dear.worst


def test_choice_by_error_keeps_few_and_is_good_enough():
    inputs = store(16)
    bound = 4 * choose(inputs, 0.0, RANGE, keep=32).worst
    choice = choose(inputs, 0.0, RANGE, max_error=bound)
    assert choice.worst <= bound
    fewer = choose(inputs, 0.0, RANGE, keep=len(choice.kept) - 1)
    assert fewer.worst > 0.95 * bound


def test_choice_keeps_everything_when_everything_fits():
    inputs = store(4)
    for limit in ({"keep": 8}, {"keep": 100}, {"max_bytes": 8.0}):
        choice = choose(inputs, 0.0, RANGE, **limit)
        assert choice.kept == tuple(range(8))
        assert choice.removed == ()
        assert np.allclose(choice.errors, choice.errors_before)


def test_choice_is_the_same_every_time():
    assert choose(store(24), 0, RANGE, keep=9).kept == choose(store(24), 0, RANGE, keep=9).kept


def test_choice_keeps_more_old_files_where_the_weights_moved_early():
    inputs = store(32)
    even = choose(inputs, 0.0, RANGE, keep=10)
    early = choose(inputs, 0.0, RANGE, keep=10, density=lambda tau: 32 / np.maximum(tau, 1.0))
    age = [sum(inputs[i].t for i in choice.kept) for choice in (even, early)]
    assert age[1] < age[0]


def test_choice_mixes_profiles():
    inputs = [*store(12), PointProfile(12)]
    assert len(choose(inputs, 0.0, (0.01, 0.1), keep=6).kept) == 6


def test_choice_of_many_averages_is_good_too():
    inputs = store(256)
    choice = choose(inputs, 1e-8 * 256, (0.02, 0.25), keep=32)
    assert len(choice.kept) == 32
    assert choice.worst < worst(evenly(256, 32), 1e-8 * 256, (0.02, 0.25)) / 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "give exactly one of keep, max_bytes and max_error"),
        ({"keep": 2, "max_bytes": 3}, "give exactly one"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"max_bytes": 0.5}, "must hold at least one average of the last time, 1 bytes"),
        ({"max_error": 1e-9}, "max_error must be at least what all 8 stored averages give"),
        ({"keep": 2, "noise": [1.0]}, r"one per input \(8\)"),
        ({"keep": 2, "noise": -1.0}, "noise must be finite and >= 0"),
        ({"keep": 2, "sizes": 0.0}, "sizes must be positive"),
        ({"keep": 2, "end": 3}, "end must not be before the last stored time 4"),
        ({"keep": 2, "criterion": "best"}, "criterion must be one of worst, mean-log"),
        ({"keep": 2, "sigma_rels_range": (0.2, 0.1)}, "a range of lengths must rise"),
        ({"keep": 2, "inputs": []}, "at least one stored average"),
    ],
)
def test_choice_refuses_what_makes_no_sense(change, what):
    with pytest.raises(ConfigError, match=what):
        choose(**{"inputs": store(4), **change})


def test_choice_refuses_lengths_outside_the_family():
    with pytest.raises(InvalidProfileError):
        choose(store(4), 0.0, (0.1, 0.3), keep=2)


# ---- online


def follow(num_times, keep, tracked=TRACKED, noise=0.0, lengths=RANGE):
    """What is stored after each time of a run that keeps `keep`."""
    kept = []
    for k in range(1, num_times + 1):
        kept += [PowerProfile(k, s) for s in tracked]
        gone = keep_online(kept, noise, keep, lengths)
        kept = [p for i, p in enumerate(kept) if i not in gone]
        yield kept


def test_online_retention_keeps_its_budget_and_the_last_time():
    for k, kept in enumerate(follow(20, 7), start=1):
        assert len(kept) == min(2 * k, 7)
        assert any(p.t == k for p in kept)


def test_online_retention_is_good_at_every_moment():
    """Never worse than 0.5 of even thinning, within 2.5 of the best choice from all files."""
    for k, kept in enumerate(follow(64, 16), start=1):
        if k % 8 == 0 and k >= 16:
            assert worst(kept) < 0.5 * worst(evenly(k, 16)), k
        if k % 32 == 0:
            assert worst(kept) < 2.5 * choose(store(k), 0.0, RANGE, keep=16).worst, k


def test_online_retention_beats_keeping_the_last():
    *_, kept = follow(64, 16)
    assert worst(kept) < worst(store(64)[-16:]) / 20


def test_online_retention_does_not_depend_on_the_unit_of_time():
    inputs = store(9)
    in_images = [PowerProfile(256 * p.t, p.sigma_rel) for p in inputs]
    assert keep_online(inputs, 1e-3, 14) == keep_online(in_images, 256e-3, 14)


def test_online_retention_drops_nothing_within_the_budget():
    assert keep_online(store(4), 0.0, 8) == ()


def test_online_retention_takes_noise_of_each():
    noisy = np.zeros(18)
    noisy[::2] = 1e3
    gone = keep_online(store(9), noisy, 9, RANGE)
    assert set(gone) == set(range(0, 18, 2))


def test_online_retention_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        keep_online(store(4), 0.0, 0)
    with pytest.raises(ConfigError, match="at least one stored average"):
        keep_online([], 0.0, 4)
