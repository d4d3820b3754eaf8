"""Files of the form in which EDM2's networks are published, made of networks of our own.

The inverse of what `reference_trainer.interchange` does, from the description of the form alone: tensors
of a block below a path with its resolution, queries, keys and values interleaved, angles in radians.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from reference_trainer.config import DataConfig, NetworkConfig
from reference_trainer.precond import Precond

from .edm2_pickles import Persistent, write_snapshot

SMALL = NetworkConfig(
    img_resolution=16,
    img_channels=4,
    label_dim=10,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(8,),
    channels_per_head=64,
    clip_act=256.0,
    logvar_channels=8,
)


def trained(config=SMALL, seed=0):
    """A network with gains, so that every tensor matters."""
    torch.manual_seed(seed)
    network = Precond(config, DataConfig())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.3, 0.9)
    return network.eval()


def publish(network, names=None):
    """The tensors of one of our networks under names of the published form."""
    heads = 64  # channels of a head, fixed there
    found = {}
    for name, tensor in network.state_dict().items():
        value = tensor.detach().clone()
        if name.endswith(("freqs", "phases")):
            value = value * (2 * math.pi)
        if name.endswith("qkv.weight"):
            channels = value.shape[1]
            count = max(1, channels // heads)
            rows = value.reshape(3, count, channels // count, channels, 1, 1)
            value = rows.permute(1, 2, 0, 3, 4, 5).reshape(value.shape)
        if name.endswith("gain"):
            value = value.reshape(())
        found[(names or rename)(name)] = value
    return found


def rename(name):
    """`net.enc.r8_block0.branch.conv0.weight` to `f.enc.8x8_block0.conv0.weight`."""
    name = re.sub(r"\.r(\d+)_", r".\1x\1_", name.replace("net.", "f.", 1))
    return name.replace(".branch.", ".").replace(".attention.", ".")


def rename_otherwise(name):
    """Other words for the parts, the input convolution among the blocks."""
    words = {
        "f.stem.": "core.down.16x16.",
        "f.": "core.",
        "emb_gain": "strength",
        "conv0": "a",
        "conv1": "b",
        "conv_skip": "shortcut",
        "qkv": "in_proj",
        "freqs": "w",
        "phases": "b",
    }
    name = rename(name)
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def write_published(path, tensors, canary="unused", dtype=torch.float16):
    """Write named tensors as the network of a snapshot file."""
    root = Persistent()
    for name, tensor in tensors.items():
        *path_of, leaf = name.split(".")
        module = root
        for part in path_of:
            if part not in module._modules:
                module.add_module(part, Persistent())
            module = module._modules[part]
        value = tensor.to(dtype)
        if "features" in name:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value))
    write_snapshot(path, root, canary)
