"""Wrappers around optimizers whose `step` PyTorch puts no hooks around."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from torch import nn
from torch.optim import SGD

from posthoc_ema import ConfigError, TrackingError
from posthoc_ema.torch import Tracker, track


class Lookahead(torch.optim.Optimizer):
    """As several packages have it: `super().__init__()` is left out."""

    def __init__(self, optimizer, k=2):
        self.optimizer = optimizer
        self.k, self.calls = k, 0
        self.param_groups = optimizer.param_groups
        self.defaults = {}
        self.state = defaultdict(dict)
        self.slow = [p.detach().clone() for p in self._parameters()]

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.calls += 1
        if self.calls % self.k == 0:
            for slow, parameter in zip(self.slow, self._parameters(), strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)
        return loss


class HooksOfItsOwn(Lookahead):
    """Sets the dictionaries of hooks, so that registering one works; none is ever called."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()


class Accumulating(Lookahead):
    """As accelerate's: a call that only accumulates gradients does not step."""

    def step(self, closure=None):
        self.calls += 1
        if self.calls % self.k == 0:
            self.optimizer.step(closure)


def schedule_free(optimizer):
    wrapper = ScheduleFreeWrapper(optimizer, momentum=0.9)
    wrapper.train()
    return wrapper


WRAPPERS = [Lookahead, HooksOfItsOwn, schedule_free, lambda o: Lookahead(schedule_free(o))]


def make(wrap):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return model, wrap(SGD(model.parameters(), lr=0.1))


def backward(model):
    model.zero_grad()
    model(torch.ones(1, 2)).square().sum().backward()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_without_hooks_is_averaged_as_by_hand(wrap, tmp_path):
    averages = []
    for by_hand in (False, True):
        model, optimizer = make(wrap)
        folder = tmp_path / str(by_hand)
        if by_hand:
            tracker = Tracker(model, folder, every=None, on_error="raise")
        else:
            tracker = track(optimizer, model, folder, every=None, on_error="raise")
        for number in range(1, 6):
            backward(model)
            optimizer.step()
            if by_hand:
                tracker.step()
            assert tracker.time == number
        averages.append(tracker.averages(tracker.sigma_rels[0])["weight"])
        tracker.close()
        assert "step" not in vars(optimizer)
    assert torch.equal(*averages)


def test_a_call_in_which_nothing_inside_steps_does_not_count(tmp_path):
    model, optimizer = make(Accumulating)
    with track(optimizer, model, tmp_path, every=None, on_error="raise") as tracker:
        for number in range(1, 7):
            backward(model)
            optimizer.step()
            assert tracker.time == number // 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_inside_a_wrapper_does_not_count(fused, tmp_path):
    """As accelerate does it: the scaler steps the optimizer inside, and takes found_inf off again."""

    class Scaled(Lookahead):
        def step(self, closure=None):
            scaler.step(self.optimizer)
            scaler.update()

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = nn.Linear(2, 1)
    optimizer = Scaled(SGD(model.parameters(), lr=0.1, fused=fused))
    with track(optimizer, model, tmp_path, every=None, on_error="raise") as tracker:
        for factor in (1.0, float("inf"), 1.0):
            model.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            optimizer.step()
        assert tracker.time == 2


def test_hooks_that_pytorch_adds_later_do_not_count_twice(tmp_path):
    """`Optimizer.zero_grad` puts the hooks around `step` that `__init__` would have put there."""

    class Unseen(HooksOfItsOwn):
        def step(self, closure=None):
            return super().step(closure)

    model, optimizer = make(Unseen)
    assert not hasattr(Unseen.step, "hooked")
    with track(optimizer, model, tmp_path, every=None, on_error="raise") as tracker:
        for number in range(1, 4):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            assert tracker.time == number
        assert Unseen.step.hooked


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_wrapper_is_followed_beside_a_learning_rate_scheduler(scheduler_first, tmp_path):
    model, optimizer = make(Lookahead)

    def scheduler():
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    schedule = scheduler() if scheduler_first else None
    tracker = track(optimizer, model, tmp_path, every=None, on_error="raise")
    schedule = schedule or scheduler()
    for number in range(1, 4):
        backward(model)
        optimizer.step()
        schedule.step()
        assert tracker.time == number
    tracker.close()
    optimizer.step()
    assert tracker.time == 3


def test_an_exception_in_the_step_of_a_wrapper_leaves_nothing_behind(tmp_path):
    class Failing(Lookahead):
        fails = True

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise RuntimeError("out of memory")

    model, optimizer = make(Failing)
    with track(optimizer, model, tmp_path, every=None, on_error="raise") as tracker:
        backward(model)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert tracker.time == 0
        optimizer.fails = False
        optimizer.step()
        assert tracker.time == 1


def test_a_copy_of_a_wrapper_is_not_followed(tmp_path):
    model, optimizer = make(schedule_free)
    with track(optimizer, model, tmp_path, every=None, on_error="raise") as tracker:
        backward(model)
        copy.deepcopy(optimizer).step()
        assert tracker.time == 0
        optimizer.step()
        assert tracker.time == 1


def test_a_step_that_was_taken_before_tracking_is_refused(tmp_path):
    model, optimizer = make(Lookahead)
    taken = optimizer.step
    with track(optimizer, model, tmp_path, every=None, on_error="raise"):
        backward(model)
        with pytest.raises(TrackingError, match=r"call Tracker\.step\(\) yourself"):
            taken()


def test_a_wrapper_without_an_optimizer_inside_is_refused(tmp_path):
    class Alone(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

        def step(self, closure=None):
            """Steps somewhere else."""

    model = nn.Linear(2, 1)
    with pytest.raises(TrackingError, match=r"call Tracker\.step\(\) yourself after each step"):
        track(Alone(model.parameters()), model, tmp_path / "s", every=None)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("thing", [5, "adam", nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused(thing, tmp_path):
    with pytest.raises(ConfigError, match="has no `step` or no `param_groups`"):
        track(thing, nn.Linear(2, 1), tmp_path / "s", every=None)
