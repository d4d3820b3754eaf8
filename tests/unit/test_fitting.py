from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from posthoc_ema import (
    ConfigError,
    ExponentialProfile,
    Fit,
    GammaProfile,
    InvalidProfileError,
    PhemaWarning,
    PointProfile,
    PowerProfile,
    SynthesisError,
    TabulatedProfile,
    UniformProfile,
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


def test_noise_norm_is_what_storage_adds():
    noise = np.linspace(1e-6, 1e-3, len(GRID))
    result = fit(GRID, [PowerProfile(1600, s) for s in (0.02, 0.1)], noise=noise)
    np.testing.assert_allclose(result.noise_norm**2, noise @ result.coefficients**2, rtol=1e-12)
    assert fit(GRID, [GRID[3]]).noise_norm.tolist() == [0]


KINDS = [
    PowerProfile(1000, 0.08),
    GammaProfile(1000, -0.5),
    PointProfile(800),
    UniformProfile(700, 1000),
    ExponentialProfile(1000, 90),
    ExponentialProfile(1000, 900),
    ExponentialProfile(1000, 90, interval=2, warmup=True),
    TabulatedProfile((0, 300, 310, 900), (1, 0.9, 0.2, 0)),
]


@pytest.mark.parametrize("target", KINDS, ids=repr)
def test_every_kind_of_profile_is_its_own_fit_among_all_kinds(target):
    inputs = [*GRID, *KINDS]
    result = fit(inputs, [target])
    expected = [float(p == target) for p in inputs]
    # gamma 8, which an EMA in its warm-up tracks, lies between sigma_rel 0.08 and 0.10: hard to tell.
    np.testing.assert_allclose(result.coefficients[:, 0], expected, atol=1e-3)
    assert result.relative_residual[0] < 1e-8


@pytest.mark.parametrize("target", KINDS, ids=repr)
def test_every_kind_of_profile_is_a_target_of_power_averages(target):
    dense = [PowerProfile(t, s) for t in range(20, 1001, 20) for s in (0.05, 0.20)]
    few, many = fit(dense[-20:], [target], noise=1e-4), fit(dense, [target], noise=1e-4)
    assert many.relative_residual[0] < 0.25
    assert many.residual[0] <= few.residual[0] * (1 + 1e-9)
    assert many.coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_window_mean_of_raw_checkpoints_is_close_to_the_window():
    """Mean of ten checkpoints against the mean over the window: what LAWA approximates."""
    points = [PointProfile(t) for t in range(100, 1001, 100)]
    result = fit(points, [UniformProfile(0, 1000)])
    np.testing.assert_allclose(result.coefficients[1:-1, 0], 0.1, atol=1e-9)
    assert result.coefficients[-1, 0] == pytest.approx(0.05, abs=1e-6)


def test_density_norm_says_which_profile_it_cannot_hold():
    with pytest.raises(InvalidProfileError, match=r"initial weights.*random-walk"):
        fit(GRID, [ExponentialProfile(1000, 900)], "density")
    smooth = fit(GRID, [UniformProfile(700, 1000), ExponentialProfile(1600, 20)], "density")
    assert np.isfinite(smooth.coefficients).all()


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
