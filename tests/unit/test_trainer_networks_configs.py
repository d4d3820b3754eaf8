"""Configs A to G and all sizes of EDM2: parameter counts, cost, start of training (arXiv 2312.02696)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reference_trainer.config import CONFIGS, DataConfig, NetworkConfig, network_of_config
from reference_trainer.costs import gflops_per_evaluation, num_parameters
from reference_trainer.precond import Precond
from reference_trainer.presets import preset, with_config
from reference_trainer.topology import plan_unet

TABLE_1 = {  # config: millions of parameters (the paper has one decimal), Gflops
    "A": (295.90, 110.4),
    "B": (291.76, 100.4),
    "C": (277.82, 100.3),
    "D": (277.82, 101.2),
    "E": (277.82, 101.2),
    "F": (280.21, 102.1),
    "G": (280.21, 102.2),
}
SIZES = {  # preset: millions of parameters with and without classes, Gflops (tables 2, 3 and 6)
    "edm2-img512-xxs": (31.31, 31.05, None),
    "edm2-img512-xs": (124.71, 124.20, 45.5),
    "edm2-img512-s": (280.21, 279.44, 102.2),
    "edm2-img512-m": (497.81, 496.78, 180.8),
    "edm2-img512-l": (777.50, 776.22, 282.2),
    "edm2-img512-xl": (1119.28, 1117.75, 405.9),
    "edm2-img512-xxl": (1523.16, 1521.37, 552.1),
    "edm2-img64-xs": (124.7, None, 45.0),
    "edm2-img64-s": (280.2, None, 101.9),
    "edm2-img64-m": (497.8, None, 180.8),
    "edm2-img64-l": (777.5, None, 282.1),
    "edm2-img64-xl": (1119.3, None, 405.9),
}

SMALL = NetworkConfig(
    img_resolution=16,
    img_channels=2,
    label_dim=10,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(8,),
)


def new_network(letter, seed=0, **changes):
    torch.manual_seed(seed)
    return Precond(network_of_config(dataclasses.replace(SMALL, **changes), letter), DataConfig())


def inputs(network, count=4, seed=1):
    """Noisy images, noise levels and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, network.img_channels, *2 * [network.img_resolution])
    sigma = torch.logspace(-2, 1.5, count)
    x = torch.randn(shape, generator=generator)
    labels = torch.arange(count) % network.label_dim if network.label_dim else None
    return x * (0.25 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma, labels


# ---- the paper's tables


def millions(network, digits=2):
    """Parameters as the tables print them."""
    return round(num_parameters(network) / 1e6, digits)


@pytest.mark.parametrize("letter", TABLE_1)
def test_configs_have_the_parameters_and_the_cost_of_table_1(letter):
    network = with_config(preset("edm2-img512-s"), letter).network
    parameters, gflops = TABLE_1[letter]
    assert millions(network) == parameters
    assert gflops_per_evaluation(network) == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_parameters_and_the_cost_of_table_6(name):
    with_classes, without, gflops = SIZES[name]
    network = preset(name).network
    assert millions(network, 2 if "img512" in name else 1) == with_classes
    if without is not None:
        assert millions(preset(f"{name}-uncond").network) == without
    if gflops is not None:
        assert gflops_per_evaluation(network) == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize(("letter", "blocks"), [("A", 22), ("B", 15), ("G", 15)])
def test_configs_attend_in_as_many_blocks_as_in_table_1(letter, blocks):
    plan = plan_unet(with_config(preset("edm2-img512-s"), letter).network)
    assert sum(block.attention for block in (*plan.encoder, *plan.decoder)) == blocks


@pytest.mark.parametrize("letter", CONFIGS)
def test_configs_without_classes_lack_the_class_embedding_alone(letter):
    network = with_config(preset("edm2-img512-s"), letter).network
    without = dataclasses.replace(network, label_dim=0)
    assert num_parameters(network) - num_parameters(without) == 1000 * 4 * 192


# ---- the start of training


@pytest.mark.parametrize("letter", CONFIGS)
def test_configs_start_at_c_skip_x_where_the_paper_has_zeros(letter):
    network = new_network(letter).eval()
    x, sigma, labels = inputs(network)
    start = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1) * x
    difference = (network(x, sigma, labels) - start).detach().square().mean().sqrt()
    if letter in "ABG":
        torch.testing.assert_close(network(x, sigma, labels), start)
    else:
        assert difference > 0.05
    if letter == "G":  # exactly, not only to rounding
        f = network.net(x, sigma.log() / 4, torch.eye(10)[labels])
        assert not f.any()


