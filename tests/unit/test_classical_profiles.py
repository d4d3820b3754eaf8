from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posthoc_ema import (
    ExponentialProfile,
    GammaProfile,
    InvalidProfileError,
    PowerProfile,
    Profile,
    TabulatedProfile,
    UniformProfile,
)

SMOOTH = [
    UniformProfile(20, 90),
    ExponentialProfile(100, 7),
    ExponentialProfile(100, 3000),
    ExponentialProfile(100, 30, interval=0.5, warmup=True),
    ExponentialProfile(100, 1e9, interval=0.5, warmup=True),
    TabulatedProfile((0, 40, 60, 100), (1, 0.9, 0.3, 0)),
    TabulatedProfile((10, 100), (0.75, 0)),
    GammaProfile(100, -0.4),
    GammaProfile(100, 3.5),
]
each = pytest.mark.parametrize("profile", SMOOTH, ids=repr)


@each
def test_profile_satisfies_the_protocol(profile):
    assert isinstance(profile, Profile)
    assert hash(profile) == hash(type(profile)(**vars(profile)))


@each
def test_tail_falls_from_one_before_training_to_zero_at_the_end(profile):
    tail = profile.tail(np.linspace(0, profile.t, 200))
    assert np.all(np.diff(tail) <= 0)
    assert profile.tail([-1.0, profile.t, profile.t * 2]).tolist() == [1, 0, 0]
    assert tail[0] == pytest.approx(1 - getattr(profile, "initial_share", 0.0), abs=1e-15)


@each
def test_density_is_the_slope_of_the_tail(profile):
    tau, h = np.linspace(0.31, profile.t - 0.31, 57), 1e-6
    slope = (profile.tail(tau - h) - profile.tail(tau + h)) / (2 * h)
    np.testing.assert_allclose(profile.density(tau), slope, rtol=1e-6, atol=1e-8)
    assert profile.density([-1.0, profile.t * 1.01]).tolist() == [0, 0]


def ema_weights(decays):
    """Weight of the initial copy and of every update, by running the EMA on unit vectors."""
    average = np.eye(len(decays) + 1)[0]
    for k, beta in enumerate(decays, start=1):
        average = beta * average + (1 - beta) * np.eye(len(decays) + 1)[k]
    return average


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("interval", [1, 20])
def test_exponential_tail_is_exact_at_the_updates(beta, warmup, interval):
    decays = [min(beta, (1 + k) / (10 + k)) if warmup else beta for k in range(1, 301)]
    profile = ExponentialProfile.from_beta(300 * interval, beta, interval, warmup=warmup)
    after = 1 - np.cumsum(ema_weights(decays))
    times = np.arange(301) * interval
    np.testing.assert_allclose(profile.tail(times), after, rtol=1e-11, atol=2e-14)
    assert profile.initial_share == pytest.approx(ema_weights(decays)[0], rel=1e-10, abs=1e-300)


def test_ema_without_warmup_keeps_initial_weights():
    assert ExponentialProfile(100, 50).initial_share == pytest.approx(0.25, rel=1e-15)
    assert ExponentialProfile(100, 50, warmup=True).initial_share < 1e-9


def test_warmup_averages_like_a_power_function():
    """Long before its decay is reached, prod (1+k)/(10+k) is close to (tau/t)^9."""
    profile = ExponentialProfile.from_beta(100_000, 0.999999, warmup=True)
    tau = np.linspace(20_000, 100_000, 9)
    np.testing.assert_allclose(profile.tail(tau), GammaProfile(100_000, 8).tail(tau), atol=2e-3)


def test_uniform_from_the_start_is_the_longest_power_profile():
    tau = np.linspace(0, 12, 25)
    np.testing.assert_allclose(UniformProfile(0, 10).tail(tau), GammaProfile(10, 0).tail(tau))


def test_gamma_profile_is_the_power_profile_of_its_exponent():
    power = PowerProfile(70, 0.13)
    tau = np.linspace(0, 80, 41)
    same = GammaProfile(70, power.gamma)
    np.testing.assert_array_equal(same.tail(tau), power.tail(tau))
    np.testing.assert_array_equal(same.density(tau), power.density(tau))


def test_table_takes_arrays_and_is_immutable():
    profile = TabulatedProfile(np.array([0, 1, 2]), np.array([1, 0.5, 0]))
    assert profile == TabulatedProfile((0.0, 1.0, 2.0), (1.0, 0.5, 0.0))
    assert profile.t == 2
    with pytest.raises(AttributeError):
        profile.times = ()


def test_table_of_weights_is_the_weighted_mean_of_the_updates():
    times, weights = [10, 30, 40, 50], [0.1, 0.2, 0.3, 0.0]
    profile = TabulatedProfile.from_weights(times, weights)
    assert profile.t == 40
    assert profile.initial_share == pytest.approx(0.4)
    np.testing.assert_allclose(
        profile.tail([0, 10, 20, 30, 40]), [0.6, 0.5, 0.4, 0.3, 0], atol=1e-15
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformProfile(5, 5), r"0 <= start < end.*PointProfile"),
        (lambda: UniformProfile(-1, 5), "0 <= start"),
        (lambda: UniformProfile(0, math.inf), "0 <= start"),
        (lambda: ExponentialProfile(0, 1), "t must be"),
        (lambda: ExponentialProfile(10, 0), "half_life must be"),
        (lambda: ExponentialProfile(10, math.nan), "half_life must be"),
        (lambda: ExponentialProfile(10, 1, interval=-1), "interval must be"),
        (lambda: ExponentialProfile(10, 1, interval=11, warmup=True), "no update"),
        (lambda: ExponentialProfile.from_beta(10, 1.0), r"beta must lie in \(0, 1\)"),
        (lambda: ExponentialProfile.from_beta(10, 0.0), r"beta must lie in \(0, 1\)"),
        (lambda: TabulatedProfile((1,), (0,)), "at least two times"),
        (lambda: TabulatedProfile((0, 1), (1, 0.5, 0)), "one tail for each"),
        (lambda: TabulatedProfile((1, 1), (1, 0)), "strictly rising"),
        (lambda: TabulatedProfile((-1, 1), (1, 0)), "strictly rising"),
        (lambda: TabulatedProfile((0, math.nan), (1, 0)), "strictly rising"),
        (lambda: TabulatedProfile((0, 1, 2), (0.5, 0.6, 0)), "must fall"),
        (lambda: TabulatedProfile((0, 1), (1.1, 0)), "must fall"),
        (lambda: TabulatedProfile((0, 1), (1, 0.1)), "must fall"),
        (lambda: TabulatedProfile((0, 1), (math.nan, 0)), "must fall"),
        (lambda: TabulatedProfile.from_weights((1, 2), (0.5, 0.6)), r"sum in \(0, 1\]"),
        (lambda: TabulatedProfile.from_weights((1, 2), (-0.5, 0.6)), r"sum in \(0, 1\]"),
        (lambda: TabulatedProfile.from_weights((1, 2), (1.0,)), "one per time"),
        (lambda: GammaProfile(1, -1), "gamma must be finite and > -1"),
        (lambda: GammaProfile(1, math.inf), "gamma must be finite"),
        (lambda: GammaProfile(0, 1), "positive, finite"),
    ],
    ids=itertools.count(),
)
def test_bad_profile_is_refused(make, message):
    with pytest.raises(InvalidProfileError, match=message):
        make()
