"""The normalisation with its closed derivative: against finite differences, for any shape, size and gain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_trainer.layers import EPSILON, rms_normalize


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(1, 3)),
    dim=st.sampled_from([1, 2, (1, 2), (0, 2)]),
    gain=st.floats(0.1, 3.0),
)
def test_normalize_has_the_derivative_of_finite_differences(seed, shape, dim, gain):
    a = drawn(seed, *shape)
    # Where the norm is small the function bends within a step of the difference.
    a = (a + torch.sign(a)).requires_grad_()
    direction, cotangent = drawn(seed + 1, *shape), drawn(seed + 2, *shape)
    (gradient,) = torch.autograd.grad(rms_normalize(a, dim, gain), a, cotangent)
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (rms_normalize(a + s * direction, dim, gain) for s in (step, -step))
        slope = ((ahead - behind) / (2 * step) * cotangent).sum()
    size = gain * cotangent.norm() * direction.norm()
    assert float((gradient * direction).sum() - slope) == pytest.approx(0, abs=2e-3 * float(size))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-6, 3), gain=st.floats(0.1, 3.0))
def test_normalize_is_its_formula_at_every_scale(seed, scale, gain):
    a = (drawn(seed, 3, 16) * 10.0**scale).requires_grad_()
    root_mean_square = a.square().mean(dim=1, keepdim=True).sqrt()
    formula = gain * a / (EPSILON + root_mean_square)
    found, g = rms_normalize(a, 1, gain), drawn(seed + 1, 3, 16)
    torch.testing.assert_close(found, formula, rtol=1e-5, atol=1e-6)
    (own,), (expected,) = (torch.autograd.grad(y, a, g) for y in (found, formula))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_normalize_in_low_precision_rounds_only_its_result(seed, dtype):
    a = (drawn(seed, 4, 64) * 100).to(dtype)  # float16 could not hold the sum of the squares
    want = rms_normalize(a.float(), 1)
    torch.testing.assert_close(
        rms_normalize(a, 1).float(), want, rtol=3 * float(torch.finfo(dtype).eps), atol=0
    )