@pytest.mark.parametrize("letter", "ABCD")
def test_configs_without_forced_weights_keep_theirs(letter):
    network = new_network(letter)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.force_weight_norm()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("letter", "EFG")
def test_configs_with_forced_weights_reset_them_to_root_fan_in(letter):
    network = new_network(letter)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.force_weight_norm()
    written = {k for k, v in network.state_dict().items() if not torch.equal(before[k], v)}
    assert written == {k for k in before if k.endswith("weight")}
    for name in written:
        rows = network.state_dict()[name].flatten(1)
        torch.testing.assert_close(
            rows.norm(dim=1), torch.full((len(rows),), rows.shape[1] ** 0.5), rtol=2e-4, atol=0
        )


@pytest.mark.parametrize("letter", CONFIGS)
def test_configs_are_the_same_function_before_and_after_weights_are_forced(letter):
    network = shaken(new_network(letter)).eval()
    x, sigma, labels = inputs(network)
    before = network(x, sigma, labels)
    network.force_weight_norm()
    torch.testing.assert_close(network(x, sigma, labels), before, rtol=1e-3, atol=1e-3)  # epsilon


@pytest.mark.parametrize("letter", CONFIGS)
def test_configs_forward_in_training_changes_no_weight(letter):
    network = shaken(new_network(letter)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x, sigma, labels = inputs(network)
    network(x, sigma, labels).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    unused = [n for n, p in network.named_parameters() if p.grad is None]
    assert all(name.startswith("logvar") for name in unused)


def shaken(network, amount=0.1):
    """A network as training leaves it: no zeros, norms of the weights that differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = max(float(parameter.square().mean().sqrt()), 0.1)
            parameter.add_(noise, alpha=0.5 if name.endswith("gain") else scale * amount)
    return network


# ---- ways to compute the same


@pytest.mark.parametrize("letter", CONFIGS)
def test_configs_folded_give_what_they_give_unfolded(letter):
    network = shaken(new_network(letter)).eval()
    x, sigma, labels = inputs(network)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    folded = network.folded()
    want = network(x, sigma, labels)
    assert relative(folded(x, sigma, labels), want) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("letter", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.025), ("float16", 0.0035)])
def test_configs_in_low_precision_stay_near_float32(letter, dtype, tolerance):
    network = shaken(new_network(letter)).eval()
    x, sigma, labels = inputs(network)
    config = dataclasses.replace(network_of_config(SMALL, letter), dtype=dtype)
    low = Precond(config, DataConfig()).eval()
    low.load_state_dict(network.state_dict())
    want = inner(network, x, sigma, labels)
    for other in (low, network.folded(getattr(torch, dtype)), low.folded()):
        assert other(x, sigma, labels).dtype == torch.float32
        assert 0 < relative(inner(other, x, sigma, labels), want) < tolerance


@pytest.mark.parametrize("letter", "AG")
def test_configs_do_not_depend_on_the_memory_format_of_their_input(letter):
    network = shaken(new_network(letter)).eval()
    x, sigma, labels = inputs(network)
    other = x.to(memory_format=torch.channels_last)
    assert x.stride() != other.stride()
    assert torch.equal(network(x, sigma, labels), network(other, sigma, labels))


def inner(network, x, sigma, labels):
    """F alone: in D, rounding hides behind c_skip x."""
    c_in = 1 / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    f = network.net((c_in * x).to(network.dtype), sigma.log() / 4, torch.eye(10)[labels])
    return f.to(torch.float32)


def relative(found, want):
    """Root mean square of the difference as a share of that of what is wanted."""
    found, want = found.detach(), want.detach()
    return float((found - want).square().mean().sqrt() / want.square().mean().sqrt())
