from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from posthoc_ema import (
    ExponentialProfile,
    GammaProfile,
    InvalidProfileError,
    PointProfile,
    PowerProfile,
    TabulatedProfile,
    UniformProfile,
)
from posthoc_ema.inner_products import (
    density_products,
    displacement_products,
    random_walk_products,
    residual_norms,
)

A, B = PowerProfile(70, 0.05), PowerProfile(100, 0.13)


def quadrature(view_a, view_b, end):
    nodes, weights = np.polynomial.legendre.leggauss(400)
    tau, weights = (nodes + 1) * end / 2, weights * end / 2
    return (weights * view_a(tau) * view_b(tau)).sum()


def test_random_walk_product_is_the_integral_of_the_tails():
    expected = quadrature(A.tail, B.tail, 70)
    assert random_walk_products([A], [B])[0, 0] == pytest.approx(expected, rel=1e-10)


def test_density_product_is_the_integral_of_the_densities():
    expected = quadrature(A.density, B.density, 70)
    assert density_products([A], [B])[0, 0] == pytest.approx(expected, rel=1e-10)


def test_displacement_product_is_the_integral_of_what_the_tails_leave():
    below = quadrature(lambda u: 1 - A.tail(u), lambda u: 1 - B.tail(u), 70)
    above = quadrature(lambda u: 1 - B.tail(70 + u), lambda u: np.ones_like(u), 30)
    assert displacement_products([A], [B], 120)[0, 0] == pytest.approx(
        below + above + 20, rel=1e-10
    )


def test_point_profile_is_the_limit_of_short_profiles():
    point, short = PointProfile(100), PowerProfile(100, 1e-7)
    assert random_walk_products([point], [A]) == pytest.approx(random_walk_products([short], [A]))
    assert displacement_products([point], [A], 101) == pytest.approx(
        displacement_products([short], [A], 101), rel=2e-5
    )


def test_products_have_one_row_and_column_per_profile():
    assert random_walk_products([A, B, A], [A, B]).shape == (3, 2)
    assert density_products([A], []).shape == (1, 0)


def test_point_profile_has_no_density_product():
    with pytest.raises(InvalidProfileError, match="no density"):
        density_products([A], [PointProfile(3)])


def test_other_profiles_are_refused():
    with pytest.raises(InvalidProfileError, match="got str"):
        random_walk_products(["0.1"], [A])


def test_extreme_times_and_lengths_do_not_overflow():
    profiles = [PowerProfile(t, s) for t in (1, 1e12, 1e15) for s in (1e-6, 0.01, 0.28)]
    for gram in (
        random_walk_products(profiles, profiles),
        density_products(profiles, profiles),
        displacement_products(profiles, profiles, 2e15),
    ):
        assert np.isfinite(gram).all()


@pytest.mark.parametrize("norm", ["random-walk", "density"])
def test_residual_of_a_profile_from_itself_is_zero(norm):
    assert residual_norms([A, B], [B], np.array([[0.0], [1.0]]), norm)[0] == 0


def test_residual_is_the_norm_of_the_difference():
    difference = (
        random_walk_products([A], [A])
        + random_walk_products([B], [B])
        - 2 * random_walk_products([A], [B])
    )[0, 0]
    residual = residual_norms([A], [B], np.ones((1, 1)), "random-walk")[0]
    assert residual == pytest.approx(np.sqrt(difference), rel=1e-10)


def test_small_residuals_are_not_lost_to_cancellation():
    """From inner products the difference of near equals ends at 1e-8 of the profile; here it goes on."""
    t, near = 1000.0, PowerProfile(1000, 0.1 * (1 + 1e-11))
    residual = residual_norms([near], [PowerProfile(t, 0.1)], np.ones((1, 1)), "random-walk")[0]
    tenfold = PowerProfile(t, 0.1 * (1 + 1e-10))
    larger = residual_norms([tenfold], [PowerProfile(t, 0.1)], np.ones((1, 1)), "random-walk")[0]
    assert 0 < residual < 1e-9
    assert larger / residual == pytest.approx(10, rel=0.05)


MIXED = [
    PowerProfile(100, 0.1),
    GammaProfile(80, -0.4),
    PointProfile(70),
    UniformProfile(30, 90),
    UniformProfile(89.99, 90),
    ExponentialProfile(100, 2),
    ExponentialProfile(95, 800),
    ExponentialProfile(60, 9, interval=0.25, warmup=True),
    TabulatedProfile((10, 40, 41, 75), (0.9, 0.8, 0.2, 0)),
]


