"""The plain network of the benchmarks computes what the trainer's network computes."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from reference_trainer.config import DataConfig, LossConfig, NetworkConfig
from reference_trainer.losses import draw_noise, uncertainty_loss
from reference_trainer.precond import Precond

FILE = Path(__file__).parents[1] / "benchmarks" / "plain_network.py"
SPEC = importlib.util.spec_from_file_location("plain_network", FILE)
plain_network = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain_network)

CONFIG = NetworkConfig(
    img_resolution=8,
    img_channels=3,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=16,
    logvar_channels=16,
    clip_act=2.0,  # so low that it matters
)


def pair():
    torch.manual_seed(0)
    ours = Precond(CONFIG, DataConfig())
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.numel() == 1:  # gains, which are zero at the start
                parameter.fill_(0.7)
    return ours, plain_network.PlainNetwork(CONFIG).load_from(ours)


def relative(a, b):
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def test_plain_network_gives_the_outputs_of_the_trainers():
    ours, plain = (network.eval() for network in pair())
    x, sigma, labels = torch.randn(8, 3, 8, 8), torch.linspace(0.1, 5, 8), torch.arange(8)
    for mine, theirs in zip(
        ours(x, sigma, labels, True), plain(x, sigma, labels, True), strict=True
    ):
        assert relative(mine, theirs) < 1e-5


def test_plain_network_trains_like_the_trainers():
    ours, plain = (network.train() for network in pair())
    images, labels = torch.randn(8, 3, 8, 8) * 0.5, torch.arange(8)
    for network in (ours, plain):
        adam = torch.optim.Adam(network.parameters(), 0.01)
        torch.manual_seed(1)
        for _ in range(3):
            sigma, noise = draw_noise(tuple(images.shape), LossConfig())
            if network is ours:
                ours.force_weight_norm()
            adam.zero_grad()
            uncertainty_loss(network, images, labels, sigma, noise)[0].mean().backward()
            adam.step()
    for name, mine, theirs in plain_network.paired(plain, ours):
        assert relative(mine, theirs) < 1e-3, name


def test_plain_network_refuses_another_configuration():
    ours, _ = pair()
    other = plain_network.PlainNetwork(dataclasses.replace(CONFIG, attn_resolutions=()))
    with pytest.raises(ValueError, match="not paired"):
        other.load_from(ours)
