"""The compiled loss gives the losses and gradients of the plain one (torch.compile, real compiler)."""

import os

import pytest
import torch

from reference_trainer.config import DataConfig, LossConfig, NetworkConfig
from reference_trainer.losses import TrainingLoss, draw_noise
from reference_trainer.precond import Precond

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
TINY = NetworkConfig(
    img_resolution=8,
    img_channels=3,
    label_dim=10,
    model_channels=16,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(8,),
    channels_per_head=16,
    logvar_channels=16,
    clip_act=2.0,  # so low that it matters
)


def new_network():
    torch.manual_seed(0)
    network = Precond(TINY, DataConfig())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(
                torch.randn_like(parameter), alpha=0.3
            )  # gains and last layers start at 0
    return network.train()


def relative(a, b):
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache for the session, not the user's."""
    folder = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()


def test_compiled_loss_gives_the_gradients_of_the_plain_one():
    network = new_network()
    loss = TrainingLoss(network, LossConfig())
    images, labels = torch.randn(8, 3, 8, 8) * 0.5, torch.arange(8)
    sigma, noise = draw_noise(tuple(images.shape), LossConfig())
    results = []
    for call in (loss, torch.compile(loss)):
        network.zero_grad()
        values = call(images, labels, sigma, noise)
        values[0].sum().backward()
        results.append((values, {n: p.grad for n, p in network.named_parameters()}))
    (plain, plain_gradients), (compiled, compiled_gradients) = results
    for mine, theirs in zip(compiled, plain, strict=True):
        assert relative(mine, theirs) < 1e-5
    for name, gradient in plain_gradients.items():
        assert relative(compiled_gradients[name], gradient) < 1e-4, name
