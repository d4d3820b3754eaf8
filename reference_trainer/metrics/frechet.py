"""The Frechet distance between two sets of feature vectors, in float64.

Each set is summarised by mean and covariance; the distance is the squared 2-Wasserstein distance
of the Gaussians with these moments (Heusel et al., arXiv 1706.08500, eq. 6).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import MetricError

FloatArray = npt.NDArray[np.float64]


class HasMoments(Protocol):
    """What a set of features is compared by."""

    @property
    def mean(self) -> FloatArray:
        """Mean, float64 `[d]`."""
        ...

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance, float64 `[d, d]`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and covariance of a set of feature vectors, as a reference file holds them.

    Attributes:
        count: number of vectors; 0 if it is not known.
        mean: float64 `[d]`.
        covariance: unbiased, float64 `[d, d]`.
    """

    count: int
    mean: FloatArray
    covariance: FloatArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """Moments of a set of feature vectors, gathered batch by batch.

    Records are immutable: `updated` and `merged` return new ones.

    Attributes:
        count: number of vectors.
        total: their sum, float64 `[d]`.
        outer: the sum of their outer products, float64 `[d, d]`.

    Example:
        >>> part = FeatureStatistics.empty(2).updated(np.array([[0.0, 0.0], [2.0, 0.0]]))
        >>> whole = part.updated(np.array([[1.0, 3.0]]))
        >>> whole.count, whole.mean.tolist()
        (3, [1.0, 1.0])
    """

    count: int
    total: FloatArray
    outer: FloatArray

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """Return the statistics of no vectors of length `dim`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def updated(self, features: npt.ArrayLike) -> FeatureStatistics:
        """Add vectors, any real dtype, `[n, d]`.

        Raises:
            MetricError: the shape does not fit, or a value is not finite.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.total):
            raise MetricError(
                f"features must have shape [n, {len(self.total)}], got {list(x.shape)}."
            )
        if not np.isfinite(x).all():
            raise MetricError("features must be finite, got NaN or infinity; check the images.")
        return self.merged(FeatureStatistics(len(x), x.sum(axis=0), x.T @ x))

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets together (for example of two processes)."""
        return FeatureStatistics(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    @property
    def moments(self) -> Moments:
        """Mean and covariance as plain arrays; raises MetricError for fewer than two vectors."""
        return Moments(self.count, self.mean, self.covariance)

    @property
    def mean(self) -> FloatArray:
        """Mean, float64 `[d]`. Raises MetricError when there are no vectors."""
        self._need(1)
        return self.total / self.count

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance (divisor count - 1), float64 `[d, d]`.

        Raises:
            MetricError: there are fewer than two vectors.
        """
        self._need(2)
        scatter = self.outer - self.count * np.outer(self.mean, self.mean)
        return scatter / (self.count - 1)

    def _need(self, count: int) -> None:
        if self.count < count:
            raise MetricError(
                f"feature statistics need at least {count} images, got {self.count}. "
                "Generate more images."
            )


def _root_factor(covariance: FloatArray) -> FloatArray:
    """Return a factor R with R^T R = covariance, `[d, d]`."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # What eigh returns for a zero eigenvalue is rounding of about this size, of either sign; its
    # square root would not be small.
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    roots = np.sqrt(np.where(values > floor, values, 0.0))
    return np.asarray(roots[:, None] * vectors.T, dtype=np.float64)


def gaussian_distance(
    mean_a: FloatArray, covariance_a: FloatArray, mean_b: FloatArray, covariance_b: FloatArray
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With R^T R = S the eigenvalues of S_a S_b
    are the squared singular values of R_a R_b^T, so the last trace is their sum: no square root of
    a matrix that is not symmetric, and no square root of a rounding error.

    Args:
        mean_a: float64 `[d]`.
        covariance_a: symmetric, positive semidefinite, float64 `[d, d]`; may be singular.
        mean_b: float64 `[d]`.
        covariance_b: as `covariance_a`.

    Returns:
        The distance, at least 0.

    Example:
        >>> gaussian_distance(np.zeros(1), np.eye(1), np.array([3.0]), 4 * np.eye(1))
        10.0
    """
    cross = _root_factor(covariance_a) @ _root_factor(covariance_b).T
    overlap = np.linalg.svd(cross, compute_uv=False).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    shift = np.square(mean_a - mean_b).sum()
    return max(float(shift + spread), 0.0)  # rounding may leave -1e-16 for equal sets


def frechet_distance(a: HasMoments, b: HasMoments) -> float:
    """Frechet distance between two sets of features, at least 0; symmetric, 0 for equal moments.

    A small set has a biased covariance spectrum, so compare only numbers from equally many images.

    Args:
        a: statistics of one set, at least two vectors.
        b: statistics of the other set, same length of vectors.

    Raises:
        MetricError: a set has fewer than two vectors, or the lengths differ.
    """
    first, second = a.covariance, b.covariance
    if first.shape != second.shape:
        raise MetricError(
            f"both sets must have features of one length, got {len(first)} and {len(second)}. "
            "Use the same feature extractor for both."
        )
    return gaussian_distance(a.mean, first, b.mean, second)
