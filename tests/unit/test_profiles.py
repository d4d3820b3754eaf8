from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from posthoc_ema import (
    SIGMA_REL_MAX,
    InvalidProfileError,
    PhemaError,
    PointProfile,
    PowerProfile,
    Profile,
    gamma_from_sigma_rel,
    power_beta,
    power_update_weight,
    sigma_rel_from_gamma,
)

EPS = np.finfo(np.float64).eps
SIGMA_RELS = [1e-300, 1e-160, 1e-100, 1e-30, 1e-12, 1.001e-9, 0.999e-9, 1e-6, 1e-3, 0.01, 0.05]
SIGMA_RELS += [0.075, 0.1, 0.2, 0.25, 0.28, 0.288, 0.28867, 0.288675134, SIGMA_REL_MAX]

BAD_SIGMA_RELS = [0, -0.0, -0.1, -1, 0.29, 0.3, 0.31, 1, math.inf, -math.inf, math.nan, 5e-324]
"""0.31 and 0.29 guard against ema-pytorch's missing check: it goes on with a complex or negative gamma."""


def exact_gamma(sigma_rel):
    with mpmath.workdps(60):
        s = 1 / mpmath.mpf(sigma_rel) ** 2
        gamma = mpmath.sqrt(s)
        for _ in range(400):
            f = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
            gamma -= f / ((3 * gamma + 14) * gamma + 16 - s)
        return max(gamma, mpmath.mpf(0))


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_gamma_has_full_double_precision(sigma_rel):
    """Two roundings of 1 + gamma: an input's own rounding alone is worth about one."""
    exact = exact_gamma(sigma_rel)
    assert abs(gamma_from_sigma_rel(sigma_rel) - exact) <= 2 * EPS * (1 + exact)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_conversion_round_trips(sigma_rel):
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(
        sigma_rel, rel=4 * EPS, abs=0
    )


def test_conversion_squares_the_right_factor():
    """pytorch-posthoc-ema forgets the square on gamma + 2: it finds gamma 0.354 for sigma_rel 0.15."""
    gamma = 3.5
    variance = 4.5 / (5.5**2 * 6.5)
    assert sigma_rel_from_gamma(gamma) ** 2 == pytest.approx(variance, rel=1e-15)
    assert gamma_from_sigma_rel(math.sqrt(variance)) == pytest.approx(gamma, rel=1e-14)


def test_sigma_rel_is_the_standard_deviation_of_the_density():
    profile = PowerProfile(t=10.0, sigma_rel=0.17)
    tau, weight = np.polynomial.legendre.leggauss(200)
    tau, weight = (tau + 1) * 5, weight * 5
    p = profile.density(tau) * weight
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert math.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(1.7, rel=1e-9)


def test_longest_profile_is_the_plain_average():
    assert float(gamma_from_sigma_rel(SIGMA_REL_MAX)) == 0
    np.testing.assert_allclose(PowerProfile(4, SIGMA_REL_MAX).density([0, 1, 4]), 0.25)


def test_conversion_keeps_the_shape():
    assert gamma_from_sigma_rel(np.full((2, 3), 0.1)).shape == (2, 3)
    assert gamma_from_sigma_rel([]).shape == (0,)


@pytest.mark.parametrize("sigma_rel", BAD_SIGMA_RELS)
def test_bad_sigma_rel_is_refused_with_the_valid_range(sigma_rel):
    for call in (gamma_from_sigma_rel, lambda s: PowerProfile(100, s)):
        with pytest.raises(InvalidProfileError, match=r"\(0, 0\.2887\], got .*Typical") as caught:
            call(sigma_rel)
        assert "\n" not in str(caught.value)


def test_one_bad_entry_among_good_ones_is_found():
    with pytest.raises(InvalidProfileError, match=r"got 0\.3\b"):
        gamma_from_sigma_rel([0.1, 0.3, 0.2])


@pytest.mark.parametrize("gamma", [-1e-9, -1, math.inf, math.nan])
def test_bad_gamma_is_refused(gamma):
    for call in (
        sigma_rel_from_gamma,
        lambda g: power_beta(g, 10, 1),
        lambda g: power_update_weight(g, 10, 1),
    ):
        with pytest.raises(InvalidProfileError, match="gamma must be finite"):
            call(gamma)


