"""A model and an optimizer that play a history: the training that every tracker is put on.

As a script it is a training like any other, with checkpoints of its own, and knows of no tracker:

    python -m tests.contract.playback HISTORY FOLDER [--stop-at N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .histories import HISTORIES


def to_tensor(spec, values):
    tensor = torch.from_numpy(np.array(values)).to(getattr(torch, spec.dtype))
    if spec.transposed:
        tensor = tensor.t().contiguous().t()
    return tensor


class Model(nn.Module):
    """Has the tensors of a history; its forward sets the buffers, as a training step does."""

    def __init__(self, history):
        super().__init__()
        self.history = history
        made = {}
        for spec in history.specs:
            owner = self
            *path, key = spec.name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if spec.tied_to is not None:
                owner.register_parameter(key, made[spec.tied_to])
                continue
            tensor = to_tensor(spec, history.value(spec, 0))
            if spec.kind == "buffer":
                owner.register_buffer(key, tensor)
            else:
                made[spec.name] = nn.Parameter(tensor, requires_grad=spec.kind == "parameter")
                owner.register_parameter(key, made[spec.name])

    def forward(self, step):
        self.set_buffers(step)
        return torch.zeros(())

    def set_buffers(self, step):
        buffers = dict(self.named_buffers())
        for spec in self.history.specs:
            if spec.kind == "buffer":
                buffers[spec.name].copy_(to_tensor(spec, self.history.value(spec, step)))


def set_parameter(parameter, value):
    """Copy a whole tensor's values, or this rank's share of them, into a parameter."""
    if isinstance(parameter, DTensor):
        share = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(share.to_local())
    else:
        parameter.copy_(value)


class Playback(torch.optim.Optimizer):
    """Its step puts the next weights of the history in place."""

    def __init__(self, model, history):
        self._names = {id(p): name for name, p in model.named_parameters()}
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 1.0})
        self._specs = {spec.name: spec for spec in history.specs}
        self._history = history

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
            spec = self._specs[self._names[id(parameter)]]
            value = self._history.value(spec, int(state["step"]))
            set_parameter(parameter, to_tensor(spec, value))


def give_gradients(model):
    """Gradients as a backward pass leaves them: nothing but training may touch them."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            gradient = torch.empty_like(parameter)
            with torch.no_grad():
                set_parameter(gradient, noise)
            parameter.grad = gradient.detach()


def _digest(tensors):
    found = hashlib.sha256()
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        if tensor.numel():
            bits = tensor.detach().contiguous().flatten().view(torch.uint8)
            found.update(bits.numpy().tobytes())
    return found.hexdigest()


def evidence(model):
    """Digests of all that a tracker might change by mistake."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return {
        "parameters": _digest(parameters),
        "buffers": _digest(model.named_buffers()),
        "gradients": _digest((n, p.grad) for n, p in parameters if p.grad is not None),
        "random": _digest([("state", torch.get_rng_state())]),
        "grad mode": torch.is_grad_enabled(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "training": [m.training for m in model.modules()],
    }


def run(forward, model, optimizer, first, last):
    """Steps first + 1 ... last; yields after each."""
    for step in range(first + 1, last + 1):
        forward(step)
        give_gradients(model)
        optimizer.step()
        yield step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("history", choices=sorted(HISTORIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-at", type=int, default=None)
    args = parser.parse_args()
    history = HISTORIES[args.history]
    model = Model(history)
    optimizer = Playback(model, history)
    path = args.folder / "checkpoint.pt"
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    last = len(history.elapsed) if args.stop_at is None else args.stop_at
    torch.manual_seed(5)
    for _ in run(model, model, optimizer, step, last):
        pass
    args.folder.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": last}
    torch.save(state, path)
    (args.folder / "evidence.json").write_text(json.dumps(evidence(model)))


if __name__ == "__main__":
    main()
