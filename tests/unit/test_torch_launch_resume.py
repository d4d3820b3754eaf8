"""What `phema track` makes of weights and optimizers that a script puts back, or changes at its end."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import posthoc_ema as pe
from phema.track_options import values_of
from posthoc_ema.torch.launch import Launch
from posthoc_ema.torch.launch.weights import LastWeights

TEXTS = {"every": "10", "keep": "all", "sigma_rels": "0.05,0.1", "dtype": "float32"}


class Training:
    """A script's training, with the weights after each step that its averages should hold."""

    def __init__(self, kind=Adam):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.kind = kind
        self.optimizer = self.new_optimizer()
        self.history = []

    def new_optimizer(self):
        return self.kind(self.net.parameters(), lr=0.01)

    def steps(self, number):
        for _ in range(number):
            generator = torch.Generator().manual_seed(len(self.history))
            x = torch.randn(16, 8, generator=generator)
            self.optimizer.zero_grad()
            (self.net(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.history.append({n: p.detach().clone() for n, p in self.net.named_parameters()})

    def checkpoint(self):
        states = self.net.state_dict(), self.optimizer.state_dict(), self.history
        return copy.deepcopy(states)

    def load(self, checkpoint):
        self.net.load_state_dict(checkpoint[0])
        self.optimizer.load_state_dict(checkpoint[1])
        self.history = list(checkpoint[2])


class Process:
    """One process of a tracked command."""

    def __init__(self, folder, **texts):
        self.folder = folder
        self.events = []
        options = values_of({**TEXTS, "out": str(folder), "on_error": "warn", **texts})
        self.launch = Launch(options, lambda kind, text="": self.events.append((kind, text)))
        self.handles = [
            register_optimizer_step_pre_hook(self.launch.before_step),
            register_optimizer_step_post_hook(self.launch.after_step),
        ]

    def end(self):
        for handle in self.handles:
            handle.remove()
        self.launch._ending._at_exit()

    def report(self):
        return [json.loads(text) for kind, text in self.events if kind == "report"][-1]

    def check(self, history):
        """The averages at the end are those of `history`."""
        store = pe.SnapshotStore.open(self.folder)
        assert store.times[-1] == len(history)
        for sigma_rel in (0.05, 0.1):
            stored = pe.synthesize(store, sigma_rel)
            for name, values in stored.items():
                series = np.stack([weights[name].double().numpy() for weights in history])
                gamma = float(pe.gamma_from_sigma_rel(sigma_rel))
                expected = pe.power_average(series, range(1, len(history) + 1), gamma)
                np.testing.assert_allclose(values, expected, atol=3e-6)


@pytest.fixture
def process(tmp_path):
    started = []

    def start(**texts):
        started.append(Process(tmp_path / "s", **texts))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def said(caplog):
    """What was logged, as one text."""
    caplog.set_level(logging.WARNING, "posthoc_ema")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


# ---- weights that are changed after the last step


def by_loading(net, best):
    net.load_state_dict(best)


def through_data(net, best):
    for parameter, value in zip(net.parameters(), best.values(), strict=True):
        parameter.data.copy_(value * 5)


@pytest.mark.parametrize("change", [by_loading, through_data])
def test_weights_changed_after_the_last_step_leave_the_averages_right(process, change):
    started, training = process(), Training()
    best = copy.deepcopy(training.net.state_dict())
    training.steps(15)
    change(training.net, best)
    started.end()
    started.check(training.history)
    report = started.report()
    assert report["snapshots"] == 2
    assert "has no raw weights, because the weights were changed after step 15" in report["remark"]
    raw = pe.SnapshotStore.open(started.folder).find(15, pe.PointProfile(15))
    assert raw is None


def test_weights_that_nobody_changed_are_stored(process):
    started, training = process(), Training()
    training.steps(15)
    started.end()
    started.check(training.history)
    assert started.report()["remark"] == ""
    assert pe.SnapshotStore.open(started.folder).find(15, pe.PointProfile(15)) is not None


def test_changed_weights_do_not_enter_an_update_that_is_pending(process):
    started, training = process(update_every="4"), Training()
    training.steps(15)
    through_data(training.net, copy.deepcopy(training.net.state_dict()))
    started.end()
    store = pe.SnapshotStore.open(started.folder)
    assert store.times == [10, 12]
    largest = max(float(np.abs(v).max()) for v in pe.synthesize(store, 0.1).values())
    assert largest < 2 * max(float(v.abs().max()) for v in training.history[-1].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_through_data_is_seen_and_a_look_is_not(dtype):
    net = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(3, 4, 3)).to(dtype)
    net.to(memory_format=torch.channels_last)
    optimizer, weights = SGD(net.parameters(), lr=0.1), LastWeights()
    weights.remember(optimizer)
    assert weights.unchanged()
    net[1].weight.data.mul_(2)
    assert not weights.unchanged()
    weights.remember(optimizer)
    assert weights.unchanged()
    net[0].bias.data = torch.full_like(net[0].bias, float("nan"))
    assert not weights.unchanged()
    weights.remember(optimizer)
    assert weights.unchanged()


# ---- training that is put back within one process


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_search_that_is_undone_leaves_no_trace(process, said, kind):
    """A learning rate finder trains, and puts everything back to the beginning."""
    started, training = process(), Training(kind)
    beginning = training.checkpoint()
    training.steps(25)
    training.load(beginning)
    training.steps(15)
    started.end()
    started.check(training.history)
    assert said().count("starts again at the beginning") == 1
    assert "at step 25 the script put its training back" in said()
    assert (started.report()["steps"], started.report()["snapshots"]) == (15, 2)


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_search_with_an_optimizer_of_its_own_leaves_no_trace(process, said, kind):
    started, training = process(), Training(kind)
    beginning = training.checkpoint()
    training.steps(25)
    training.optimizer = training.new_optimizer()
    training.net.load_state_dict(beginning[0])
    training.history = []
    training.steps(15)
    started.end()
    started.check(training.history)
    assert said().count("starts again at the beginning") == 1


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_going_back_to_a_checkpoint_takes_the_averages_along(process, said, kind):
    started, training = process(), Training(kind)
    training.steps(12)
    checkpoint = training.checkpoint()
    training.steps(20)
    training.load(checkpoint)
    training.steps(11)
    started.end()
    started.check(training.history)
    assert "at step 32 the script put its training back: tracking continues from step 12" in said()
    assert pe.SnapshotStore.open(started.folder).times == [10, 20, 23]
    assert started.report()["snapshots"] == 3


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_loading_what_is_there_changes_nothing(process, said, kind):
    started, training = process(), Training(kind)
    training.steps(12)
    training.load(training.checkpoint())
    training.steps(3)
    training.optimizer = training.new_optimizer()
    training.steps(5)
    started.end()
    started.check(training.history)
    assert said() == ""


def test_a_checkpoint_right_after_going_back_is_of_where_it_went(process, said):
    started, training = process(), Training()
    training.steps(12)
    checkpoint = training.checkpoint()
    training.steps(15)
    training.load(checkpoint)
    checkpoint = training.checkpoint()
    training.steps(4)
    training.load(checkpoint)
    training.steps(3)
    started.end()
    started.check(training.history)
    assert said().count("tracking continues from step 12") == 2


def test_an_unknown_state_stops_tracking_and_names_both_places(process, said):
    started, training = process(), Training()
    with torch.no_grad():
        elsewhere = Training()
        elsewhere.net[0].weight.add_(1)
    elsewhere.kind = Adam
    training.steps(12)
    training.net.load_state_dict(elsewhere.net.state_dict())
    training.optimizer.load_state_dict(training.new_optimizer().state_dict())
    before = list(training.history)
    training.steps(15)
    started.end()
    started.check(before)
    message = (
        "after 12 tracked steps the script put its training back to an optimizer that counts no"
    )
    assert said().count(message) == 1
    assert message in started.report()["failure"]


def test_going_back_while_an_iteration_is_open(process, said):
    """Two optimizers, one of which has not stepped when the script goes back."""
    started, training = process(), Training()
    second = SGD(training.net[2].parameters(), lr=0.001)

    def iterations(number):
        for _ in range(number):
            training.steps(1)
            second.step()
            training.history[-1] = copy.deepcopy(dict(training.net.named_parameters()))

    iterations(12)
    checkpoint = copy.deepcopy((training.checkpoint(), second.state_dict()))
    iterations(5)
    training.steps(1)
    training.load(checkpoint[0])
    second.load_state_dict(checkpoint[1])
    iterations(4)
    started.end()
    for weights in training.history:
        for name in weights:
            weights[name] = weights[name].detach()
    started.check(training.history)
    assert "tracking continues from step 12" in said()


# ---- continuing in another process


def weights_only(training):
    """What a script has that saves its weights alone."""
    again = Training(training.kind)
    again.net.load_state_dict(training.net.state_dict())
    again.history = list(training.history)
    return again


def test_nearest_says_where_it_continues_and_how_large_the_gap_is(process, said):
    first, training = process(), Training()
    training.steps(10)
    first.end()
    training.steps(3)
    again = process(resume="nearest")
    training.steps(2)
    again.end()
    assert "continues from step 10; 3 steps of gap." in said()


def test_nearest_does_not_continue_a_run_that_counts_no_steps_with_other_weights(process, said):
    first, training = process(), Training(SGD)
    training.steps(10)
    first.end()
    process(resume="nearest")
    Training(SGD).steps(3)
    assert "weights that belong to no saved state, and its optimizer does not count steps" in said()
    assert "--resume nearest goes by the steps that the optimizer has counted" in said()


@pytest.mark.parametrize("resume", ["exact", "nearest"])
def test_a_new_optimizer_is_named_as_the_reason(process, said, resume):
    first, training = process(), Training()
    training.steps(12)
    saved = weights_only(training)
    training.steps(3)
    first.end()
    process(resume=resume)
    saved.steps(3)
    assert (
        "the optimizer is new (no steps made), and the weights belong to no saved state" in said()
    )
    assert "save that as well: optimizer.state_dict()" in said()


def test_weights_alone_are_enough_where_a_snapshot_was_stored(process):
    first, training = process(), Training()
    training.steps(15)
    first.end()
    saved = weights_only(training)
    again = process()
    saved.steps(3)
    again.end()
    again.check(saved.history)


def test_a_process_that_is_killed_has_told_of_its_last_snapshot(process):
    started, training = process(), Training()
    training.steps(12)
    started.launch._runs[0].tracker.flush()
    training.steps(1)
    assert started.report()["snapshots"] == 1
