from __future__ import annotations

import math

import numpy as np
import pytest

from posthoc_ema import ConfigError, PointProfile, PowerProfile, fit, power_step_weights
from posthoc_ema.diagnostics import (
    Scale,
    estimate_scale,
    neighbour_pairs,
    predicted_errors,
    sampled_scale,
)
from posthoc_ema.inner_products import residual_norms

STEPS = 1024
STORED = [PowerProfile(t, s) for t in range(64, STEPS + 1, 64) for s in (0.05, 0.20)]
LENGTHS = (0.015, 0.02, 0.03, 0.04, 0.07, 0.13, 0.16, 0.25)
FLAT = Scale(np.array([0.0, 1.0]), np.array([1.0]), 1)


def profile_matrix(profiles):
    """Weight of every step in every average, shape (num_profiles, STEPS)."""
    rows = np.zeros((len(profiles), STEPS))
    for row, profile in zip(rows, profiles, strict=True):
        t = round(profile.t)
        row[:t] = power_step_weights(range(1, t + 1), profile.gamma)
    return rows


def random_walk(rng, q, memory=0.0, elements=400):
    """Trajectories whose increments have variance q(tau), correlated over 1/(1 - memory) steps."""
    steps = rng.normal(size=(STEPS, elements))
    for k in range(1, STEPS):
        steps[k] = memory * steps[k - 1] + (1 - memory) * steps[k]
    return np.cumsum(np.sqrt(q(np.arange(STEPS) + 0.5))[:, None] * steps, axis=0)


SHAPES = {
    "constant": lambda tau: np.ones_like(tau),
    "inverse square root": lambda tau: 1 / np.maximum(tau, 50.0),
    "steep": lambda tau: np.maximum(tau, 5.0) ** -1.5,
    "warm-up": lambda tau: np.minimum(tau / 300, 1.0) ** 2,
    "drop": lambda tau: np.where(tau < 512, 1.0, 0.01),
}


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounding", [0.0, 0.03])
def test_predicted_error_is_within_a_factor_3_of_the_true_one(rng, shape, memory, rounding):
    theta = random_walk(rng, SHAPES[shape], memory)
    targets = [PowerProfile(STEPS, s) for s in LENGTHS]
    unit = rounding * np.sqrt(np.mean(SHAPES[shape](np.arange(1.0, STEPS))))
    stored = profile_matrix(STORED) @ theta
    stored = stored + unit * rng.normal(size=stored.shape)
    scale = sampled_scale(STORED, stored, unit**2)
    result = fit(STORED, targets, noise=scale.noise_over_scale(unit**2))
    predicted = predicted_errors(STORED, targets, result.coefficients, scale, unit**2)
    made, exact = result.coefficients.T @ stored, profile_matrix(targets) @ theta
    true = np.sqrt(((made - exact) ** 2).mean(axis=1))
    assert np.all(np.abs(np.log(predicted / true)) < math.log(3)), predicted / true


@pytest.mark.parametrize("shape", ["constant", "inverse square root", "warm-up"])
def test_scale_follows_the_movement_along_the_run(rng, shape):
    theta = random_walk(rng, SHAPES[shape])
    scale = sampled_scale(STORED, profile_matrix(STORED) @ theta)
    tau = np.linspace(150, STEPS * 0.95, 30)
    ratio = scale(tau) / SHAPES[shape](tau)
    assert np.median(np.abs(np.log(ratio))) < 0.25
    assert np.abs(np.log(ratio)).max() < 1.0


def exact_differences(profiles, q):
    """What many random walks with this q would give, pair by pair."""
    pairs = neighbour_pairs(profiles)
    products = [
        residual_norms([profiles[i]], [profiles[j]], np.ones((1, 1)), "random-walk", q)[0] ** 2
        for i, j in pairs
    ]
    return pairs, np.array(products)


def test_constant_scale_is_found_exactly_after_the_first_time():
    pairs, squared = exact_differences(STORED, FLAT)
    scale = estimate_scale(STORED, pairs, squared, num_elements=7)
    assert scale.num_elements == 7
    # Before the first stored time 1/tau is assumed; a little of that reaches the first cells.
    np.testing.assert_allclose(scale(np.linspace(256, STEPS, 20)), 1, rtol=0.02)
    assert scale.typical == pytest.approx(1, rel=0.02)


def test_scale_does_not_depend_on_the_unit_of_time_or_of_the_weights():
    pairs, squared = exact_differences(STORED, FLAT)
    thousands = [PowerProfile(p.t * 1000, p.sigma_rel) for p in STORED]
    here, there = estimate_scale(STORED, pairs, squared), estimate_scale(thousands, pairs, squared)
    np.testing.assert_allclose(there.values * 1000, here.values, rtol=1e-6)
    larger = estimate_scale(STORED, pairs, squared * 1e12)
    np.testing.assert_allclose(larger.values, here.values * 1e12, rtol=1e-6)


def test_pairs_are_nearest_neighbours_of_one_and_of_successive_times():
    profiles = [PowerProfile(t, s) for t in (10, 20) for s in (0.05, 0.10, 0.20)]
    assert neighbour_pairs(profiles[:3]).tolist() == [[0, 1], [1, 2]]
    pairs = neighbour_pairs(profiles).tolist()
    assert [0, 1] in pairs
    assert [4, 5] in pairs
    assert {i for pair in pairs for i in pair} == set(range(6))


def test_pairs_of_a_pruned_store_lead_to_the_next_time():
    profiles = [PowerProfile(10, 0.05), PowerProfile(20, 0.10), PowerProfile(40, 0.05)]
    assert neighbour_pairs(profiles).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    "profiles", [[], [PowerProfile(9, 0.1)], [PowerProfile(9, 0.1)] * 3, [PointProfile(5)] * 2]
)
def test_nothing_to_compare_gives_no_scale(profiles):
    pairs = neighbour_pairs(profiles)
    assert estimate_scale(profiles, pairs, np.ones(len(pairs))) is None


