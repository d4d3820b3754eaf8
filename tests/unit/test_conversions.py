from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posthoc_ema import (
    SIGMA_REL_MAX,
    ExponentialProfile,
    GammaProfile,
    InvalidProfileError,
    PowerProfile,
    beta_from_sigma_rel,
    gamma_of_sparse_updates,
    half_life_fraction_from_sigma_rel,
    half_life_from_sigma_rel,
    power_beta,
    sigma_rel_from_beta,
    sigma_rel_from_gamma,
    sigma_rel_from_half_life,
    sigma_rel_from_half_life_fraction,
)

SIGMA_RELS = np.array([1e-6, 0.01, 0.05, 0.10, 0.2, 0.28, SIGMA_REL_MAX])


@pytest.mark.parametrize("t", [1.0, 1e5, 2e9])
def test_half_life_round_trips(t):
    there = half_life_from_sigma_rel(SIGMA_RELS, t)
    np.testing.assert_allclose(sigma_rel_from_half_life(there, t), SIGMA_RELS, rtol=1e-15)


@pytest.mark.parametrize(("t", "dt"), [(100, 1), (1e6, 1), (2e9, 2048)])
def test_beta_round_trips(t, dt):
    """beta itself is rounded: at dt/t = 1e-6 ten digits of 1 - beta are left."""
    there = beta_from_sigma_rel(SIGMA_RELS[1:], t, dt)
    back = sigma_rel_from_beta(np.minimum(there, 1 - dt / t), t, dt)
    np.testing.assert_allclose(back, SIGMA_RELS[1:], rtol=1e-8 if t > 1000 else 1e-12)


def test_half_life_fraction_round_trips():
    there = half_life_fraction_from_sigma_rel(SIGMA_RELS)
    np.testing.assert_allclose(sigma_rel_from_half_life_fraction(there), SIGMA_RELS, rtol=1e-14)


@pytest.mark.parametrize(
    ("fraction", "sigma_rel"),
    [(0.01, 0.014), (0.02, 0.027), (0.05, 0.0629), (0.1, 0.111), (0.2, 0.178)],
)
def test_half_life_fraction_names_the_lengths_of_torchtitan(fraction, sigma_rel):
    assert float(sigma_rel_from_half_life_fraction(fraction)) == pytest.approx(sigma_rel, abs=7e-4)


def test_half_life_fraction_is_what_its_recurrence_tracks():
    """decay 2^(-1/(f n)) at step n, run for 20000 steps, against the power profile it is said to be."""
    f, steps = 0.05, 20_000
    n = np.arange(1, steps + 1)
    log_kept = np.cumsum((-math.log(2) / (f * n))[::-1])[::-1]  # of what was there before step n
    profile = PowerProfile(steps, float(sigma_rel_from_half_life_fraction(f)))
    np.testing.assert_allclose(1 - np.exp(log_kept[1:]), profile.tail(n[:-1]), atol=4e-4)


def test_half_life_gives_equal_standard_deviation():
    t, half_life = 1e6, 5e4
    sigma_rel = float(sigma_rel_from_half_life(half_life, t))
    assert sigma_rel * t == pytest.approx(1 / ExponentialProfile(t, half_life).rate, rel=1e-15)


def test_beta_is_that_of_the_tracker():
    gamma, t, dt = 6.94, 5000.0, 3.0
    sigma_rel = sigma_rel_from_gamma(gamma)
    assert beta_from_sigma_rel(sigma_rel, t, dt) == pytest.approx(
        power_beta(gamma, t, dt), rel=1e-12
    )


@pytest.mark.parametrize(("every", "mean"), [(10, 0.441), (100, 0.070)])
def test_sparse_updates_give_the_mean_that_was_measured(every, mean):
    """sigma_rel 0.10 tracked with one step's beta at every k-th of 2000 steps (facts of the peers)."""
    gamma = float(gamma_of_sparse_updates(6.9372, every))
    steps, beta = range(every, 2001, every), lambda n: (1 - 1 / n) ** 7.9372
    average = 0.0
    for n in steps:
        average = beta(n) * average + (1 - beta(n)) * n
    assert average / 2000 == pytest.approx(mean, abs=0.006)
    assert (gamma + 1) / (gamma + 2) == pytest.approx(mean, abs=0.006)
    assert GammaProfile(2000, gamma).t == 2000


def test_updates_at_every_step_keep_gamma():
    assert gamma_of_sparse_updates([0.0, 6.94], 1).tolist() == pytest.approx([0.0, 6.94])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_rel_from_half_life(0, 10), "half_life must be positive"),
        (lambda: sigma_rel_from_half_life(1, -1), "t must be positive"),
        (lambda: sigma_rel_from_half_life(3, 10), "at most 0.2001 t, got 0.3000 t"),
        (lambda: half_life_from_sigma_rel(0.3, 10), "sigma_rel must lie"),
        (lambda: sigma_rel_from_beta(1.0, 10), r"beta must lie in \(0, 1\)"),
        (lambda: sigma_rel_from_beta(math.nan, 10), r"beta must lie in \(0, 1\)"),
        (lambda: sigma_rel_from_beta(0.5, 1, 1), "dt must be smaller than t"),
        (lambda: sigma_rel_from_beta(0.9999, 10), "beta must be at most 1 - dt/t"),
        (lambda: beta_from_sigma_rel(0.1, 10, 11), "0 < dt <= t"),
        (lambda: sigma_rel_from_half_life_fraction(0.7), "fraction must be at most ln 2"),
        (lambda: sigma_rel_from_half_life_fraction(0), "fraction must be positive"),
        (lambda: half_life_fraction_from_sigma_rel(0), "sigma_rel must lie"),
        (lambda: gamma_of_sparse_updates(1.0, 0), "every >= 1"),
        (lambda: gamma_of_sparse_updates(-1.0, 2), "gamma > -1"),
    ],
    ids=itertools.count(),
)
def test_bad_conversion_is_refused(call, message):
    with pytest.raises(InvalidProfileError, match=message):
        call()