@pytest.mark.parametrize(
    ("t", "dt"),
    [(10, 0), (10, -1), (10, 11), (0, 0), (math.inf, 1), (math.nan, 1), (10, math.nan)],
)
def test_bad_update_times_are_refused(t, dt):
    for call in (power_beta, power_update_weight):
        with pytest.raises(InvalidProfileError, match="0 < dt <= t"):
            call(1.0, t, dt)


@pytest.mark.parametrize("t", [0, -1, math.nan, math.inf])
def test_bad_end_of_a_profile_is_refused(t):
    for make in (PointProfile, lambda t: PowerProfile(t, 0.1)):
        with pytest.raises(InvalidProfileError, match="positive, finite"):
            make(t)


def test_every_profile_error_is_also_a_value_error():
    with pytest.raises(ValueError, match="sigma_rel"):
        PowerProfile(1, 0.5)
    assert issubclass(InvalidProfileError, PhemaError)


@pytest.mark.parametrize(
    ("gamma", "t", "dt"), [(0, 7, 3), (1.0, 4, 1), (6.94, 1000, 1), (16.97, 5, 4)]
)
def test_beta_is_the_power_of_the_remaining_share(gamma, t, dt):
    naive = (1 - dt / t) ** (gamma + 1)
    assert power_beta(gamma, t, dt) == pytest.approx(naive, rel=1e-13)
    assert power_update_weight(gamma, t, dt) == pytest.approx(1 - naive, rel=1e-13)


def test_beta_of_the_first_update_is_zero():
    """So the initial weights never enter, whatever the first interval is."""
    assert power_beta(16.97, t=123, dt=123) == 0
    assert power_update_weight(16.97, t=123, dt=123) == 1


@pytest.mark.parametrize("share", [1e-4, 1e-8, 1e-12, 1e-16])
def test_update_weight_keeps_its_digits(share):
    """The naive 1 - (1 - dt/t)^(gamma+1) has lost half of its digits at dt/t = 1e-8."""
    with mpmath.workdps(50):
        exact = 1 - (1 - mpmath.mpf(share)) ** mpmath.mpf(17.97)
    assert abs(power_update_weight(16.97, t=1.0, dt=share) / exact - 1) < 4 * EPS
    if share == 1e-8:
        naive = 1 - (1 - share) ** 17.97
        assert abs(naive / exact - 1) > 1e-9


def test_beta_broadcasts_over_profiles():
    assert power_update_weight(np.array([6.9, 16.9]), 100, 1).shape == (2,)


def test_power_density_is_the_slope_of_its_tail():
    profile = PowerProfile(t=3.0, sigma_rel=0.1)
    tau, h = np.linspace(0.5, 2.9, 13), 1e-6
    slope = (profile.tail(tau - h) - profile.tail(tau + h)) / (2 * h)
    np.testing.assert_allclose(profile.density(tau), slope, rtol=1e-8, atol=1e-9)


def test_power_profile_is_zero_outside_its_range():
    profile = PowerProfile(t=3.0, sigma_rel=0.1)
    assert profile.density([-1.0, 3.1]).tolist() == [0, 0]
    assert profile.tail([-1.0, 0.0, 3.0, 5.0]).tolist() == [1, 1, 0, 0]


def test_point_profile_has_a_step_tail_and_no_density():
    assert PointProfile(10).tail([0, 9.99, 10, 11]).tolist() == [1, 1, 0, 0]
    with pytest.raises(InvalidProfileError, match=r"no density.*random-walk"):
        PointProfile(10).density(5)


def test_profiles_satisfy_the_protocol_and_compare_by_value():
    assert isinstance(PowerProfile(1, 0.1), Profile)
    assert isinstance(PointProfile(1), Profile)
    assert PowerProfile(1, 0.1) == PowerProfile(1, 0.1) != PowerProfile(1, 0.2)
    assert len({PointProfile(1), PointProfile(1)}) == 1
