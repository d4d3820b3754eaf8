from __future__ import annotations

import logging
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_ema import TrackingError, plan_synthesis, synthesize, synthesize_to_files
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.parameters import TrackedModel, named_tensors, tensor_table, to_numpy

from .torch_models import Network, Scalar, train


@pytest.fixture
def process_group():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def names(module):
    return [name for name, _ in named_tensors(module)]


def test_names_are_those_of_the_state_dict():
    """Buffers that are not persistent are not in it; an attribute called `module` keeps its name."""
    model = Network()
    assert names(model) == list(model.state_dict())
    assert "module.weight" in names(model)
    assert "scratch" not in names(model)


def test_tied_names_point_to_the_first_one():
    table = tensor_table(Network())
    assert table.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in table.entries
    averaged = [e.name for e in table.entries.values() if e.averaged]
    assert averaged == [
        "gain",
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "module.weight",
        "module.bias",
    ]


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.module = torch.compile(model.module, backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "compiled twice": lambda model: compiled(compiled_inside(model)),
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
    "data parallel compiled": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_prefixes_are_taken_out(name):
    """timm and torch persist `_orig_mod.` and `module._orig_mod.`: such files load into no bare model."""
    bare, wrapped = names(Network()), WRAPPERS[name](Network())
    assert sorted(names(wrapped)) == sorted(bare)
    assert any(a != b for a, b in zip(wrapped.state_dict(), Network().state_dict(), strict=True))


def test_distributed_prefix_is_taken_out(process_group):
    model = nn.parallel.DistributedDataParallel(Network())
    assert names(model) == names(Network())
    inside = nn.ModuleDict({"a": nn.parallel.DistributedDataParallel(nn.Linear(1, 1))})
    assert names(inside) == ["a.weight", "a.bias"]


def test_module_that_is_called_like_a_wrapper_keeps_its_name():
    model = nn.ModuleDict(
        {"_orig_mod": nn.Linear(1, 1), "module": nn.ModuleDict({"module": Scalar()})}
    )
    assert names(model) == list(model.state_dict())


@pytest.mark.parametrize("wrap", ["plain", "compiled", "data parallel"])
def test_wrapped_model_is_tracked_and_loads_back_strictly(tmp_path, wrap):
    """pytorch-posthoc-ema updates a compiled model's shadow with nothing: it stays at its first value."""
    torch.manual_seed(0)
    model = WRAPPERS.get(wrap, lambda m: m)(Network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, tmp_path / "s", every=2, dtype="float32", on_error="raise") as tracker:
        for step in range(4):
            train(model, optimizer, 1, start=step)
            tracker.step()
    plan = plan_synthesis(tracker.store, [0.07, 0])
    paths = [tmp_path / "average", tmp_path / "raw"]
    synthesize_to_files(tracker.store, plan, paths)
    fresh = Network()
    fresh.load_state_dict(load_file(paths[1]), strict=True)
    live_values = dict(named_tensors(model))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, live_values[name])
    fresh.load_state_dict(load_file(paths[0]), strict=True)
    assert not torch.equal(fresh.embed.weight, live_values["embed.weight"])
    assert fresh.head.weight is fresh.embed.weight
    assert fresh(torch.zeros(2, dtype=torch.long)).isfinite().all()


def test_synthesized_arrays_load_strictly(tmp_path):
    model = Network()
    with Tracker(model, tmp_path, every=1, on_error="raise") as tracker:
        tracker.step()
    tensors = {k: torch.from_numpy(v) for k, v in synthesize(tmp_path, 0.1).items()}
    Network().load_state_dict(tensors, strict=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8),
        *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_copied_tensors_of_any_dtype_come_back_bit_by_bit(tmp_path, dtype):
    model = Scalar(1.0)
    values = (torch.arange(6).reshape(2, 3) - 2).to(dtype).t()  # not contiguous
    model.register_buffer("extra", values)
    with Tracker(model, tmp_path / "s", every=1, on_error="raise") as tracker:
        tracker.step()
    path = tmp_path / "out"
    synthesize_to_files(tracker.store, plan_synthesis(tracker.store, [0.1]), [path])
    loaded = load_file(path)["extra"]
    assert (loaded.dtype, loaded.shape) == (dtype, values.shape)
    assert torch.equal(loaded.contiguous().view(torch.uint8), values.contiguous().view(torch.uint8))


def test_state_that_is_no_tensor_is_said_and_left_out(caplog):
    class Extra(Scalar):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with caplog.at_level(logging.WARNING, logger="posthoc_ema"):
        assert names(Extra()) == ["w"]
    assert "'_extra_state' of the state_dict is no tensor (dict)" in caplog.text


def test_tensors_that_cannot_be_tracked_are_refused():
    with pytest.raises(TrackingError, match=r"'weight' is on the meta device.*materialise"):
        tensor_table(nn.Linear(1, 1, device="meta"))
    odd = Scalar()
    odd.register_buffer("q", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(TrackingError, match=r"'q' has dtype torch.complex128"):
        tensor_table(odd)
    wave = nn.Module()
    wave.w = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(TrackingError, match="'w' has dtype complex64; averages are defined for"):
        tensor_table(wave)
    named = nn.Module()
    named.register_parameter("__metadata__", nn.Parameter(torch.zeros(1)))
    with pytest.raises(TrackingError, match="cannot be called '__metadata__'"):
        tensor_table(named)


def test_partial_sums_are_refused(process_group, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    model = Scalar()
    mesh = init_device_mesh("cpu", (1,))
    model.w = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Partial()]))
    with pytest.raises(TrackingError, match=r"'w' is a DTensor of partial sums .* Redistribute it"):
        Tracker(model, tmp_path, every=1)


def test_parametrized_weights_are_tracked_by_their_factors(tmp_path):
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with Tracker(model, tmp_path, every=1, on_error="raise") as tracker:
        tracker.step()
    assert list(synthesize(tmp_path, 0.1)) == list(model.state_dict())


def test_live_tensors_are_the_models_own():
    model = Network()
    found = TrackedModel(model).live()
    assert found["embed.weight"] is model.embed.weight
    assert "head.weight" not in found


def test_bits_of_a_tensor_keep_shape_and_values():
    value = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    assert to_numpy(value).dtype == np.uint16
    assert to_numpy(value).tolist() == [[0x3FC0, 0xC000]]
    assert to_numpy(torch.tensor(3)).shape == ()
    assert to_numpy(torch.zeros(0, 3, requires_grad=True)).shape == (0, 3)
