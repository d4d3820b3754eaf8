"""Magnitude-preserving functions and layers keep unit magnitude, at the start and after training.

The paper's assumptions (EDM2 sections 2.3, B.4, B.7): entries of the input are independent and of unit
magnitude, and where a nonlinearity is involved they are normal. Convolutions are measured away from the
border, where zero padding takes something away that EDM2 does not put back. Tolerance: 5 %.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_trainer.config import LossConfig, NetworkConfig
from reference_trainer.data import load_dataset
from reference_trainer.layers import (
    Conv,
    Fourier,
    attend,
    mp_cat,
    mp_silu,
    mp_sum,
    resample,
    rms_normalize,
)
from reference_trainer.losses import draw_noise, uncertainty_loss
from reference_trainer.precond import Precond
from reference_trainer.presets import DIGITS

TOLERANCE = 0.05
SIDE = 16
DIGITS_NETWORK = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    clip_act=None,
)

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0.0, 1.0)
widths = st.integers(4, 96)
few = functools.partial(settings, max_examples=25, deadline=None)


def magnitude(x):
    """Root mean square, M of EDM2 eq. 68."""
    return float(x.detach().to(torch.float64).square().mean().sqrt())


def inside(x):
    """The pixels whose neighbours all exist."""
    return x[..., 1:-1, 1:-1]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near_one(x, tolerance=TOLERANCE):
    assert magnitude(x) == pytest.approx(1, abs=tolerance)


# ---- functions


@few()
@given(seeds)
def test_mp_silu_keeps_unit_magnitude(seed):
    near_one(mp_silu(normal(seed, 20_000)))


@few()
@given(seeds, shares)
def test_mp_sum_keeps_unit_magnitude(seed, t):
    near_one(mp_sum(*normal(seed, 2, 10_000), t))


@few()
@given(seeds, shares, widths, widths)
def test_mp_cat_keeps_unit_magnitude_and_its_shares(seed, t, n_a, n_b):
    a, b = normal(seed, 8, n_a, 16, 16), normal(seed + 1, 8, n_b, 16, 16)
    joined = mp_cat(a, b, t)
    near_one(joined)
    # What the parts contribute to a layer behind is in the ratio of the shares, whatever their widths.
    energy_a, energy_b = (part.square().sum() for part in joined.split([n_a, n_b], dim=1))
    total = (1 - t) ** 2 + t**2
    assert float(energy_b / (energy_a + energy_b)) == pytest.approx(t**2 / total, abs=TOLERANCE)


@few()
@given(seeds)
def test_fourier_features_have_unit_magnitude(seed):
    torch.manual_seed(seed % 2**31)
    near_one(Fourier(2048)(0.3 * normal(seed, 32)))


@few()
@given(seeds, st.floats(0.05, 100.0), widths)
def test_pixel_norm_gives_unit_magnitude_to_every_pixel(seed, scale, channels):
    y = rms_normalize(scale * normal(seed, 3, channels, 5, 5), dim=1)
    of_pixels = y.square().mean(dim=1).sqrt()
    torch.testing.assert_close(of_pixels, torch.ones_like(of_pixels), rtol=0, atol=TOLERANCE)


@few()
@given(seeds, st.sampled_from(["up", "down"]))
def test_resampling_keeps_the_magnitude_of_what_both_resolutions_can_hold(seed, mode):
    near_one(resample(resample(normal(seed, 4, 8, SIDE, SIDE), "up"), mode))


@few()
@given(seeds, st.sampled_from([1, 2, 4]), st.sampled_from([4, 16]))
def test_attention_keeps_unit_magnitude_where_values_agree(seed, heads, per_head):
    """Averaging cannot but shrink values that differ: equal ones keep their magnitude, none gain."""
    channels = heads * per_head
    apart = normal(seed, 4, 3 * channels, 4, 4)
    alike = apart.clone()
    alike[:, 2 * channels :] = alike[:, 2 * channels :, :1, :1]
    near_one(attend(alike, heads, cosine=True))
    assert magnitude(attend(apart, heads, cosine=True)) < 1


# ---- layers


@few()
@given(seeds, widths, st.sampled_from([0, 1, 3]), st.floats(0.01, 100.0))
def test_layers_keep_unit_magnitude_whatever_is_stored(seed, channels, kernel, scale):
    torch.manual_seed(seed % 2**31)
    layer = Conv(channels, 64, kernel)
    with torch.no_grad():
        layer.weight.mul_(scale)
    spatial = (SIDE, SIDE) if kernel else ()
    y = layer(normal(seed, 8 if kernel else 2048, channels, *spatial))
    near_one(inside(y) if kernel else y)


@few()
@given(seeds, st.integers(2, 1000))
def test_label_layers_have_unit_magnitude_over_the_classes(seed, classes):
    torch.manual_seed(seed % 2**31)
    layer = Conv(classes, 64, 0)
    near_one(layer(torch.eye(classes) * math.sqrt(classes)))


# ---- whole networks at the start and after 200 steps


@functools.cache
def trained(steps):
    """A network for digits after some steps of Adam at the learning rate of the presets."""
    torch.manual_seed(0)
    network = Precond(DIGITS_NETWORK, DIGITS).train()
    dataset, loss = load_dataset("digits"), LossConfig()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        network.force_weight_norm()
        drawn = torch.randint(len(dataset), (8,), generator=generator).numpy()
        pixels, labels = map(torch.from_numpy, dataset.read(drawn))
        images = (pixels / 127.5 - 1 - DIGITS.mean[0]) * DIGITS.scale[0]
        sigma, noise = draw_noise(tuple(images.shape), loss, generator)
        uncertainty_loss(network, images, labels, sigma, noise)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@pytest.mark.parametrize("steps", [0, 200])
def test_every_layer_keeps_unit_magnitude_then_and_later(steps):
    layers = {n: m for n, m in trained(steps).named_modules() if isinstance(m, Conv)}
    assert len(layers) > 30
    for name, layer in layers.items():
        fan_in = layer.weight.shape[1]
        x = normal(3, 8, fan_in, SIDE, SIDE) if layer.kernel else normal(3, 4096, fan_in)
        y = layer(x)
        assert magnitude(inside(y) if layer.kernel else y) == pytest.approx(1, abs=0.05), name


def test_embedding_has_unit_magnitude_at_the_start():
    rows = torch.eye(10)[torch.arange(1000) % 10]
    near_one(trained(0).net.embedding(0.3 * normal(2, 1000), rows))


@pytest.mark.parametrize(
    "name", ["enc.r8_block0", "enc.r4_down", "dec.r4_in1", "dec.r8_up", "dec.r8_block0"]
)
def test_blocks_without_attention_keep_unit_magnitude_at_the_start(name):
    block = trained(0).net.get_submodule(name)
    entry = (block.conv_skip or block.branch.conv0).weight.shape[1]
    skip = normal(4, 8, entry // 2, SIDE, SIDE) if block.takes_skip else None
    x = normal(5, 8, entry - (0 if skip is None else entry // 2), SIDE, SIDE)
    y = block(x, normal(6, 8, 64), skip)
    near_one(inside(inside(inside(y))))


def test_attention_with_its_sum_keeps_unit_magnitude_where_pixels_agree():
    attention = trained(0).net.get_submodule("enc.r4_block0.attention")
    x = normal(4, 256, attention.qkv.weight.shape[1], 1, 1).expand(-1, -1, 4, 4)
    near_one(attention(x.contiguous(memory_format=torch.channels_last)))
