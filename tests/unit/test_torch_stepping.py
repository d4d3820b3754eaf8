"""One event for each training iteration, whatever the optimizers do."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from posthoc_ema.torch import stepping
from posthoc_ema.torch.step_outcome import Outcome
from posthoc_ema.torch.stepping import Iterations, follow, outer_step, running_steps


class Twice(SGD):
    """Its step is its parent's, and a little more."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)
        return loss


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another one; its parameters are the other's."""

    def __init__(self, inner):
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        loss = self.inner.step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1)
        return loss


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def backward(net):
    net(torch.ones(2, 3)).square().mean().backward()


class Events:
    """Counts events, and what one parameter was at each."""

    def __init__(self, net):
        self.net = net
        self.seen = []

    def __call__(self):
        self.seen.append(self.net[0].weight.detach().clone())

    def __len__(self):
        return len(self.seen)


def followed(net, *optimizers):
    events = Events(net)
    iterations, detach = follow(optimizers, events)
    return events, iterations, detach


@pytest.mark.parametrize("kind", [SGD, Twice])
def test_a_step_counts_once(kind):
    net = model()
    optimizer = kind(net.parameters(), lr=0.1)
    events, _, _ = followed(net, optimizer)
    for number in range(3):
        backward(net)
        optimizer.step()
        assert len(events) == number + 1
        assert torch.equal(events.seen[-1], net[0].weight)


