import numpy as np
import pytest
import scipy.linalg

from posthoc_ema.errors import MetricError
from reference_trainer.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    gaussian_distance,
)


def statistics(features):
    return FeatureStatistics.empty(features.shape[1]).updated(features)


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    x = np.random.default_rng(0).normal(3, 2, size=(100, 5))
    whole = statistics(x)
    assert whole.mean == pytest.approx(x.mean(axis=0), rel=1e-13)
    assert whole.covariance == pytest.approx(np.cov(x.T), rel=1e-11)


def test_statistics_are_gathered_in_float64_from_any_dtype():
    x = np.full((1000, 1), 0.1, np.float32)
    whole = statistics(x)
    assert whole.total.dtype == whole.outer.dtype == np.float64
    assert whole.mean == pytest.approx(np.float64(np.float32(0.1)), rel=1e-13)


def test_distance_of_gaussians_on_one_axis_is_the_closed_form():
    distance = gaussian_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]])
    )
    assert distance == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2, rel=1e-14)


def test_distance_of_gaussians_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert gaussian_distance(np.zeros(6), a, np.zeros(6), b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_a_point_from_a_gaussian_is_its_second_moment():
    point, spread = np.zeros((3, 3)), np.diag([1.0, 2.0, 3.0])
    mean = np.array([1.0, 0.0, 2.0])
    assert gaussian_distance(mean, point, np.zeros(3), spread) == pytest.approx(5 + 6, rel=1e-14)


def test_distance_is_stable_when_covariances_are_singular():
    """20 vectors in 64 dimensions: a matrix square root would leave an error of about 1e-7."""
    x = np.random.default_rng(2).normal(size=(20, 64))
    assert frechet_distance(statistics(x), statistics(x)) < 1e-11
    assert frechet_distance(statistics(x), statistics(x + 0.5)) == pytest.approx(16, rel=1e-12)


def test_distance_of_large_samples_approaches_that_of_their_distributions():
    rng = np.random.default_rng(3)
    a = statistics(rng.normal(0, 1, size=(20_000, 4)))
    b = statistics(rng.normal(1, 2, size=(20_000, 4)))
    assert frechet_distance(a, b) == pytest.approx(4 * (1 + 1), rel=0.03)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 3)), r"shape \[n, 2\], got \[4, 3\]"),
        (np.zeros(2), r"shape \[n, 2\], got \[2\]"),
        (np.array([[1.0, np.nan]]), "must be finite"),
        (np.array([[1.0, np.inf]]), "must be finite"),
    ],
)
def test_statistics_refuse_bad_features(features, message):
    with pytest.raises(MetricError, match=message):
        FeatureStatistics.empty(2).updated(features)


def test_distance_needs_two_vectors_on_both_sides():
    one = FeatureStatistics.empty(2).updated(np.zeros((1, 2)))
    with pytest.raises(MetricError, match="at least 2 images, got 1"):
        frechet_distance(one, one)
    with pytest.raises(MetricError, match="at least 1 images, got 0"):
        FeatureStatistics.empty(2).mean  # noqa: B018


def test_distance_needs_features_of_one_length():
    with pytest.raises(MetricError, match="got 2 and 3"):
        frechet_distance(statistics(np.eye(2)), statistics(np.eye(3)))
