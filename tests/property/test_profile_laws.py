from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import (
    SIGMA_REL_MAX,
    InvalidProfileError,
    PowerProfile,
    gamma_from_sigma_rel,
    power_average,
    power_beta,
    power_step_weights,
    power_update_weight,
    sigma_rel_from_gamma,
)

from .strategies import profiles, quick, rising_times, sigma_rels


@quick
@given(st.floats(1e-12, SIGMA_REL_MAX))
def test_sigma_rel_survives_the_round_trip(sigma_rel):
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(
        sigma_rel, rel=1e-15, abs=0
    )


@quick
@given(st.floats(0, 1e9))
def test_gamma_survives_the_round_trip(gamma):
    assert gamma_from_sigma_rel(min(sigma_rel_from_gamma(gamma), SIGMA_REL_MAX)) == pytest.approx(
        gamma, rel=1e-14, abs=1e-14
    )


@quick
@given(sigma_rels, sigma_rels)
def test_gamma_falls_as_sigma_rel_rises(a, b):
    low, high = sorted([a, b])
    if high - low > 1e-12:
        assert gamma_from_sigma_rel(low) > gamma_from_sigma_rel(high)


@quick
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_sigma_rel_is_either_converted_or_refused(sigma_rel):
    try:
        gamma = gamma_from_sigma_rel(sigma_rel)
    except InvalidProfileError:
        assert not 1e-300 < sigma_rel <= SIGMA_REL_MAX
    else:
        assert np.isfinite(gamma)
        assert gamma >= 0


@quick
@given(profiles)
def test_tail_falls_from_one_to_zero(profile):
    tail = profile.tail(np.linspace(0, profile.t, 50))
    assert tail[0] == 1
    assert tail[-1] == 0
    assert (np.diff(tail) <= 0).all()


@quick
@given(sigma_rels, st.integers(1, 10**9), st.floats(1e-6, 1e6), st.floats(0, 1))
def test_profile_does_not_depend_on_the_unit_of_time(sigma_rel, t, unit, share):
    here, there = PowerProfile(t, sigma_rel), PowerProfile(t * unit, sigma_rel)
    assert here.tail(share * t) == pytest.approx(there.tail(share * t * unit), rel=1e-6, abs=1e-12)


@quick
@given(st.floats(0, 200), st.integers(1, 10**9), st.floats(1e-9, 1))
def test_beta_and_update_weight_sum_to_one(gamma, t, share):
    dt = share * t
    beta, weight = power_beta(gamma, t, dt), power_update_weight(gamma, t, dt)
    assert beta + weight == pytest.approx(1, abs=1e-15)
    assert 0 <= beta < 1
    assert 0 < weight <= 1


@quick
@given(rising_times, st.floats(0, 200))
def test_recurrence_gives_the_closed_form_weights(times, gamma):
    np.testing.assert_allclose(
        power_average(np.eye(len(times)), times, gamma),
        power_step_weights(times, gamma),
        atol=1e-14,
    )


@quick
@given(rising_times, st.floats(0, 200), st.data())
def test_update_of_two_steps_equals_two_updates_with_held_weights(times, gamma, data):
    """Exact for any interval: leaving an update out is right when the weights did not move."""
    values = np.arange(1.0, len(times) + 1)
    split = data.draw(st.integers(0, len(times) - 1))
    start = times[split - 1] if split else 0
    middle = start + (times[split] - start) / 2
    finer = power_average(
        np.insert(values, split, values[split]), np.insert(np.float64(times), split, middle), gamma
    )
    assert power_average(values, times, gamma) == pytest.approx(finer, rel=1e-12)