def test_one_time_with_two_lengths_gives_a_scale():
    profiles = [PowerProfile(100, 0.05), PowerProfile(100, 0.20)]
    scale = sampled_scale(profiles, np.array([[0.0, 1.0], [2.0, -1.0]]))
    assert scale.typical > 0


def test_damaged_differences_are_left_out():
    pairs, squared = exact_differences(STORED, FLAT)
    damaged = squared.copy()
    damaged[[3, 20]] = np.nan, np.inf
    scale = estimate_scale(STORED, pairs, damaged)
    np.testing.assert_allclose(scale(np.linspace(256, STEPS, 20)), 1, rtol=0.05)
    assert estimate_scale(STORED, pairs, np.full(len(pairs), np.nan)) is None


def test_weights_that_stand_still_have_scale_zero():
    scale = sampled_scale(STORED, np.ones((len(STORED), 3)))
    assert scale.typical == 0
    assert scale.noise_over_scale([1.0, 2.0]).tolist() == [0, 0]
    x = fit(STORED, [PowerProfile(STEPS, 0.1)]).coefficients
    assert predicted_errors(STORED, [PowerProfile(STEPS, 0.1)], x, scale).tolist() == [0]


def test_stretch_that_stands_still_is_seen():
    pairs, squared = exact_differences(STORED, lambda tau: np.where(tau < 512, 1.0, 0.0))
    scale = estimate_scale(STORED, pairs, squared)
    assert scale(300) == pytest.approx(1, rel=0.2)
    assert scale(1000) < 1e-3


def test_rounding_larger_than_the_difference_bounds_the_scale_from_above():
    pairs, squared = exact_differences(STORED, FLAT)
    scale = estimate_scale(STORED, pairs, squared, noise=1e4)
    assert 1 < scale.typical < 1e5
    assert np.isfinite(scale.values).all()


def test_rounding_is_taken_out():
    pairs, squared = exact_differences(STORED, FLAT)
    noise = np.where(np.arange(len(STORED)) % 2, 0.5, 0.1)
    scale = estimate_scale(STORED, pairs, squared + noise[pairs].sum(axis=1), noise)
    assert scale.typical == pytest.approx(1, rel=0.05)


def test_last_save_off_the_grid_does_not_shift_the_scale(rng):
    """Steps with momentum: over one step the weights move ten times less than a random walk."""
    theta = random_walk(rng, SHAPES["constant"], memory=0.9)
    extra = [*STORED[:-2], *(PowerProfile(STEPS - k, s) for k in (1, 0) for s in (0.05, 0.20))]
    with_extra = sampled_scale(extra, profile_matrix(extra) @ theta)
    without = sampled_scale(STORED, profile_matrix(STORED) @ theta)
    assert with_extra(STEPS - 100) == pytest.approx(without(STEPS - 100), rel=0.5)


def test_scale_is_checked_against_averages_left_out(rng):
    """A steady drift on top: pairs see it, reconstructions between stored times take it out."""
    theta = random_walk(rng, SHAPES["constant"])
    drift = np.arange(STEPS)[:, None] * rng.normal(size=theta.shape[1]) * 0.3
    stored = profile_matrix(STORED) @ (theta + drift)
    pairs = neighbour_pairs(STORED)
    squared = [np.mean((stored[i] - stored[j]) ** 2) for i, j in pairs]
    from_pairs = estimate_scale(STORED, pairs, squared)
    checked = sampled_scale(STORED, stored)
    tau = np.linspace(200, 900, 20)
    assert np.median(from_pairs(tau)) > 4
    assert 0.5 < np.median(checked(tau)) < 2


def test_average_with_a_damaged_element_is_left_out(rng):
    stored = profile_matrix(STORED) @ random_walk(rng, SHAPES["constant"])
    clean = sampled_scale(STORED, stored)
    for value in (np.nan, np.inf):
        stored[7, 3] = value
        damaged = sampled_scale(STORED, stored)
        assert damaged.typical == pytest.approx(clean.typical, rel=0.2)
    assert sampled_scale(STORED, np.full_like(stored, np.nan)) is None


def test_prediction_contains_the_noise_of_storage():
    targets = [PowerProfile(STEPS, s) for s in (0.02, 0.1)]
    x = fit(STORED, targets, noise=0.1).coefficients
    noise = np.linspace(0.1, 0.4, len(STORED))
    exact = predicted_errors(STORED, targets, x, FLAT)
    np.testing.assert_allclose(exact, residual_norms(STORED, targets, x, "random-walk"))
    noisy = predicted_errors(STORED, targets, x, FLAT, noise)
    np.testing.assert_allclose(noisy**2, exact**2 + noise @ x**2, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scale(np.array([0.0, 1.0]), np.array([1.0, 2.0]), 1), "one value between"),
        (lambda: Scale(np.array([1.0, 0.0]), np.array([1.0]), 1), "must rise"),
        (lambda: Scale(np.array([0.0, 1.0]), np.array([np.nan]), 1), "finite"),
        (lambda: estimate_scale(STORED, [[0, 1]], [1.0, 2.0]), "one squared difference per pair"),
        (lambda: sampled_scale(STORED, np.zeros((2, 5))), r"shape \(32, num_elements\)"),
        (
            lambda: predicted_errors(STORED, STORED[:2], np.zeros((2, 32)), FLAT),
            r"shape \(32, 2\)",
        ),
    ],
    ids=["values", "edges", "nan", "pairs", "samples", "coefficients"],
)
def test_bad_input_of_diagnostics_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
