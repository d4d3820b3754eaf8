"""Magnitude-preserving layers: formulas, magnitudes, forced weight normalisation."""

import math

import pytest
import torch
from torch.nn import functional

from reference_trainer.layers import (
    EPSILON,
    CosineAttention,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    mp_sum_shares,
    resample,
    rms_normalize,
)


def rms(a):
    return float(a.square().mean().sqrt())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def formula(a, dim, gain=1.0):
    norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True)
    return gain * a / (EPSILON + norm * math.sqrt(norm.numel() / a.numel()))


@pytest.mark.parametrize(("dim", "gain"), [(1, 1.0), ((1, 2), 0.3), ((1, 2, 3), 1.0)])
def test_rms_normalize_is_its_formula_and_so_is_its_gradient(dim, gain):
    a = torch.randn(4, 5, 3, 3, requires_grad=True)
    g = torch.randn_like(a)
    torch.testing.assert_close(rms_normalize(a, dim, gain), formula(a, dim, gain))
    (own,) = torch.autograd.grad(rms_normalize(a, dim, gain), a, g)
    (expected,) = torch.autograd.grad(formula(a, dim, gain), a, g)
    torch.testing.assert_close(own, expected)


def test_rms_normalize_of_zeros_is_zero_with_finite_gradient():
    a = torch.zeros(2, 3, requires_grad=True)
    y = rms_normalize(a, 1)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(a.grad).all()


def test_rms_normalize_of_float16_computes_the_norm_in_float32():
    a = torch.full((1, 64), 300.0, dtype=torch.float16)  # the squares overflow float16
    assert rms_normalize(a, 1).dtype == torch.float16
    assert rms(rms_normalize(a, 1).float()) == pytest.approx(1, abs=1e-3)


def test_mp_silu_keeps_the_magnitude():
    assert rms(mp_silu(torch.randn(1_000_000))) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_keeps_the_magnitude(t):
    a, b = torch.randn(2, 400_000)
    assert rms(mp_sum(a, b, t)) == pytest.approx(1, abs=5e-3)


def test_mp_sum_shares_are_those_of_the_paper():
    assert mp_sum_shares(0.3) == pytest.approx((0.91915, 0.39392), abs=1e-5)


@pytest.mark.parametrize("channels", [(32, 32), (8, 120)])
def test_mp_cat_keeps_the_magnitude_and_shares_it_evenly(channels):
    a, b = (torch.randn(64, n, 16, 16) for n in channels)
    joined = mp_cat(a, b, 0.5)
    assert rms(joined) == pytest.approx(1, abs=1e-2)
    energy_a, energy_b = joined.split(list(channels), dim=1)
    assert float(energy_a.square().sum() / energy_b.square().sum()) == pytest.approx(1, abs=0.03)


def test_resample_halves_by_means_and_doubles_by_replication():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert resample(x, "down").item() == 1.5
    assert resample(x, "up")[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert resample(x, "keep") is x


def test_fourier_features_have_magnitude_one_and_are_buffers():
    fourier = MPFourier(512)
    assert rms(fourier(torch.linspace(-2, 2, 200))) == pytest.approx(1, abs=0.05)
    assert [name for name, _ in fourier.named_buffers()] == ["freqs", "phases"]
    assert not list(fourier.parameters())


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_conv_applies_rows_of_norm_one_whatever_the_stored_weight(kernel):
    conv = MPConv(6, 4, kernel).eval()
    with torch.no_grad():
        conv.weight.mul_(7.0)
    norms = conv.unit_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", [0, 3])
def test_conv_training_forward_resets_the_stored_rows_to_root_fan_in(kernel):
    conv = MPConv(6, 4, kernel).train()
    with torch.no_grad():
        conv.weight.mul_(7.0)
    conv(torch.randn(2, 6, 4, 4) if kernel else torch.randn(2, 6))
    root = math.sqrt(conv.weight[0].numel())
    norms = conv.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), root), rtol=1e-4, atol=0)


def test_conv_evaluation_never_writes():
    conv = MPConv(6, 4, 3).eval()
    before = conv.weight.detach().clone()
    conv(torch.randn(2, 6, 4, 4))
    assert torch.equal(before, conv.weight)


def test_conv_gradient_is_orthogonal_to_the_weight():
    conv = MPConv(6, 4, 3).train()
    conv(torch.randn(2, 6, 4, 4)).square().sum().backward()
    w, g = conv.weight.detach().flatten(1), conv.weight.grad.flatten(1)
    cosine = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))
    assert float(cosine.abs().max()) < 1e-3  # not 0: epsilon lets a radial part of 1e-4 through


def test_conv_gain_may_be_a_tensor_and_gets_a_gradient():
    conv, gain = MPConv(6, 4, 0), torch.zeros((), requires_grad=True)
    y = conv(torch.randn(2, 6), gain=gain)
    y.sum().backward()
    assert not y.any()
    assert gain.grad != 0


def test_attention_is_softmax_of_scaled_cosines():
    attention = CosineAttention(8, 2, balance=0.3).eval()
    x = torch.randn(2, 8, 3, 3)
    qkv = functional.conv2d(x, attention.qkv.unit_weight()).reshape(2, 3, 2, 4, 9)
    q, k, v = formula(qkv, 3).unbind(1)  # each [n, heads, d, positions]
    weights = torch.softmax(torch.einsum("nhdq,nhdk->nhqk", q, k) / 2.0, dim=-1)
    y = torch.einsum("nhqk,nhdk->nhdq", weights, v).reshape(2, 8, 3, 3)
    expected = mp_sum(x, functional.conv2d(y, attention.proj.unit_weight()), 0.3)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)
