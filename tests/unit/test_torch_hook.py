from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from posthoc_ema import SnapshotStore, TrackingError
from posthoc_ema.torch import Tracker, track

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
        model.gain.requires_grad_(False)
        with caplog.at_level(logging.ERROR, logger="posthoc_ema"):
            train(model, optimizer, 4)
    assert len(caplog.records) == 1
    assert tracker.time == 4
    assert SnapshotStore.open(tmp_path).times == [2]


def test_error_in_the_hook_is_raised_when_asked(tmp_path):
    model, optimizer = make()
    with track(optimizer, model, tmp_path, every=2, on_error="raise"):
        train(model, optimizer, 2)
        model.gain.requires_grad_(False)
        with pytest.raises(TrackingError, match="'gain' was float32"):
            train(model, optimizer, 4)
