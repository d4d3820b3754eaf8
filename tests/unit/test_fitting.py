from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from posthoc_ema import (
    ConfigError,
    Fit,
    PhemaWarning,
    PointProfile,
    PowerProfile,
    SynthesisError,
    fit,
)
from posthoc_ema.inner_products import displacement_products

NORMS = ["random-walk", "density", "published"]
GRID = [PowerProfile(t, s) for t in range(100, 1601, 100) for s in (0.05, 0.10)]


@pytest.mark.parametrize("norm", NORMS)
def test_coefficients_sum_to_one(norm):
    """ema-pytorch leaves the sum free: one snapshot per average gives 0.939 to 1.061 of all weights."""
    targets = [PowerProfile(1600, s) for s in (0.02, 0.15, 0.28)]
    for inputs in (GRID[:1], GRID[:4], GRID):
        result = fit(inputs, targets, norm)
        np.testing.assert_allclose(result.coefficients.sum(axis=0), 1, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_stored_profile_is_its_own_fit(norm):
    result = fit(GRID, [GRID[-1]], norm)
    expected = np.eye(len(GRID))[:, -1:]
    np.testing.assert_allclose(result.coefficients, expected, atol=1e-9)
    assert result.relative_residual[0] < 1e-9
    assert result.amplification[0] == pytest.approx(1, abs=1e-8)


def test_batch_of_targets_equals_one_by_one():
    targets = [PowerProfile(t, s) for t in (900, 1600) for s in (0.03, 0.2)]
    batch = fit(GRID, targets)
    for i, target in enumerate(targets):
        single = fit(GRID, [target])
        np.testing.assert_allclose(batch.coefficients[:, [i]], single.coefficients, atol=1e-12)
        assert batch.residual[i] == pytest.approx(single.residual[0], rel=1e-9)


def test_fit_minimises_its_own_norm(rng):
    target = PowerProfile(1600, 0.03)
    best = fit(GRID, [target])
    for norm in ("density", "published"):
        other = fit(GRID, [target], norm)
        assert displacement_norm(other, target) >= displacement_norm(best, target)
    for _ in range(5):
        step = rng.normal(size=(len(GRID), 1)) * 1e-3
        step -= step.mean()
        moved = best.coefficients + step
        assert squared(moved, target) > squared(best.coefficients, target)


def squared(x, target):
    vector = np.vstack([x, [[-1.0]]])
    gram = displacement_products([*GRID, target], [*GRID, target], 1700)
    return (vector.T @ gram @ vector).item()


def displacement_norm(result: Fit, target):
    return math.sqrt(max(squared(result.coefficients, target), 0))


def test_noise_limits_the_coefficients():
    inputs = [PowerProfile(t, s) for t in range(25, 1601, 25) for s in (0.05, 0.10)]
    target = [PowerProfile(1600, 0.01)]
    exact, noisy = fit(inputs, target), fit(inputs, target, noise=1e-3)
    assert exact.amplification[0] > 100
    assert noisy.amplification[0] < exact.amplification[0] / 5
    assert noisy.residual[0] > exact.residual[0]


def test_noise_may_differ_between_inputs():
    inputs = [PowerProfile(100, 0.1), PowerProfile(100, 0.1 + 1e-4)]
    result = fit(inputs, [PowerProfile(100, 0.1 + 5e-5)], noise=[1e-9, 10.0])
    assert result.coefficients[0, 0] > 0.99


def test_published_norm_divides_the_free_sum_away():
    result, inside = fit(GRID[:1], [GRID[3]], "published"), fit(GRID[:2], [GRID[3]], "density")
    assert result.coefficients.tolist() == [[1.0]]
    assert not np.allclose(fit(GRID[:2], [GRID[3]], "published").coefficients, inside.coefficients)


def test_raw_weights_are_a_target_of_the_random_walk():
    inputs = [*GRID, PointProfile(1600)]
    result = fit(inputs, [PointProfile(1600)])
    np.testing.assert_allclose(result.coefficients[-1], 1, atol=1e-6)
    assert np.isfinite(result.relative_residual).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-9, 1e-6])
def test_equal_and_nearly_equal_inputs_give_finite_coefficients(norm, gap):
    """A plain solve raises 'Singular matrix' for duplicates, or returns 1e16 without a word."""
    inputs = [PowerProfile(1000 * (1 + gap * i), 0.1) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhemaWarning)
        result = fit([*GRID, *inputs], [PowerProfile(1600, 0.07)], norm)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert result.relative_residual[0] < 0.01


def test_hopeless_condition_is_said():
    with pytest.warns(PhemaWarning, match=r"can hardly be told apart.*noise > 0"):
        fit([*GRID, GRID[0]], [GRID[-1]])


def test_large_fits_stay_right():
    """K = 512 with the noise of good storage; the residual is checked in the random-walk norm."""
    inputs = [PowerProfile(t, s) for t in range(4, 1025, 4) for s in (0.05, 0.10)]
    result = fit(inputs, [PowerProfile(1024, s) for s in (0.03, 0.075, 0.2)], noise=1e-5)
    assert result.relative_residual.max() < 1e-2
    assert result.amplification.max() < 50


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit([], [GRID[0]]), SynthesisError, "at least one input"),
        (lambda: fit(GRID, []), SynthesisError, "at least one input"),
        (lambda: fit(GRID, GRID, "l2"), ConfigError, "norm must be one of random-walk"),
        (lambda: fit(GRID, GRID, noise=-1), ConfigError, "finite and >= 0"),
        (lambda: fit(GRID, GRID, noise=math.nan), ConfigError, "finite and >= 0"),
        (lambda: fit(GRID, GRID, noise=math.inf), ConfigError, "finite and >= 0"),
        (lambda: fit(GRID, GRID, noise=[0.0, 1.0]), ConfigError, r"one per input \(32\)"),
        (lambda: fit(GRID, GRID, "published", 0.1), ConfigError, "knows no noise"),
        (
            lambda: fit([PowerProfile(1, 0.01)], [PowerProfile(1e9, 0.01)], "published"),
            SynthesisError,
            "no share",
        ),
    ],
    ids=["inputs", "targets", "norm", "minus", "nan", "inf", "shape", "published", "share"],
)
def test_bad_input_of_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
