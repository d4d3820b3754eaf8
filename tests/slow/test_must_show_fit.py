"""Large fits against a solve in 80 digits: the storage noise is what makes them answerable at all."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from posthoc_ema import PowerProfile, fit, gamma_from_sigma_rel
from posthoc_ema.inner_products import density_products, random_walk_products


def exact(inputs, target, norm, noise):
    """Coefficients in 80 digits from the closed forms, sum x = 1 by a Lagrange row."""
    gammas = {p.sigma_rel: exponent(p.sigma_rel) for p in [*inputs, target]}
    a = [(mpf(p.t), gammas[p.sigma_rel] + 1) for p in [*inputs, target]]
    n = len(inputs)

    def product(i, j):
        (s, p), (t, q) = a[i], a[j]
        m = min(s, t)
        if norm == "density":
            return p * q / (p + q - 1) * (m / s) ** p * (m / t) ** q / m
        u, v = (m / s) ** p, (m / t) ** q
        return m * (1 - u / (p + 1) - v / (q + 1) + u * v / (p + q + 1))

    system, right = mpmath.matrix(n + 1, n + 1), mpmath.matrix(n + 1, 1)
    for i in range(n):
        for j in range(i + 1):
            system[i, j] = system[j, i] = product(i, j)
        system[i, i] += mpf(noise[i])
        system[i, n] = system[n, i] = 1
        right[i] = product(i, n)
    right[n] = 1
    return np.array([float(x) for x in mpmath.lu_solve(system, right)][:n])


def exponent(sigma_rel):
    s, gamma = 1 / mpf(sigma_rel) ** 2, mpf(float(gamma_from_sigma_rel(sigma_rel)))
    for _ in range(8):
        f = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
        gamma -= f / ((3 * gamma + 14) * gamma + 16 - s)
    return gamma


@pytest.mark.parametrize("norm", ["random-walk", "density"])
@pytest.mark.parametrize("sigma_rel", [0.015, 0.07, 0.25])
def test_coefficients_of_128_inputs_are_right_where_noise_is_given(norm, sigma_rel):
    inputs = [PowerProfile(t * 977, s) for t in range(1, 65) for s in (0.05, 0.10)]
    target = PowerProfile(64 * 977, sigma_rel)
    gram = (random_walk_products if norm == "random-walk" else density_products)(inputs, inputs)
    noise = 1e-8 * np.diag(gram)
    with mpmath.workdps(80):
        expected = exact(inputs, target, norm, noise)
    result = fit(inputs, [target], norm, noise)
    error = np.abs(result.coefficients[:, 0] - expected).sum() / np.abs(expected).sum()
    print(f"{norm}, sigma_rel {sigma_rel}: {error:.1e} of sum |x|")
    assert error < 1e-6


@pytest.mark.parametrize("norm", ["random-walk", "density"])
def test_2048_inputs_are_solved_without_a_warning_where_noise_is_given(norm):
    inputs = [PowerProfile(t, s) for t in range(1, 1025) for s in (0.05, 0.10)]
    gram = (random_walk_products if norm == "random-walk" else density_products)(inputs, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(
            inputs, [PowerProfile(1024, s) for s in (0.02, 0.1, 0.25)], norm, 1e-8 * np.diag(gram)
        )
    assert np.isfinite(result.coefficients).all()
    np.testing.assert_allclose(result.coefficients.sum(axis=0), 1, atol=1e-12)
    assert result.relative_residual.max() < 0.02