def exact_displacement(profile, u):
    """1 - T at u, in mpmath and from the definitions."""
    t = mpf(profile.t)
    if u >= t:
        return mpf(1)
    match profile:
        case PointProfile():
            return mpf(0)
        case PowerProfile() | GammaProfile():
            return (u / t) ** (mpf(profile.gamma) + 1)
        case UniformProfile(start, _):
            return max(u - start, mpf(0)) / (t - start)
        case TabulatedProfile(times, tails):
            for (a, b), (p, q) in zip(
                itertools.pairwise(times), itertools.pairwise(tails), strict=True
            ):
                if u <= b:
                    return 1 - mpf(p) - (mpf(q) - p) * max(u - a, mpf(0)) / (mpf(b) - a)
        case ExponentialProfile(half_life=h, interval=dt, warmup=warmup):
            switch = mpf(profile.warmup_end)
            late = mpf(2) ** (-(t - max(u, switch)) / h)
            if not warmup:
                return late
            j, n = min(u, switch) / dt, switch / dt
            product = mpmath.mpf(1)
            for i in range(2, 11):
                product *= (j + i) / (n + i)
            return late * product
    raise AssertionError(profile)


def exact_integral(function, a, b):
    ends = {0.0, 30.0, 89.99, 90.0, 10.0, 40.0, 41.0, 75.0, 36.5, 38.0}
    top = max(a.t, b.t)
    late = {max(t - k, 0.0) for t in (a.t, b.t) for k in (0, 3, 12, 30)}
    switch = {p.warmup_end for p in (a, b) if isinstance(p, ExponentialProfile)}
    breaks = sorted({*ends, *late, *switch})
    return mpmath.quad(function, [u for u in breaks if u <= top])


@pytest.mark.parametrize("j", range(len(MIXED)))
def test_products_of_any_two_kinds_are_the_integrals(j):
    """Against mpmath to 1e-10: closed forms between powers and points, quadrature elsewhere."""
    b = MIXED[j]
    for a in MIXED[: j + 1]:
        with mpmath.workdps(20):
            expected = exact_integral(
                lambda u, a=a: exact_displacement(a, u) * exact_displacement(b, u), a, b
            )
            tails = exact_integral(
                lambda u, a=a: (1 - exact_displacement(a, u)) * (1 - exact_displacement(b, u)), a, b
            )
        end = max(a.t, b.t)
        for x, y in ((a, b), (b, a)):
            assert displacement_products([x], [y], end)[0, 0] == pytest.approx(
                float(expected), rel=1e-10
            )
            assert random_walk_products([x], [y])[0, 0] == pytest.approx(float(tails), rel=1e-10)


def test_products_of_a_mixture_equal_those_of_each_pair():
    gram = displacement_products(MIXED, MIXED, 120)
    for i, a in enumerate(MIXED):
        for j, b in enumerate(MIXED):
            single = displacement_products([a], [b], 120)[0, 0]
            assert gram[i, j] == pytest.approx(single, rel=1e-10)
    assert np.linalg.eigvalsh(gram).min() > 0


SMOOTH = [A, UniformProfile(30, 90), ExponentialProfile(95, 2), TabulatedProfile((0, 9), (1, 0))]


def test_density_products_are_the_integrals_where_a_density_exists():
    gram = density_products(SMOOTH, SMOOTH)
    tau = (np.arange(400_000) + 0.5) * 95 / 400_000
    views = np.array([p.density(tau) for p in SMOOTH])
    np.testing.assert_allclose(gram, views @ views.T * 95 / 400_000, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (ExponentialProfile(100, 50), r"keeps 0\.25 of the initial weights.*random-walk"),
        (TabulatedProfile((0, 1), (0.5, 0)), r"keeps 0\.5 of the initial weights"),
        (GammaProfile(10, -0.1), "infinite at 0.*random-walk"),
        (PointProfile(3), "no density.*random-walk"),
    ],
)
def test_density_norm_refuses_point_masses(profile, message):
    with pytest.raises(InvalidProfileError, match=message):
        density_products([A], [profile])


@pytest.mark.parametrize("i", range(len(MIXED)))
def test_density_under_the_integral_scales_the_residual(i):
    others = [p for k, p in enumerate(MIXED) if k != i]
    x = np.full((len(others), 1), 1 / len(others))
    plain = residual_norms(others, [MIXED[i]], x, "random-walk")
    scaled = residual_norms(
        others, [MIXED[i]], x, "random-walk", density=lambda tau: np.full_like(tau, 9.0)
    )
    np.testing.assert_allclose(scaled, 3 * plain, rtol=1e-12)
    early = residual_norms(
        others, [MIXED[i]], x, "random-walk", density=lambda tau: (tau < 30).astype(float)
    )
    late = residual_norms(
        others, [MIXED[i]], x, "random-walk", density=lambda tau: (tau >= 30).astype(float)
    )
    np.testing.assert_allclose(early**2 + late**2, plain**2, rtol=1e-12)
