from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import InvalidProfileError, power_average, power_step_weights


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97, 97.0])
@pytest.mark.parametrize("times", [[1], [1, 2, 3, 4], [7, 14, 21], [3, 4, 100, 101]])
def test_response_of_the_recurrence_is_the_share_of_the_profile(gamma, times):
    """ema-pytorch applies one step's beta per update of many: 55 % then stays on the first weights."""
    response = power_average(np.eye(len(times)), times, gamma)
    np.testing.assert_allclose(response, power_step_weights(times, gamma), atol=1e-15)
    assert response.sum() == pytest.approx(1, abs=1e-15)


def test_average_of_one_update_is_that_update():
    assert power_average([[2.5, -1]], [1000], 6.9).tolist() == [2.5, -1]


def test_coarser_updates_give_the_average_of_held_values(rng):
    """Weights that are constant between updates: updating each step or only at the end is the same."""
    coarse, values = [10, 20, 30], rng.normal(size=3)
    fine = list(range(1, 31))
    assert power_average(np.repeat(values, 10), fine, 5.0) == pytest.approx(
        power_average(values, coarse, 5.0), rel=1e-13
    )


@pytest.mark.parametrize("times", [[], [0, 1], [2, 1], [1, 1], [-1, 1]])
def test_times_that_do_not_increase_are_refused(times):
    with pytest.raises(InvalidProfileError, match="strictly increasing"):
        power_average(np.ones(len(times)), times, 1.0)
    with pytest.raises(InvalidProfileError, match="strictly increasing"):
        power_step_weights(times, 1.0)


def test_one_time_per_value_is_needed():
    with pytest.raises(InvalidProfileError, match="3 values and 2 times"):
        power_average([1, 2, 3], [1, 2], 1.0)
