"""Magnitude-preserving layers: formulas, magnitudes, forced weight normalisation."""

import math

import pytest
import torch
from torch.nn import functional

from reference_trainer.layers import (
    EPSILON,
    Conv,
    Fourier,
    GroupNorm,
    Positional,
    attend,
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
    fourier = Fourier(512)
    assert rms(fourier(torch.linspace(-2, 2, 200))) == pytest.approx(1, abs=0.05)
    assert [name for name, _ in fourier.named_buffers()] == ["freqs", "phases"]
    assert not list(fourier.parameters())


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_conv_applies_rows_of_norm_one_whatever_the_stored_weight(kernel):
    conv = Conv(6, 4, kernel).eval()
    with torch.no_grad():
        conv.weight.mul_(7.0)
    norms = conv.applied_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", [0, 3])
def test_conv_force_norm_resets_the_stored_rows_to_root_fan_in(kernel):
    conv = Conv(6, 4, kernel)
    with torch.no_grad():
        conv.weight.mul_(7.0)
    conv.force_norm()
    root = math.sqrt(conv.weight[0].numel())
    norms = conv.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), root), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weights", ["normalized", "plain"])
def test_conv_force_norm_leaves_other_kinds_of_weights(weights):
    conv = Conv(6, 4, 3, weights=weights)
    before = conv.weight.detach().clone()
    conv.force_norm()
    assert torch.equal(before, conv.weight)


def test_conv_plain_weights_are_applied_as_stored():
    conv = Conv(6, 4, 3, weights="plain", init="uniform", bias=True)
    x = torch.randn(2, 6, 4, 4)
    expected = functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    assert float(conv.weight.detach().abs().max()) <= 1 / math.sqrt(54)


@pytest.mark.parametrize("weights", ["normalized", "plain"])
def test_conv_folded_applies_the_same(weights):
    conv, x = Conv(6, 4, 3, weights=weights), torch.randn(2, 6, 4, 4)
    expected = conv(x, gain=0.3)
    conv.fold(0.3)
    torch.testing.assert_close(conv(x, gain=0.3), expected)


@pytest.mark.parametrize("training", [True, False])
def test_conv_forward_never_writes(training):
    conv = Conv(6, 4, 3).train(training)
    before = conv.weight.detach().clone()
    conv(torch.randn(2, 6, 4, 4))
    assert torch.equal(before, conv.weight)


def test_conv_gradient_is_orthogonal_to_the_weight():
    conv = Conv(6, 4, 3).train()
    conv(torch.randn(2, 6, 4, 4)).square().sum().backward()
    w, g = conv.weight.detach().flatten(1), conv.weight.grad.flatten(1)
    cosine = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))
    assert float(cosine.abs().max()) < 1e-3  # not 0: epsilon lets a radial part of 1e-4 through


def test_conv_gain_may_be_a_tensor_and_gets_a_gradient():
    conv, gain = Conv(6, 4, 0), torch.zeros((), requires_grad=True)
    y = conv(torch.randn(2, 6), gain=gain)
    y.sum().backward()
    assert not y.any()
    assert gain.grad != 0


@pytest.mark.parametrize("cosine", [True, False])
def test_attention_is_softmax_of_scaled_products(cosine):
    qkv = torch.randn(2, 24, 3, 3)
    heads = qkv.reshape(2, 3, 2, 4, 9)
    q, k, v = (formula(heads, 3) if cosine else heads).unbind(1)  # each [n, heads, d, positions]
    weights = torch.softmax(torch.einsum("nhdq,nhdk->nhqk", q, k) / 2.0, dim=-1)
    expected = torch.einsum("nhqk,nhdk->nhdq", weights, v).reshape(2, 8, 3, 3)
    torch.testing.assert_close(attend(qkv, 2, cosine=cosine), expected, rtol=1e-5, atol=1e-5)


def test_group_norm_of_config_c_divides_by_the_root_mean_square_of_the_group():
    norm, x = GroupNorm(8, affine=False), 5 * torch.randn(2, 8, 3, 3) + 1
    groups = x.reshape(2, 2, 4 * 9)
    expected = groups / (1e-4 + groups.square().mean(2, keepdim=True).sqrt())
    torch.testing.assert_close(norm(x), expected.reshape(x.shape), rtol=1e-5, atol=1e-5)
    assert not list(norm.parameters())


def test_group_norm_of_config_a_is_that_of_torch():
    norm, x = GroupNorm(8, affine=True), 5 * torch.randn(2, 8, 3, 3) + 1
    torch.testing.assert_close(norm(x), functional.group_norm(x, 2, eps=1e-5))
    assert len(list(norm.parameters())) == 2


def test_positional_features_are_cosines_and_sines_of_falling_frequencies():
    features = Positional(4)(torch.tensor([0.5]))
    angles = [0.5, 0.5 * 10000**-0.5]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(features, torch.tensor([expected]))
