"""The tracking recurrence in NumPy: the oracle that every tracker is tested against.

theta_hat <- beta theta_hat + (1 - beta) theta with beta = (1 - dt/t)^(gamma+1) (EDM2, eq. 127). With
theta constant between updates this is exact: the update that ends at t_k gets the weight
(t_k^(gamma+1) - t_(k-1)^(gamma+1)) / t^(gamma+1), the share of the profile between the two times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import FloatArray, power_update_weight


def _check_times(times: Sequence[float]) -> None:
    if not len(times) or not np.all(np.diff(np.asarray(times, dtype=np.float64), prepend=0.0) > 0):
        raise InvalidProfileError(
            f"times must be positive and strictly increasing, got {list(times)[:8]}. "
            "They are the training times after each update, one per update."
        )


def power_average(values: npt.ArrayLike, times: Sequence[float], gamma: float) -> FloatArray:
    """Power-function average of a piecewise constant trajectory, by the tracking recurrence.

    Args:
        values: weights after each update, shape (num_updates, ...).
        times: training time after each update, strictly increasing, all > 0.
        gamma: exponent of the profile, >= 0.

    Returns:
        The average at times[-1], float64, shape values.shape[1:].

    Raises:
        InvalidProfileError: times do not increase, or their number differs from that of the values.

    Example:
        >>> float(power_average([1.0, 3.0], times=[1, 2], gamma=0.0))  # the plain mean
        2.0
    """
    values = np.asarray(values, dtype=np.float64)
    _check_times(times)
    if len(values) != len(times):
        raise InvalidProfileError(
            f"one time per value is needed, got {len(values)} values and {len(times)} times."
        )
    average = np.zeros(values.shape[1:])
    last = 0.0
    for theta, t in zip(values, times, strict=True):
        average += power_update_weight(gamma, t, t - last) * (theta - average)
        last = t
    return average


def power_step_weights(times: Sequence[float], gamma: float) -> FloatArray:
    """Closed form of the weight that each update has in the average at times[-1].

    Args:
        times: training time after each update, strictly increasing, all > 0.
        gamma: exponent of the profile, >= 0.

    Returns:
        Weights, float64, shape (num_updates,); they sum to one.

    Raises:
        InvalidProfileError: times are empty, do not increase, or are not positive.

    Example:
        >>> power_step_weights([1, 2], gamma=1.0).tolist()
        [0.25, 0.75]
    """
    _check_times(times)
    ratio = np.asarray(times, dtype=np.float64) / times[-1]
    return np.diff(ratio ** (gamma + 1), prepend=0.0)
