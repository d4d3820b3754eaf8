"""torch.compile changes nothing: outputs and gradients of the networks of all configs."""

from __future__ import annotations

import pytest
import torch

from reference_trainer.config import DataConfig, NetworkConfig, network_of_config
from reference_trainer.precond import Precond

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=2,
    label_dim=4,
    model_channels=16,
    channel_mult=(1,),  # minutes of compilation grow with the number of blocks
    num_blocks=1,
    attn_resolutions=(),
    clip_act=None,
)


def relative(found, want):
    return float((found - want).norm() / want.norm().clamp(min=1e-12))


@pytest.mark.parametrize("letter", ["A", "G"])
def test_compiled_network_agrees_with_the_eager_one(letter):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = Precond(network_of_config(SMALL, letter), DataConfig())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x, labels = torch.randn(4, 2, 8, 8), torch.eye(4)
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])
    results = []
    for function in (network, torch.compile(network)):
        network.zero_grad()
        output = function(x, sigma, labels)
        output.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads))
    (eager, eager_grads), (compiled, compiled_grads) = results
    assert relative(compiled, eager) < 1e-5
    assert set(eager_grads) == set(compiled_grads)
    for name, gradient in eager_grads.items():
        assert relative(compiled_grads[name], gradient) < 1e-3, name


def test_compiled_folded_network_agrees_with_the_network():
    torch.manual_seed(0)
    network = Precond(SMALL, DataConfig()).eval()
    with torch.no_grad():
        network.net.out_gain.fill_(1.0)
        x, labels, sigma = torch.randn(2, 2, 8, 8), torch.eye(4)[:2], torch.tensor([0.3, 3.0])
        want = network(x, sigma, labels)
        assert relative(torch.compile(network.folded())(x, sigma, labels), want) < 1e-5
