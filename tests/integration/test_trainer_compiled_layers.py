"""Layers that torch's compiler has got wrong, or might, compiled for real; whole networks are slow tests."""

import pytest
import torch

from reference_trainer.config import NetworkConfig
from reference_trainer.layers import attend
from reference_trainer.networks import Embedding

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
CONFIG = NetworkConfig(
    img_resolution=4,
    img_channels=1,
    label_dim=10,
    model_channels=16,
    channel_mult=(1,),
    attn_resolutions=(),
)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_compiled_embedding_gives_the_values_of_the_plain_one():
    """torch.add(a, linear(b), alpha=t) loses its alpha in torch 2.13."""
    torch.manual_seed(0)
    embedding = Embedding(CONFIG)
    with torch.no_grad():
        given = torch.randn(8), torch.eye(10)[:8]
        assert relative(torch.compile(embedding)(*given), embedding(*given)) < 1e-5


def test_compiled_attention_gives_the_values_of_the_plain_one():
    torch.manual_seed(0)
    qkv = torch.randn(2, 48, 4, 4)
    plain = attend(qkv, 2, cosine=True)
    compiled = torch.compile(lambda x: attend(x, 2, cosine=True))(qkv)
    assert relative(compiled, plain) < 1e-5


def test_attention_of_few_pixels_gives_the_values_of_the_fused_kernel():
    torch.manual_seed(0)
    qkv = torch.randn(2, 48, 4, 4, requires_grad=True)
    n, channels, h, w = qkv.shape
    q, k, v = qkv.reshape(n, 3, 2, channels // 6, h * w).transpose(3, 4).unbind(1)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    fused = fused.transpose(2, 3).reshape(n, channels // 3, h, w)
    plain = attend(qkv, 2, cosine=False)
    assert relative(plain.detach(), fused.detach()) < 1e-6
    along = torch.randn_like(plain)
    mine, theirs = (torch.autograd.grad(y, qkv, along)[0] for y in (plain, fused))
    assert relative(mine, theirs) < 1e-5
