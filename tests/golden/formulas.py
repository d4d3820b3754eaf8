"""The golden numbers from their formulas, in 120 digits, sharing no line with the library.

Formulas: docs/explanation/profiles-and-fitting.md. Everything is mpmath; no NumPy, no posthoc_ema.
"""

from __future__ import annotations

from typing import Any

from mpmath import lu_solve, matrix, mp, mpf, polyroots, quad, sqrt

DIGITS = 120


def exponent(sigma_rel: float) -> mpf:
    """gamma: the largest real root of g^3 + 7 g^2 + (16 - s) g + (12 - s), s = sigma_rel^-2."""
    s = 1 / mpf(sigma_rel) ** 2
    roots = polyroots([1, 7, 16 - s, 12 - s], maxsteps=500, extraprec=400)
    return max(mp.re(root) for root in roots)


def density_product(t_a: float, g_a: mpf, t_b: float, g_b: mpf) -> mpf:
    """Integral of the product of two power densities over [0, min(t_a, t_b)], by antiderivative."""
    a, b, m = g_a + 1, g_b + 1, mpf(min(t_a, t_b))
    return a * b / (mpf(t_a) ** a * mpf(t_b) ** b) * m ** (a + b - 1) / (a + b - 1)


def random_walk_product(t_a: float, g_a: mpf, t_b: float, g_b: mpf) -> mpf:
    """Integral of the product of two tails 1 - (tau/t)^(gamma+1), by antiderivative."""
    a, b, m = g_a + 1, g_b + 1, mpf(min(t_a, t_b))
    return (
        m
        - m ** (a + 1) / ((a + 1) * mpf(t_a) ** a)
        - m ** (b + 1) / ((b + 1) * mpf(t_b) ** b)
        + m ** (a + b + 1) / ((a + b + 1) * mpf(t_a) ** a * mpf(t_b) ** b)
    )


PRODUCTS = {"density": density_product, "random_walk": random_walk_product}


def density_by_quadrature(t_a: float, g_a: mpf, t_b: float, g_b: mpf) -> mpf:
    """The same integral as `density_product`, by quadrature: a check of the antiderivative."""
    a, b, m = g_a + 1, g_b + 1, mpf(min(t_a, t_b))
    return quad(lambda u: a / t_a * (u / t_a) ** g_a * b / t_b * (u / t_b) ** g_b, [0, m / 2, m])


def random_walk_by_quadrature(t_a: float, g_a: mpf, t_b: float, g_b: mpf) -> mpf:
    """The same integral as `random_walk_product`, by quadrature."""
    a, b, m = g_a + 1, g_b + 1, mpf(min(t_a, t_b))
    return quad(lambda u: (1 - (u / t_a) ** a) * (1 - (u / t_b) ** b), [0, m / 2, m])


def solve_fit(
    inputs: list[list[float]], target: list[float], norm: str, noise: float, constrained: bool
) -> dict[str, Any]:
    """Minimum of x'Gx - 2 x'y + x'Nx, with sum x = 1 in the solve or by division afterwards."""
    product, n = PRODUCTS[norm], len(inputs)
    ends = [(t, exponent(sigma_rel)) for t, sigma_rel in [*inputs, target]]
    gram = matrix(n + 1, n + 1)
    for i in range(n + 1):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = product(*ends[i], *ends[j])
    system, right = matrix(n + 1, n + 1), matrix(n + 1, 1)
    for i in range(n):
        for j in range(n):
            system[i, j] = gram[i, j] + (mpf(noise) if i == j else 0)
        system[i, n] = system[n, i] = 1
        right[i] = gram[i, n]
    right[n] = 1
    if constrained:
        x = list(lu_solve(system, right))[:n]
    else:
        free = list(lu_solve(system[:n, :n], right[:n, 0]))
        x = [v / sum(free) for v in free]
    vector = [*x, mpf(-1)]
    squared = sum(vector[i] * gram[i, j] * vector[j] for i in range(n + 1) for j in range(n + 1))
    return {"x": x, "residual": sqrt(abs(squared))}
