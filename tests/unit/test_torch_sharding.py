"""Layouts of sharded tensors, and models whose parameters are somewhere else."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.distributed.rank_group import _brief
from posthoc_ema.torch.distributed.ranks import _check_agreement, _share
from posthoc_ema.torch.distributed.sharding import (
    Layout,
    check_can_be_tracked,
    layout_of,
    local_part,
    rows_of,
    stacked,
    whole_from_part,
)


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    torch.distributed.destroy_process_group()


def distributed(mesh, shape, *placements):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(torch.randn(shape), mesh, placements)


def test_a_plain_tensor_is_its_own_part():
    tensor = torch.zeros(3, 2, requires_grad=True)
    assert layout_of(tensor) == Layout((3, 2), (0, 0), (3, 2))
    assert layout_of(tensor).is_first_copy
    assert local_part(tensor).data_ptr() == tensor.data_ptr()
    assert not local_part(tensor).requires_grad


def test_a_part_is_a_view_outside_autograd(mesh):
    from torch.distributed.tensor import Shard

    tensor = nn.Parameter(distributed(mesh, (3, 2), Shard(0), Shard(1)))
    part = local_part(tensor)
    assert type(part) is torch.Tensor
    assert not part.requires_grad
    part.fill_(7)
    assert tensor.full_tensor().tolist() == [[7.0, 7.0]] * 3


def test_stacks_are_cut_one_dimension_further(mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    layout = layout_of(distributed(mesh, (3, 2), Replicate(), Shard(1)))
    tall = stacked(layout, 5)
    assert (tall.shape, tall.local_shape, tall.offsets) == ((5, 3, 2), (5, 3, 2), (0, 0, 0))
    assert tall.placements == (Replicate(), Shard(2))
    strided = Layout((4,), (0,), (4,), mesh, (_StridedShard(0, split_factor=2), Shard(0)))
    assert stacked(strided, 5).placements == (_StridedShard(1, split_factor=2), Shard(1))


@pytest.mark.parametrize("shape", [(3, 2), (), (0, 2)])
def test_a_whole_is_made_of_its_part_without_copying(mesh, shape):
    from torch.distributed.tensor import Replicate, Shard

    cut = Shard(0) if shape else Replicate()
    layout = layout_of(distributed(mesh, shape, cut, Replicate()))
    memory = torch.randn(layout.size + 1)
    part = memory[1:].reshape(shape)
    whole = whole_from_part(part, layout)
    assert tuple(whole.shape) == shape
    part.fill_(3.0)
    assert bool((whole.full_tensor() == 3.0).all())


def test_sharded_tensors_with_an_offset_can_be_saved(mesh, tmp_path):
    from torch.distributed.tensor import Replicate, Shard

    layout = layout_of(distributed(mesh, (3, 2), Shard(0), Replicate()))
    whole = whole_from_part(torch.arange(7.0)[1:].reshape(3, 2), layout)
    torch.save({"w": whole}, tmp_path / "w.pt")
    found = torch.load(tmp_path / "w.pt", weights_only=True)["w"]
    assert found.full_tensor().tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def test_rows_are_spread_over_a_mesh(mesh):
    layout = rows_of((3, 2), mesh["a"])
    assert (layout.offsets, layout.local_shape) == ((0, 0), (3, 2))
    assert rows_of((), mesh["a"]).local_shape == ()


def test_a_cut_that_no_placement_means_is_refused(mesh, tmp_path):
    from torch.distributed.tensor import DTensor, Shard

    wrong = DTensor.from_local(
        torch.zeros(2, 2), mesh["a"], [Shard(0)], shape=torch.Size((3, 2)), stride=(2, 1)
    )
    with pytest.raises(TrackingError, match=r"'w' is cut as no placement says.*distribute_tensor"):
        layout_of(wrong, "w")


def test_a_sharded_model_of_one_rank_is_tracked(mesh, tmp_path):
    from torch.distributed.tensor import Shard

    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(distributed(mesh["a"], (3, 2), Shard(0)))
    with Tracker(model, tmp_path / "s", every=1, on_error="raise") as tracker:
        tracker.step()
        assert tracker.session
        average = tracker.averages(0.04)["weight"]
        assert torch.equal(average.full_tensor(), model.weight.full_tensor())
        assert tracker.store.times == [1]


# ---- parameters that are somewhere else


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1, which cannot be made without an accelerator."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Linear(2, 2)


def test_flattened_models_are_refused(tmp_path):
    with pytest.raises(TrackingError, match=r"FSDP1.*fully_shard.*--from-checkpoints"):
        Tracker(nn.Sequential(FullyShardedDataParallel()), tmp_path, every=1)
    zero = nn.Linear(2, 2)
    zero.weight.ds_id = 0
    with pytest.raises(TrackingError, match=r"ZeRO stage 3.*zero_to_fp32"):
        Tracker(zero, tmp_path, every=1)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_deepspeed_is_refused():
    model = nn.Linear(2, 2)
    foreign = types.new_class("DeepSpeedZeroOptimizer", (torch.optim.SGD,))
    foreign.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
    with pytest.raises(TrackingError, match=r"DeepSpeedZeroOptimizer is DeepSpeed's.*engine.step"):
        check_can_be_tracked(model, foreign(model.parameters(), lr=0.1))


def test_track_refuses_an_optimizer_of_deepspeed(tmp_path):
    model = nn.Linear(2, 2)
    foreign = types.new_class("BF16_Optimizer", (torch.optim.SGD,))
    foreign.__module__ = "deepspeed.runtime.bf16_optimizer"
    with pytest.raises(TrackingError, match="BF16_Optimizer is DeepSpeed's"):
        track(foreign(model.parameters(), lr=0.1), model, tmp_path, every=1)
    plain = types.new_class("FusedAdam", (torch.optim.SGD,))
    plain.__module__ = "deepspeed.ops.adam.fused_adam"
    track(plain(model.parameters(), lr=0.1), model, tmp_path, every=1).close()


# ---- sharing the work


def test_of_equal_parts_the_first_rank_writes_its_own():
    shapes = {"w": [4], "b": [2], "e": [0]}
    boxes = [
        {"w": [[0], [2]], "b": [[0], [2]], "e": [[0], [0]]},
        {"w": [[2], [2]], "b": [[0], [2]], "e": [[0], [0]]},
        {"w": [[0], [2]], "b": [[0], [2]], "e": [[0], [0]]},
        {"w": [[4], [0]], "b": [[0], [2]], "e": [[0], [0]]},
    ]
    assert [set(_share(i, boxes, shapes)) for i in range(4)] == [
        {"w", "b", "e"},
        {"w"},
        set(),
        set(),
    ]


def test_parts_that_do_not_make_up_the_whole_are_refused():
    with pytest.raises(TrackingError, match=r"'w' do not make up its shape \(4,\)"):
        _share(0, [{"w": [[0], [2]]}], {"w": [4]})


def test_a_rank_with_a_problem_is_named():
    rows = [{"problem": None, "agreed": {}}, {"problem": "no room", "agreed": {}}]
    with pytest.raises(TrackingError, match=r"^rank 7: no room$"):
        _check_agreement([3, 7], rows)
    rows = [{"problem": "no room", "agreed": {}}, {"problem": None, "agreed": {}}]
    with pytest.raises(TrackingError, match=r"^no room$"):
        _check_agreement([3, 7], rows)


def test_errors_of_gloo_are_cut_to_what_they_say():
    raw = (
        "[/__w/third_party/gloo/tcp/pair.cc:553] Connection closed by peer [::1]:6. This is typical"
    )
    assert _brief(RuntimeError(raw)) == "Connection closed by peer [::1]:6"
    assert _brief(RuntimeError()) == "RuntimeError"
