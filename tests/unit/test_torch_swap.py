"""Averages in a module for a while, and everything back afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema.errors import ConfigError, SnapshotNotFoundError, TrackingError
from posthoc_ema.torch import Tracker, recalibrate_batchnorm, track
from posthoc_ema.torch.swap import is_swapped, swap_in

from .torch_models import Network, train


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def flags_of(model):
    return [module.training for module in model.modules()]


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def constants(model, value=0.5):
    return {name: torch.full_like(p, value) for name, p in model.named_parameters()}


def fail(model, error):
    assert model.gain.item() == 0.5
    raise error


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Network()
    model.fixed.eval()  # a frozen part that stays in evaluation mode while the rest trains
    return model


@pytest.fixture
def tracked(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": 4, "sigma_rels": (0.05, 0.1), "dtype": "float32", "on_error": "raise"}
    with track(optimizer, model, tmp_path / "snapshots", **options) as tracker:
        train(model, optimizer, 10)
        yield tracker, model, optimizer


# ---- what is inside, what comes back


def test_swap_puts_values_in_and_everything_back(model):
    before, flags = state_of(model), flags_of(model)
    with swap_in(model, constants(model)) as inside:
        assert inside is model
        assert model.gain.item() == 0.5
        assert torch.equal(model.head.weight, torch.full((6, 4), 0.5))
        assert not any(flags_of(model))
        model(torch.arange(6))
        assert model.count.item() == before["count"] + 1
        model.scratch += 1
    assert same(state_of(model), before)
    assert torch.equal(model.scratch, torch.zeros(3))
    assert flags_of(model) == flags
    assert not is_swapped(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_swap_restores_when_evaluation_fails(model, error):
    before, flags = state_of(model), flags_of(model)
    with pytest.raises(error), swap_in(model, constants(model)):
        fail(model.train(), error)
    assert same(state_of(model), before)
    assert flags_of(model) == flags
    assert not is_swapped(model)


def test_swap_restores_everything_when_restoring_is_interrupted(model, monkeypatch):
    """A second Ctrl-C, in the middle of putting the weights back."""
    before, copy = state_of(model), torch.Tensor.copy_
    copies = []

    def interrupted(self, *args):
        copies.append(self)
        if len(copies) == 3:
            raise KeyboardInterrupt
        return copy(self, *args)

    with pytest.raises(KeyboardInterrupt), swap_in(model, constants(model)):
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    assert len(copies) > 5
    assert same(state_of(model), before)
    assert not is_swapped(model)


def test_swap_keeps_the_storage_that_others_hold(model):
    held = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    with swap_in(model, constants(model)):
        assert all(held[n] == (p, p.data_ptr()) for n, p in model.named_parameters())
    assert all(held[n] == (p, p.data_ptr()) for n, p in model.named_parameters())


def test_swap_leaves_gradients_and_random_numbers_alone(model):
    model(torch.arange(6)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    with swap_in(model, constants(model)):
        pass
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad for p in model.module.parameters())


def test_swap_takes_arrays_and_casts_to_the_model(model):
    model.bfloat16()
    before = state_of(model)
    with swap_in(model, {"gain": np.float32(1.00390625).reshape(())}):
        assert model.gain.dtype == torch.bfloat16
        assert model.gain.item() == 1.0  # rounded to nearest, ties to even
    assert same(state_of(model), before)


@pytest.mark.parametrize(("train_flag", "expected"), [(True, [True]), (False, [False])])
def test_swap_sets_the_train_flag(model, train_flag, expected):
    with swap_in(model, constants(model), train=train_flag):
        assert sorted(set(flags_of(model))) == expected


def test_swap_can_leave_the_train_flags_alone(model):
    flags = flags_of(model)
    with swap_in(model, constants(model), train=None):
        assert flags_of(model) == flags


def test_swap_restores_what_evaluation_casts_or_replaces(model):
    """`model.half()` and `load_state_dict(assign=True)` inside cost no bits and break no ties."""
    before, gain = state_of(model), model.gain
    with swap_in(model, constants(model)):
        model.half()
        model.load_state_dict(model.state_dict(), assign=True)
        model.register_buffer("mask", torch.tensor([False, False]))
    assert model.gain is gain
    assert model.gain.dtype == torch.float32
    assert model.head.weight is model.embed.weight
    assert same(state_of(model), before)


def test_swap_works_under_inference_mode(model):
    before = state_of(model)
    with torch.inference_mode(), swap_in(model, constants(model)):
        model(torch.arange(6))
    assert same(state_of(model), before)
    model(torch.arange(6)).sum().backward()  # no inference tensor was left behind


def test_swap_inside_autocast_is_seen_by_the_next_forward():
    """Autocast keeps its casts of the weights for as long as its context is open."""
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        with swap_in(model, zeros):
            assert torch.equal(model(x), torch.zeros_like(before))
        assert torch.equal(model(x), before)


def test_swap_sees_through_compiled_and_parallel_modules(model):
    before = state_of(model)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model)):
        flags = flags_of(wrapped)
        with swap_in(wrapped, constants(model)):
            assert wrapped(torch.arange(6)).shape == (6, 6)
            assert model.gain.item() == 0.5
            assert not model.training
        assert same(state_of(model), before)
        assert flags_of(wrapped) == flags


# ---- what is refused


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gian": torch.ones(())}, "'gian' is no tensor of this Network"),
        ({"gain": torch.ones(2)}, r"'gain' has shape \(\) in this model and \(2,\)"),
    ],
)
def test_swap_refuses_what_does_not_fit(model, tensors, message):
    before = state_of(model)
    with pytest.raises(TrackingError, match=message), swap_in(model, tensors):
        pytest.fail("entered")
    assert same(state_of(model), before)
    assert not is_swapped(model)


def test_swaps_do_not_nest(model):
    with swap_in(model, constants(model)):
        with (
            pytest.raises(TrackingError, match="swapped already"),
            swap_in(nn.Sequential(model), constants(nn.Sequential(model))),
        ):
            pytest.fail("entered")
        assert model.gain.item() == 0.5
    assert not is_swapped(model)


def test_two_models_can_be_swapped_at_once(model):
    other = Network()
    with swap_in(model, constants(model)), swap_in(other, constants(other)):
        assert is_swapped(model)
        assert is_swapped(other)


def test_optimizer_step_inside_a_swap_is_refused_before_it_acts(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = nn.Linear(1, 1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    before = state_of(model)
    with swap_in(model, constants(model)):
        model(torch.arange(6)).sum().backward()
        with pytest.raises(TrackingError, match=r"SGD.step\(\) inside `swapped`"):
            optimizer.step()
        assert model.gain.item() == 0.5
        other(torch.ones(1)).backward()
        elsewhere.step()
    assert same(state_of(model), before)
    optimizer.step()  # and is allowed again
    assert not same(state_of(model), before)


# ---- averages of a tracker


def test_tracked_length_is_the_average_in_memory(tracked):
    tracker, model, _ = tracked
    before = state_of(model)
    with tracker.swapped(sigma_rel=0.1):
        for name, average in tracker.averages(0.1).items():
            assert torch.equal(model.get_parameter(name), average)
        assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert same(state_of(model), before)
    assert tracker.store.times == [4, 8]


def test_other_lengths_come_from_the_store(tracked):
    from posthoc_ema import synthesize

    tracker, model, _ = tracked
    before = state_of(model)
    tracker.flush()
    expected = synthesize(tracker.folder, sigma_rel=0.07)
    with tracker.swapped(sigma_rel=0.07):
        for name, tensor in model.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name])
        assert model.count.item() == 8
    assert same(state_of(model), before)
    assert tracker.store.times == [4, 8]


def test_a_snapshot_of_now_is_taken_if_asked_for(tracked):
    tracker, model, _ = tracked
    with tracker.swapped(sigma_rel=0.07, snapshot=True):
        assert model.count.item() == 10
    assert tracker.store.times == [4, 8, 10]


def test_an_earlier_time_of_a_tracked_length_is_read_back(tracked):
    tracker, model, _ = tracked
    with tracker.swapped(sigma_rel=0.1, at=4):
        assert model.count.item() == 4
    with pytest.raises(SnapshotNotFoundError), tracker.swapped(sigma_rel=0.1, at=5):
        pytest.fail("entered")


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"average_dtype": "bfloat16"}], ids=str)
def test_an_average_can_be_evaluated_after_the_tracker_was_closed(model, tmp_path, options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = tmp_path / "snapshots"
    with track(optimizer, model, folder, every=4, sigma_rels=(0.05, 0.1), **options) as tracker:
        train(model, optimizer, 8)
        average = {name: a.clone() for name, a in tracker.averages(0.1).items()}
    for sigma_rel in (0.1, 0.07):
        before = state_of(model)
        with tracker.swapped(sigma_rel=sigma_rel):
            for name in average:
                assert torch.equal(model.get_parameter(name), average[name]) == (sigma_rel == 0.1)
        assert same(state_of(model), before)


def test_another_instance_can_take_the_average(tracked):
    tracker, model, optimizer = tracked
    twin = Network()
    with tracker.swapped(twin, sigma_rel=0.1):
        assert torch.equal(twin.gain, tracker.averages(0.1)["gain"])
        train(model, optimizer, 1, start=10)  # the tracked one trains on
    assert tracker.time == 11


def test_tracker_counts_no_step_and_stores_nothing_while_swapped(tracked):
    tracker, model, optimizer = tracked
    averages = {name: a.clone() for name, a in tracker.averages(0.1).items()}
    with tracker.swapped(sigma_rel=0.1):
        for refused in (tracker.step, tracker.snapshot, tracker.state_dict):
            with pytest.raises(TrackingError, match="swapped"):
                refused()
        with pytest.raises(TrackingError, match="swapped"):
            train(model, optimizer, 1)
    assert (tracker.time, tracker.stopped) == (10, False)
    assert same(tracker.averages(0.1), averages)
    train(model, optimizer, 1, start=10)
    assert tracker.time == 11


def test_nothing_is_averaged_before_the_first_step(model, tmp_path):
    with (
        Tracker(model, tmp_path / "snapshots", sigma_rels=(0.1,), every=1) as tracker,
        pytest.raises(TrackingError, match="from the first step on"),
        tracker.swapped(sigma_rel=0.1),
    ):
        pytest.fail("entered")


def test_training_is_the_same_with_and_without_swaps(tmp_path):
    """The whole trajectory, BatchNorm statistics and momentum included, is bit-equal."""

    def run(evaluate):
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        folder = tmp_path / str(evaluate)
        with track(optimizer, model, folder, every=None, sigma_rels=(0.1,)) as tracker:
            for step in range(8):
                train(model, optimizer, 1, start=step)
                if evaluate:
                    with tracker.swapped(sigma_rel=0.1):
                        recalibrate_batchnorm(model, [torch.arange(6)] * 2)
                        model(torch.arange(6))
            return state_of(model) | tracker.averages(0.1)

    assert same(run(True), run(False))


# ---- BatchNorm


def statistics(model, batches):
    """Mean and unbiased variance that BatchNorm of `model` should hold: means over the batches."""
    inputs = [model.embed(batch) for batch in batches]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    return mean, torch.stack([x.var(0) for x in inputs]).mean(0)


def test_recalibration_fits_the_weights_that_are_in_the_model(tracked):
    tracker, model, _ = tracked
    before, flags = state_of(model), flags_of(model)
    batches = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5])]
    with tracker.swapped(sigma_rel=0.1):
        recalibrate_batchnorm(model, iter(batches))
        mean, variance = statistics(model, batches)
        torch.testing.assert_close(model.norm.running_mean, mean.detach())
        torch.testing.assert_close(model.norm.running_var, variance.detach())
        assert not any(flags_of(model))
        assert model.norm.momentum == 0.1
    assert same(state_of(model), before)
    assert flags_of(model) == flags


def test_recalibration_takes_batches_with_targets(model):
    batch = torch.tensor([0, 1, 2, 3])
    recalibrate_batchnorm(model, [(batch, "labels")], device="cpu")
    torch.testing.assert_close(model.norm.running_mean, statistics(model, [batch])[0].detach())


def test_recalibration_without_batches_says_so_and_changes_nothing(model):
    before, flags = state_of(model), flags_of(model)
    with pytest.raises(ConfigError, match="at least one batch"):
        recalibrate_batchnorm(model, [])
    assert same(state_of(model), before)
    assert (flags_of(model), model.norm.momentum) == (flags, 0.1)


def test_recalibration_that_fails_changes_nothing(model):
    before, flags = state_of(model), flags_of(model)
    with pytest.raises(IndexError):
        recalibrate_batchnorm(model, [torch.arange(6), torch.tensor([99])])
    assert same(state_of(model), before)
    assert (flags_of(model), model.norm.momentum) == (flags, 0.1)


def test_recalibration_of_a_model_without_batchnorm_does_nothing():
    model = nn.Linear(1, 1)
    recalibrate_batchnorm(model, [])
    assert model.training
