"""Fits in 120 digits for thousands of inputs: exact residuals, corrected through a float64 solve.

The system is kept in fixed point with 400 binary digits (Python integers). A float64 factorisation
gives a step of a few digits; the residual of the sum is exact; repeated until the step is below 1e-100
this is the solution of the 120-digit system, in a minute where an elimination would take hours.
"""

from __future__ import annotations

import mpmath
import numpy as np
import scipy.linalg
from mpmath import mpf

from posthoc_ema import gamma_from_sigma_rel

BITS = 400
TABLE_BITS = 1600  # t^a and t^-a before their product is cut to BITS


def exponent(sigma_rel):
    """gamma + 1 by Newton's method on the cubic."""
    s, gamma = 1 / mpf(sigma_rel) ** 2, mpf(float(gamma_from_sigma_rel(sigma_rel)))
    for _ in range(8):
        f = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
        gamma -= f / ((3 * gamma + 14) * gamma + 16 - s)
    return gamma + 1


def fixed(value, bits=BITS):
    return int(mpmath.nint(mpf(value) * mpf(2) ** bits))


def exact_gram(profiles, norm):
    """Inner products of power profiles from the closed forms, integers in units of 2^-BITS."""
    a = {s: exponent(s) for s in {p.sigma_rel for p in profiles}}
    drop = 0 if norm == "random-walk" else 1
    keys = {(p.t, p.sigma_rel) for p in profiles}
    keys |= {(p.t, s) for p in profiles for s in a}
    power = {(t, s): fixed(mpf(t) ** (a[s] - drop), TABLE_BITS) for t, s in keys}
    inverse = {(t, s): fixed(mpf(t) ** (drop - a[s]), TABLE_BITS) for t, s in keys}
    one_over_t = {p.t: fixed(1 / mpf(p.t)) for p in profiles}
    if norm == "random-walk":
        first = {s: fixed(1 - 1 / (a[s] + 1)) for s in a}
        second = {(s, r): fixed(1 / (a[r] + 1) - 1 / (a[s] + a[r] + 1)) for s in a for r in a}
    else:
        second = {(s, r): fixed(a[s] * a[r] / (a[s] + a[r] - 1)) for s in a for r in a}
    gram = np.empty((len(profiles), len(profiles)), dtype=object)
    for i, p in enumerate(profiles):
        for j, q in enumerate(profiles):
            if p.t > q.t:
                continue
            shift = 2 * TABLE_BITS - BITS
            u = (power[p.t, q.sigma_rel] * inverse[q.t, q.sigma_rel]) >> shift  # (t_p/t_q)^a_q
            product = (u * second[p.sigma_rel, q.sigma_rel]) >> BITS
            if norm == "random-walk":
                value = fixed(p.t, 0) * (first[p.sigma_rel] - product)
            else:
                value = (product * one_over_t[q.t]) >> BITS
            gram[i, j] = gram[j, i] = value
    return gram


def exact_coefficients(inputs, targets, norm, noise):
    """x of the fit with noise and sum x = 1 in the solve, shape (num_inputs, num_targets)."""
    with mpmath.workdps(520):  # the tables have 1600 bits
        n, one = len(inputs), 1 << BITS
        gram = exact_gram([*inputs, *targets], norm)
        system, right = gram[:n, :n].copy(), gram[:n, n:]
        for i in range(n):
            system[i, i] += fixed(noise[i])
    rough = np.ones((n + 1, n + 1))
    rough[:n, :n], rough[n, n] = (system / one).astype(np.float64), 0.0
    scale = np.append(1 / np.sqrt(np.diag(rough)[:n]), 1.0)
    scale[n] = 1 / scale[:n].mean()
    factor = scipy.linalg.lu_factor(rough * scale * scale[:, None])
    x = np.zeros((n + 1, len(targets)), dtype=object)  # the last row is the multiplier
    for _ in range(200):
        rows = right - ((system @ x[:n]) >> BITS) - x[n]
        residual = np.vstack([rows, [one - x[:n].sum(axis=0)]])
        largest = max(abs(v) for v in residual.ravel())
        if largest == 0:
            break
        b = (residual / largest).astype(np.float64)
        step = scipy.linalg.lu_solve(factor, b * scale[:, None]) * scale[:, None]
        step = np.vectorize(lambda v: int(v * 2.0**80), otypes=[object])(step) * largest >> 80
        x = x + step
        if max(abs(v) for v in step[:n].ravel()) < one // 10**100:
            return (x[:n] / one).astype(np.float64)
    raise AssertionError("the refinement does not converge: the float64 factor is useless")
