import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    gaussian_distance,
)

DIM = 5
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(2, 40)  # below DIM + 1 the covariance is singular


def sample(seed, count):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(DIM, DIM)) * 10.0 ** rng.uniform(-2, 2, size=DIM)
    return rng.normal(size=(count, DIM)) @ mixing + rng.normal(size=DIM)


def statistics(features):
    return FeatureStatistics.empty(DIM).updated(features)


def size(*features):
    """What a rounding error is relative to."""
    return sum(np.square(x).sum() for x in features)


def distance(x, y):
    return frechet_distance(statistics(x), statistics(y))


@given(seeds, counts, seeds, counts)
def test_distance_is_symmetric(seed_x, count_x, seed_y, count_y):
    x, y = sample(seed_x, count_x), sample(seed_y, count_y)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9, abs=1e-12 * size(x, y))


@given(seeds, counts)
def test_distance_of_a_set_from_itself_is_zero(seed, count):
    x = sample(seed, count)
    assert 0 <= distance(x, x) <= 1e-12 * size(x)


@given(seeds, counts, seeds, counts, seeds)
def test_distance_does_not_change_under_rotation(seed_x, count_x, seed_y, count_y, seed):
    x, y = sample(seed_x, count_x), sample(seed_y, count_y)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, DIM)))[0]
    expected = distance(x, y)
    assert distance(x @ q, y @ q) == pytest.approx(expected, rel=1e-6, abs=1e-7 * size(x, y))


@given(seeds, counts, seeds)
def test_distance_of_a_shifted_set_is_the_squared_shift(seed, count, shift_seed):
    x = sample(seed, count)
    shift = np.random.default_rng(shift_seed).normal(size=DIM)
    expected = np.square(shift).sum()
    assert distance(x, x + shift) == pytest.approx(expected, abs=1e-11 * size(x, x + shift))


@given(seeds, counts, st.floats(0.1, 10))
def test_distance_of_a_scaled_set_is_the_closed_form(seed, count, factor):
    x = sample(seed, count)
    x = x - x.mean(axis=0)
    expected = (factor - 1) ** 2 * np.trace(statistics(x).covariance)
    assert distance(x, factor * x) == pytest.approx(expected, abs=1e-11 * size(x, factor * x))


@given(seeds, counts, seeds, counts, seeds, counts)
def test_root_of_the_distance_obeys_the_triangle_inequality(
    seed_x, count_x, seed_y, count_y, seed_z, count_z
):
    x, y, z = sample(seed_x, count_x), sample(seed_y, count_y), sample(seed_z, count_z)
    direct, detour = distance(x, z) ** 0.5, distance(x, y) ** 0.5 + distance(y, z) ** 0.5
    assert direct <= detour + 1e-6 * size(x, y, z) ** 0.5


@given(seeds, st.integers(3, 40), st.data())
def test_statistics_do_not_depend_on_how_the_set_is_cut(seed, count, data):
    x = sample(seed, count)
    cut = data.draw(st.integers(0, count))
    whole = statistics(x)
    for parts in (
        statistics(x[:cut]).updated(x[cut:]),
        statistics(x[cut:]).merged(statistics(x[:cut])),
    ):
        assert parts.count == whole.count
        assert parts.total == pytest.approx(whole.total, rel=1e-10, abs=1e-10)
        assert parts.outer == pytest.approx(whole.outer, rel=1e-10, abs=1e-10 * size(x))


# ---- Gaussians with known moments


def gaussian(seed, rank=DIM):
    """Mean, and a covariance of the given rank with its eigenvalues and axes."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    variances = 10.0 ** rng.uniform(-3, 3, size=DIM) * (np.arange(DIM) < rank)
    return rng.normal(size=DIM), variances, axes


def covariance_of(variances, axes):
    return (axes * variances) @ axes.T


@given(seeds, seeds, st.integers(0, DIM), st.integers(0, DIM))
def test_distance_of_gaussians_with_common_axes_is_the_closed_form(seed, other, rank, rank_b):
    """|m_a - m_b|^2 + sum (s_a - s_b)^2 with the deviations s along each axis; singular ones, too."""
    mean_a, a, axes = gaussian(seed, rank)
    mean_b, b, _ = gaussian(other, rank_b)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = gaussian_distance(mean_a, covariance_of(a, axes), mean_b, covariance_of(b, axes))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-7 * (a.sum() + b.sum()) + 1e-12)


@given(seeds, seeds)
def test_distance_of_gaussians_is_that_of_the_best_linear_map(seed, other):
    """T = A^(-1/2) (A^(1/2) B A^(1/2))^(1/2) A^(-1/2) moves one to the other; the cost is the distance."""
    mean_a, a, axes_a = gaussian(seed)
    mean_b, b, axes_b = gaussian(other)
    root, inverse = (covariance_of(a**p, axes_a) for p in (0.5, -0.5))
    covariance_b = covariance_of(b, axes_b)
    middle, vectors = np.linalg.eigh(root @ covariance_b @ root)
    move = inverse @ covariance_of(np.sqrt(np.maximum(middle, 0)), vectors) @ inverse
    covariance_a = covariance_of(a, axes_a)
    cost = np.trace((np.eye(DIM) - move) @ covariance_a @ (np.eye(DIM) - move).T)
    expected = np.square(mean_a - mean_b).sum() + cost
    found = gaussian_distance(mean_a, covariance_a, mean_b, covariance_b)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * (a.sum() + b.sum()))


@given(st.floats(-10, 10), st.floats(0, 10), st.floats(-10, 10), st.floats(0, 10))
def test_distance_on_one_axis_is_of_means_and_deviations(mean_a, deviation_a, mean_b, deviation_b):
    a, b = (np.array([[s * s]]) for s in (deviation_a, deviation_b))
    expected = (mean_a - mean_b) ** 2 + (deviation_a - deviation_b) ** 2
    found = gaussian_distance(np.array([mean_a]), a, np.array([mean_b]), b)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seeds, st.integers(0, DIM))
def test_distance_of_equal_gaussians_is_zero(seed, rank):
    mean, variances, axes = gaussian(seed, rank)
    covariance = covariance_of(variances, axes)
    assert 0 <= gaussian_distance(mean, covariance, mean, covariance) <= 1e-12 * variances.sum()