def test_a_closure_that_is_called_often_counts_once():
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
    events, _, _ = followed(net, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(events) == 2


@pytest.mark.parametrize("given", ["inner", "outer"])
def test_a_wrapper_that_is_an_optimizer_counts_when_it_is_done(given):
    net = model()
    inner = SGD(net.parameters(), lr=0.1)
    outer = Lookahead(inner)
    events, _, detach = followed(net, {"inner": inner, "outer": outer}[given])
    for _ in range(3):
        backward(net)
        outer.step()
        assert torch.equal(events.seen[-1], net[0].weight)
    assert len(events) == 3
    detach()
    assert not (inner._optimizer_step_post_hooks)
    assert not (outer._optimizer_step_post_hooks)
    assert not (inner._optimizer_step_pre_hooks)
    assert not (outer._optimizer_step_pre_hooks)


def test_a_step_of_another_model_inside_a_closure_is_a_step_of_its_own():
    net, other = model(), model(1)
    optimizer, inside = SGD(net.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    events, _, _ = followed(other, inside)

    def closure():
        backward(other)
        inside.step()
        return net(torch.ones(2, 3)).sum()

    optimizer.step(closure)
    assert len(events) == 1


def test_an_exception_in_a_step_leaves_nothing_behind():
    class Failing(SGD):
        fails = True

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise RuntimeError("out of memory")

    net = model()
    optimizer = Failing(net.parameters(), lr=0.1)
    events, _, _ = followed(net, optimizer)
    backward(net)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert len(events) == 0
    optimizer.fails = False
    optimizer.step()
    assert len(events) == 1


def test_two_optimizers_count_when_both_have_stepped():
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), Adam(net[1].parameters())
    events, iterations, _ = followed(net, first, second)
    for number in range(3):
        backward(net)
        first.step()
        assert (len(events), iterations.open) == (number, True)
        second.step()
        assert (len(events), iterations.open) == (number + 1, False)


def test_an_open_iteration_that_is_discarded_does_not_count():
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events, iterations, _ = followed(net, first, second)
    backward(net)
    first.step()
    iterations.discard()
    assert not iterations.open
    first.step()
    assert len(events) == 0
    second.step()
    assert len(events) == 1


@pytest.mark.parametrize("skipped", [0, 1])
def test_an_iteration_in_which_one_of_two_is_left_out_counts_before_the_next(skipped):
    net = model()
    optimizers = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events, _, _ = followed(net, *optimizers)
    backward(net)
    for number in range(5):
        for place, optimizer in enumerate(optimizers):
            if (number, place) != (2, skipped):
                optimizer.step()
    assert len(events) == 5


def test_an_optimizer_that_steps_rarely_does_not_add_iterations():
    """One discriminator-like part steps every second time: the other one's steps are the iterations."""
    net = model()
    often, rarely = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events = Events(net)
    iterations = Iterations(events)
    for number in range(1, 11):
        for optimizer in (often, rarely) if number % 2 == 0 else (often,):
            iterations.before(optimizer)
            iterations.after(optimizer)
    iterations.settle()
    assert len(events) == 10


def test_one_that_joins_does_not_add_an_iteration_and_is_waited_for():
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events = Events(net)
    iterations = Iterations(events, [first])
    for number in range(1, 7):
        for optimizer in (first, second) if number > 3 else (first,):
            iterations.before(optimizer)
            iterations.after(optimizer)
        assert len(events) == number
    iterations.settle()
    assert len(events) == 6


def test_one_that_takes_over_counts_each_of_its_steps():
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events = Events(net)
    iterations = Iterations(events, [first])
    for optimizer in (first, first, second, second, second):
        iterations.before(optimizer)
        iterations.after(optimizer)
    iterations.settle()
    assert len(events) == 5


def test_an_optimizer_for_each_parameter_counts_once_per_backward():
    net = model()
    optimizers = {p: SGD([p], lr=0.1) for p in net.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    events, _, _ = followed(net, *optimizers.values())
    for number in range(3):
        backward(net)
        assert len(events) == number + 1


def test_an_optimizer_that_is_gone_is_not_waited_for(monkeypatch):
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events = Events(net)
    iterations = Iterations(events, [first, second])
    del first
    gc.collect()
    for _ in range(4):
        iterations.before(second)
        iterations.after(second)
    assert not iterations.open
    assert len(events) == 4


def test_an_optimizer_that_does_not_step_any_more_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(stepping, "PATIENCE", 3)
    net = model()
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    events, iterations, _ = followed(net, first, second)
    backward(net)
    for number in range(1, 8):
        second.step()
        assert iterations.open == (number <= 3)
    assert len(events) == 7


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_does_not_count(fused):
    net = model()
    optimizer = Adam(net.parameters(), lr=0.1, fused=fused)
    events, _, _ = followed(net, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for number in range(4):
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3)).mean() * (float("inf") if number in (0, 2) else 1.0)
        scaler.scale(loss).backward()
        before = net[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net[0].weight) == (number in (0, 2))
    assert len(events) == 2


class _OnItsWay(Outcome):
    """What a fused optimizer on an accelerator leaves: an answer that is not there yet."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.waited = False

    @property
    def known(self):
        return self.waited

    def moved(self):
        self.waited = True
        return super().moved()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_answer_is_copied_to_the_host_whatever_the_default_device():
    optimizer = Adam(model().cuda().parameters(), fused=True)
    torch.set_default_device("cuda")
    try:
        for found in (0.0, 1.0):
            optimizer.found_inf = torch.tensor(found)
            outcome = Outcome(optimizer)
            assert not outcome.known
            assert outcome.moved() == (found == 0)
    finally:
        torch.set_default_device(None)


def test_an_answer_that_is_on_its_way_is_looked_at_when_the_next_step_begins(monkeypatch):
    monkeypatch.setattr(stepping, "Outcome", _OnItsWay)
    net = model()
    optimizer = Adam(net.parameters(), lr=0.1, fused=True)
    events, iterations, _ = followed(net, optimizer)
    backward(net)
    for number in range(3):
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.found_inf = torch.tensor(float(number == 1))
        optimizer.step()
        assert iterations.open
    assert len(events) == 1
    iterations.settle()
    assert len(events) == 2
    assert torch.equal(events.seen[-1], net[0].weight)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of PyTorch's own modules, when they load
@pytest.mark.parametrize("how", ["method", "function"])
def test_a_compiled_step_counts_once(how):
    torch._dynamo.reset()
    net = model()
    optimizer = Twice(net.parameters(), lr=0.1)
    events, _, _ = followed(net, optimizer)
    if how == "method":
        step = optimizer.step = torch.compile(optimizer.step, backend="eager")
    else:
        step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(3):
        backward(net)
        step()
        assert len(events) == number + 1
    torch._dynamo.reset()


def test_the_stack_tells_which_optimizers_are_stepping():
    net = model()
    seen = []

    class Looking(Twice):
        def step(self, closure=None):
            seen.append(running_steps(sys._getframe()))
            return super().step(closure)

    optimizer = Looking(net.parameters(), lr=0.1)
    outer = Lookahead(optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append(outer_step(optimizer)))
    backward(net)
    outer.step()
    assert seen[0] == [optimizer, outer]
    assert all(each is outer for each in seen[1:])
    assert running_steps(sys._getframe()) == []


@pytest.mark.parametrize("given", ["inner", "both"])
def test_two_optimizers_inside_one_count_once(given):
    net = model()
    parts = [SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)]

    class Joined(torch.optim.Optimizer):
        def __init__(self):
            super().__init__(net.parameters(), {})

        def step(self, closure=None):
            for part in parts:
                part.step()

    outer = Joined()
    events, iterations, _ = followed(net, *parts, *([outer] if given == "both" else []))
    for number in range(3):
        backward(net)
        outer.step()
        assert (len(events), iterations.open) == (number + 1, False)


def test_an_optimizer_given_twice_counts_once():
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    events, _, _ = followed(net, optimizer, optimizer)
    for _ in range(2):
        optimizer.step()
    assert len(events) == 2


def test_an_error_of_the_bookkeeping_is_reported_once_and_training_goes_on(monkeypatch):
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    reported = []
    follow([optimizer], Events(net), reported.append)

    def broken(self, optimizer):
        raise RuntimeError("no room for a copy")

    monkeypatch.setattr(Outcome, "__init__", broken)
    backward(net)
    for _ in range(3):
        before = net[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, net[0].weight)
    assert [str(error) for error in reported] == ["no room for a copy"]


@pytest.mark.parametrize("reports", [False, True])
def test_an_error_of_what_is_called_reaches_training(reports):
    def count():
        raise RuntimeError("the step was refused")

    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    reported = []
    follow([optimizer], count, reported.append if reports else None)
    with pytest.raises(RuntimeError, match="the step was refused"):
        optimizer.step()
    assert reported == []


def test_an_error_of_the_bookkeeping_is_raised_without_a_report(monkeypatch):
    def broken(self, optimizer):
        raise RuntimeError("no room for a copy")

    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    follow([optimizer], Events(net))
    monkeypatch.setattr(Outcome, "__init__", broken)
    with pytest.raises(RuntimeError, match="no room"):
        optimizer.step()
