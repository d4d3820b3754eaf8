"""Network snapshots as EDM2 writes them: modules pickled as source text and state.

Made from the description of the format alone. A fake module takes the place of the tool's own, so that
Python's pickle writes its name; the source text would leave a file behind if anyone executed it.
"""

from __future__ import annotations

import pickle  # noqa: TID251  # writes the files that the importer reads
import sys
import types

import torch
from torch import nn

persistence = types.ModuleType("torch_utils.persistence")


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the importer called a function of the pickle")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
SOURCE = "open({canary!r}, 'w').write('executed')\nclass Net: pass\n"


class Persistent(nn.Module):
    """A module that is pickled as the text of its class and its state."""

    canary = "canary"

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE.format(canary=self.canary),
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,)


class Block(Persistent):
    """A layer with a gain, and a plain module of PyTorch inside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.plain = nn.Linear(2, 2)
        self.nothing = None


class Net(Persistent):
    """A small network with what theirs have: buffers, lists of blocks, tied and absent parameters."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"8x8": Block(), "4x4": Block()})
        self.register_buffer("freqs", torch.randn(4))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_parameter("bias", None)
        self.sigma_data = 0.5


class EasyDict(dict):
    """A dict subclass with attributes, which pickles as an object with items."""


EasyDict.__module__ = "dnnlib.util"


def write_snapshot(path, network, canary, wrapped=EasyDict):
    """Write a snapshot file; `wrapped` makes the table around the network."""
    names = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    names |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": types.ModuleType("dnnlib.util")}
    names["dnnlib.util"].EasyDict = EasyDict
    Persistent.canary = str(canary)
    sys.modules.update(names)
    try:
        table = wrapped({"encoder": None, "dataset_kwargs": {"path": "x"}, "ema": network})
        path.write_bytes(pickle.dumps(table))
    finally:
        for name in names:
            del sys.modules[name]


def network_of(seed, dtype=torch.float16):
    """A network whose weights depend on the seed, cast as the tool casts its snapshots."""
    torch.manual_seed(seed)
    return Net().to(dtype)
