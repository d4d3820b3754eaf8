from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from posthoc_ema import SnapshotStore, TrackingError
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.step_outcome import Outcome

from .torch_models import Network, Scalar, train


def make(lr=0.1):
    torch.manual_seed(0)
    model = Network()
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def test_hook_counts_optimizer_steps(tmp_path):
    model, optimizer = make()
    tracker = track(optimizer, model, tmp_path, every=2, on_error="raise")
    train(model, optimizer, 5)
    assert tracker.time == 5
    assert tracker.store.times == [2, 4]
    tracker.close()


def test_hook_does_not_change_training(tmp_path):
    """Bit by bit the same run with and without a tracker."""
    plain, optimizer = make()
    train(plain, optimizer, 6)
    tracked, optimizer = make()
    with track(optimizer, tracked, tmp_path, every=2, on_error="raise"):
        train(tracked, optimizer, 6)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, tracked.state_dict()[name])


def test_hook_equals_calls_by_hand(tmp_path):
    model, optimizer = make()
    hooked = track(optimizer, model, tmp_path / "a", every=None)
    by_hand = Tracker(model, tmp_path / "b", every=None)
    for step in range(4):
        train(model, optimizer, 1, start=step)
        by_hand.step()
    for name, average in hooked.averages(0.15).items():
        assert torch.equal(average, by_hand.averages(0.15)[name])
    hooked.close()
    by_hand.close()


def test_closure_and_accumulation_count_once_per_step(tmp_path):
    model = Scalar(1.0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = (model.w**2).sum()
        loss.backward()
        return loss

    with track(optimizer, model, tmp_path, every=None) as tracker:
        for _ in range(3):
            optimizer.step(closure)
    assert tracker.time == 3


def test_closed_tracker_leaves_the_optimizer_alone(tmp_path):
    model, optimizer = make()
    tracker = track(optimizer, model, tmp_path, every=1)
    train(model, optimizer, 1)
    tracker.close()
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 1)
    assert tracker.time == 1
    tracker.close()


def test_parameters_of_another_model_are_refused(tmp_path):
    _, optimizer = make()
    with pytest.raises(TrackingError, match=r"6 of the optimizer's 6 parameters.*Linear"):
        track(optimizer, nn.Linear(1, 1), tmp_path / "s", every=1)
    assert not optimizer._optimizer_step_post_hooks


def test_error_in_the_hook_does_not_reach_the_training_loop(tmp_path, caplog):
    model, optimizer = make()
    with track(optimizer, model, tmp_path, every=2) as tracker:
        train(model, optimizer, 2)
        model.extra = nn.Linear(1, 1)
        with caplog.at_level(logging.ERROR, logger="posthoc_ema"):
            train(model, optimizer, 4)
    assert len(caplog.records) == 1
    assert tracker.time == 4
    assert SnapshotStore.open(tmp_path).times == [2]


def test_error_in_the_hook_is_raised_when_asked(tmp_path):
    model, optimizer = make()
    with track(optimizer, model, tmp_path, every=2, on_error="raise"):
        train(model, optimizer, 2)
        model.extra = nn.Linear(1, 1)
        with pytest.raises(TrackingError, match="the model changed while it was tracked"):
            train(model, optimizer, 4)


def _out_of_memory(self, optimizer):
    raise RuntimeError("no room for a copy")


def test_an_error_of_the_hook_itself_stops_tracking_and_not_training(tmp_path, caplog, monkeypatch):
    model, optimizer = make()
    with track(optimizer, model, tmp_path, every=2) as tracker:
        train(model, optimizer, 2)
        monkeypatch.setattr(Outcome, "__init__", _out_of_memory)
        before = model.gain.detach().clone()
        with caplog.at_level(logging.ERROR, logger="posthoc_ema"):
            train(model, optimizer, 3)
        assert not torch.equal(before, model.gain)
        assert tracker.stopped
        assert tracker.failure == "no room for a copy"
    assert len(caplog.records) == 1
    assert tracker.time == 2


def test_an_error_of_the_hook_itself_is_raised_when_asked(tmp_path, monkeypatch):
    model, optimizer = make()
    with track(optimizer, model, tmp_path, every=2, on_error="raise"):
        monkeypatch.setattr(Outcome, "__init__", _out_of_memory)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no room for a copy"):
                train(model, optimizer, 1)


def test_an_iteration_that_was_open_when_a_state_is_loaded_does_not_count(tmp_path):
    model = Network()
    first = torch.optim.SGD(model.embed.parameters(), lr=0.1)
    second = torch.optim.SGD(model.module.parameters(), lr=0.1)
    with track([first, second], model, tmp_path, every=None, on_error="raise") as tracker:
        first.step()
        second.step()
        state = tracker.state_dict()
        first.step()
        tracker.load_state_dict(state)
        first.step()
        second.step()
        assert tracker.time == 2


def test_samples_of_a_step_that_a_scaler_skips_go_to_the_next_one(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with track(optimizer, model, tmp_path, every=None, clock="images") as tracker:
        times = []
        for samples, factor in ((10, 1.0), (20, float("inf")), (30, 1.0)):
            tracker.advance(samples)
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            times.append(tracker.time)
    assert times == [10, 10, 60]
