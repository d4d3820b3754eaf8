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
from posthoc_ema.torch.launch_weights import LastWeights

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
