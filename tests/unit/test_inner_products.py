from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import InvalidProfileError, PointProfile, PowerProfile
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
