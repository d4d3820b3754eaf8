"""What `phema track` does inside a process: the hooks, without the processes."""

from __future__ import annotations

import gc
import json
import logging
import signal
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, Adam
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from phema.track_options import values_of
from posthoc_ema import SnapshotStore, TrackingError
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.launch import Launch
from posthoc_ema.torch.launch.leader import LastSeen
from posthoc_ema.torch.launch.models import Scan
from posthoc_ema.torch.launch.resume import mark_of

TEXTS = {"every": "2", "keep": "all", "sigma_rels": "0.05,0.1", "dtype": "float32"}


class Process:
    """One process of a tracked command: hooks on all optimizers, as sitecustomize makes them."""

    def __init__(self, out, **texts):
        self.events = []
        given = {**TEXTS, "out": str(out), "on_error": "raise", **texts}
        self.launch = Launch(
            values_of(given), lambda kind, text="": self.events.append((kind, text))
        )
        self.handles = [
            register_optimizer_step_pre_hook(self.launch.before_step),
            register_optimizer_step_post_hook(self.launch.after_step),
        ]

    def end(self):
        """What atexit does."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.launch._ending._at_exit()

    @property
    def runs(self):
        return self.launch._runs

    @property
    def trackers(self):
        return [run.tracker for run in self.launch._runs]

    def reports(self):
        """The last word on each model."""
        return {
            r["model"]: r
            for kind, text in self.events
            if kind == "report"
            for r in [json.loads(text)]
        }


@pytest.fixture
def process(tmp_path):
    """Starts processes; their signal handlers and hooks are gone afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    started = []

    def start(out=None, **texts):
        started.append(Process(out or tmp_path / "s", **texts))
        return started[-1]

    yield start
    for each in started:
        each.end()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not _global_optimizer_pre_hooks


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x)


class Generator(Net):
    pass


class Discriminator(Net):
    pass


def train(net, optimizer, steps, call=None, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, generator=generator)
        optimizer.zero_grad()
        (net if call is None else call)(x).square().mean().backward()
        optimizer.step()


def make(seed=0, kind=Net, **options):
    torch.manual_seed(seed)
    net = kind()
    return net, Adam(net.parameters(), lr=0.01, **options)


# ---- counting, and equality with the tracker of a loop of one's own


def test_the_averages_are_those_of_a_tracker_by_hand(process, tmp_path):
    tracked = process()
    net, optimizer = make()
    train(net, optimizer, 7)
    tracked.end()
    assert [t.time for t in tracked.trackers] == [7]
    by_hand_net, by_hand_optimizer = make()
    by_hand = Tracker(by_hand_net, tmp_path / "by-hand", every=2, sigma_rels=(0.05, 0.1))
    for step in range(7):
        train(by_hand_net, by_hand_optimizer, 1, start=step)
        by_hand.step()
    for name, average in by_hand.averages(0.1).items():
        assert torch.equal(average, tracked.trackers[0].averages(0.1)[name])
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 6, 7]
    by_hand.close()


def test_training_is_not_changed(process):
    plain, optimizer = make()
    train(plain, optimizer, 5)
    after = torch.get_rng_state()
    process()
    tracked, optimizer = make()
    train(tracked, optimizer, 5)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, tracked.state_dict()[name])
    assert torch.equal(after, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in tracked.modules())


def test_nothing_happens_before_an_optimizer_steps(process, tmp_path):
    started = process()
    net, optimizer = make()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.zero_grad()
    started.end()
    assert started.events == []
    assert not (tmp_path / "s").exists()


def test_a_single_step_counts_at_the_end(process, tmp_path):
    started = process()
    net, optimizer = make()
    train(net, optimizer, 1)
    assert not (tmp_path / "s").exists()
    started.end()
    assert started.reports()["Net"]["steps"] == 1
    assert SnapshotStore.open(tmp_path / "s").times == [1]


def test_images_are_counted(process, tmp_path):
    started = process(samples_per_step="16", every="32")
    net, optimizer = make()
    train(net, optimizer, 4)
    started.end()
    assert SnapshotStore.open(tmp_path / "s").times == [32, 64]
    assert SnapshotStore.open(tmp_path / "s").clock == "images"
    assert started.reports()["Net"]["steps"] == 4


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(process, fused):
    started = process()
    net, optimizer = make(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**112)  # the first steps overflow
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 3)).sum() * 1e6).backward()
        scaler.step(optimizer)
        scaler.update()
    started.end()
    assert 0 < started.trackers[0].time == optimizer.state[net.head.weight]["step"] < 12


# ---- which model


def named(process, run, **texts):
    """Names of the averaged tensors of what is tracked when `run` trains."""
    started = process(**texts)
    run()
    started.end()
    return {run.name: sorted(run.tracker.averages(0.05)) for run in started.runs}


NAMES = sorted(Net().state_dict())


def test_the_network_is_found_and_not_its_parts(process):
    net, optimizer = make()
    holder = nn.ModuleDict({"net": net})
    assert named(process, lambda: train(net, optimizer, 3)) == {"Net": NAMES}
    assert holder["net"] is net


@pytest.mark.parametrize("calls", ["the network", "the loss around it"])
def test_the_outermost_module_that_is_called_is_the_model(process, calls):
    class Loss(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).square()

    net, optimizer = make()
    loss = Loss(net)
    found = named(process, lambda: train(net, optimizer, 3, call=loss if "loss" in calls else net))
    prefixed = sorted(f"net.{name}" for name in NAMES)
    assert found == ({"Loss": prefixed} if "loss" in calls else {"Net": NAMES})


def test_a_call_without_gradients_is_not_training(process):
    """A package that keeps averages of its own holds the network too, and is called to evaluate."""

    class Averaging(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.online = net

        def forward(self, x):
            return self.online(x)

    net, optimizer = make()
    averaging = Averaging(net)

    def run():
        for step in range(3):
            with torch.no_grad():
                averaging(torch.ones(1, 3))
            train(net, optimizer, 1, start=step)

    assert named(process, run) == {"Net": NAMES}


def test_a_model_that_is_never_called_is_the_outermost_that_could_be(process):
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            raise NotImplementedError

        def loss(self, x):
            return self.net.head(x).square()

    torch.manual_seed(0)
    vae = Vae()
    optimizer = Adam(vae.parameters(), lr=0.01)
    holder = nn.ModuleList([vae])
    assert list(named(process, lambda: train(vae, optimizer, 3, call=vae.loss))) == ["Vae"]
    assert len(holder) == 1


def test_the_prefixes_of_wrappers_are_stripped(process):
    net, optimizer = make()
    parallel = nn.DataParallel(net)
    assert named(process, lambda: train(net, optimizer, 3, call=parallel)) == {"Net": NAMES}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["module", "in place", "step"])
def test_a_compiled_model_is_found_and_not_compiled_anew(process, how):
    torch._dynamo.reset()
    counter = CompileCounter()
    net, optimizer = make()
    loss = nn.Sequential(net)  # a second candidate: so calls are watched
    if how == "module":
        call = torch.compile(net, backend=counter, fullgraph=True)
    elif how == "in place":
        net.compile(backend=counter, fullgraph=True)
        call = net
    else:

        @torch.compile(backend=counter, fullgraph=True)
        def call(x):
            return net(x)

    found = named(process, lambda: train(net, optimizer, 5, call=call))
    # Inside a compiled function nothing is seen: the outermost module it is, then.
    assert list(found) == ["Sequential" if how == "step" else "Net"]
    assert counter.frame_count == 1
    assert len(loss) == 1
    torch._dynamo.reset()


def test_tied_weights_are_averaged_once_and_buffers_copied(process, tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.body[1].weight = self.body[0].weight
            self.register_buffer("count", torch.tensor(0))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    torch.manual_seed(0)
    net = Tied()
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    found = named(process, lambda: train(net, optimizer, 4))
    assert "body.1.weight" not in found["Tied"]
    store = SnapshotStore.open(tmp_path / "s")
    assert store.table.aliases == {"body.1.weight": "body.0.weight"}
    assert set(store.table.entries) >= {"count", "frozen"}


def test_the_model_can_be_chosen(process):
    net, optimizer = make()
    outer = nn.Sequential(net)
    run = lambda: train(net, optimizer, 3, call=outer)  # noqa: E731
    assert list(named(process, run, model="^Net$")) == ["Net"]


def test_a_choice_that_fits_nothing_is_said_at_once_and_at_the_end(process, caplog):
    started = process(model="UNet")
    net, optimizer = make()
    train(net, optimizer, 4)
    started.end()
    message = "--model UNet matches no class of what is trained"
    assert [r.getMessage() for r in caplog.records] == [f"{message} so far: Net."]
    assert started.events == [("problem", f"{message}: Net.")]


def test_parameters_of_no_module_are_an_error(process):
    process()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SGD([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    with pytest.raises(TrackingError, match="belong to no module"):
        optimizer.step()


def test_a_lightning_module_wins_over_what_it_calls(process):
    class LightningModule(nn.Module):
        """Known by its name: the real one takes seconds to load, and has a test of its own."""

        __module__ = "lightning.pytorch.core.module"

        def forward(self, x):
            raise NotImplementedError

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, x):
            return self.net(x)

    torch.manual_seed(0)
    module = Module()
    optimizer = Adam(module.parameters(), lr=0.01)
    found = named(process, lambda: train(module, optimizer, 3, call=module.training_step))
    assert found == {"Module": sorted(f"net.{name}" for name in NAMES)}


def test_lazy_objects_of_other_packages_are_left_asleep():
    class Lazy:
        @property
        def __class__(self):
            raise RuntimeError("woken up")

    lazy = [Lazy()]
    net = Net()
    scan = Scan(list(net.parameters()))
    assert scan.find(list(net.parameters()), None) is net
    scan.close()
    assert len(lazy) == 1


# ---- several optimizers, several models


def test_two_optimizers_of_one_model_make_one_event(process):
    started = process()
    net = Net()
    matrices = SGD(net.body.parameters(), lr=0.1)
    rest = Adam(net.head.parameters())
    for _ in range(5):
        net(torch.ones(2, 3)).sum().backward()
        matrices.step()
        rest.step()
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Net": 5}
    assert sorted(started.trackers[0].averages(0.05)) == NAMES


def test_an_optimizer_that_comes_later_belongs_to_the_model(process):
    started = process()
    net, optimizer = make()
    train(net, optimizer, 3)
    second = SGD(net.head.parameters(), lr=0.1)
    for step in range(3, 6):
        train(net, optimizer, 1, start=step)
        second.step()
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Net": 6}


def test_an_optimizer_for_each_parameter_makes_one_event(process):
    started = process()
    net = Net()
    optimizers = {p: SGD([p], lr=0.1) for p in net.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        net(torch.ones(2, 3)).sum().backward()
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Net": 4}


def gan(steps=4, critic_steps=1):
    generator, g = make(kind=Generator)
    discriminator, d = make(seed=1, kind=Discriminator)
    for step in range(steps):
        for _ in range(critic_steps):
            train(discriminator, d, 1, start=step)
        train(generator, g, 1, start=step)


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_of_two_models_the_first_is_tracked_and_one_line_names_the_other(
    process, caplog, critic_steps
):
    started = process(on_error="warn")
    with caplog.at_level(logging.WARNING, logger="posthoc_ema"):
        gan(4, critic_steps)
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {
        "Discriminator": 4 * critic_steps
    }
    (record,) = caplog.records
    assert "tracking Discriminator; Generator is trained too" in record.getMessage()


def test_the_other_of_two_models_can_be_chosen(process, caplog):
    started = process(model="Gen")
    gan()
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Generator": 4}
    assert not caplog.records


def test_a_critic_that_steps_first_alone_does_not_hide_the_chosen_model(process):
    started = process(model="Gen")
    gan(4, critic_steps=3)
    started.end()
    assert not [text for kind, text in started.events if kind == "problem"]
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Generator": 4}


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_each_of_two_models_is_tracked_in_its_own_folder(process, tmp_path, critic_steps):
    started = process(tmp_path / "{model}")
    gan(4, critic_steps)
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {
        "Discriminator": 4 * critic_steps,
        "Generator": 4,
    }
    assert SnapshotStore.open(tmp_path / "Generator").times == [2, 4]


@pytest.mark.parametrize("out", ["s", "{model}"])
def test_what_else_a_later_optimizer_of_the_model_trains_is_named_once(
    process, tmp_path, caplog, out
):
    """An encoder that is trained alone first, then together with what follows it."""
    started = process(tmp_path / out)
    encoder, optimizer = make(kind=Generator)
    train(encoder, optimizer, 3)
    decoder = nn.Linear(1, 1)
    both = Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    train(encoder, both, 3, call=lambda x: decoder(encoder(x)), start=3)
    started.end()
    assert {n: r["steps"] for n, r in started.reports().items()} == {"Generator": 6}
    (record,) = caplog.records
    assert "tracking Generator; Linear is trained too and not tracked" in record.getMessage()
    assert ("one optimizer trains both" in record.getMessage()) == (out == "{model}")


def test_an_error_in_one_of_two_models_leaves_the_other_going(
    process, tmp_path, caplog, monkeypatch
):
    started = process(tmp_path / "{model}", on_error="warn")
    generator, g = make(kind=Generator)
    discriminator, d = make(seed=1, kind=Discriminator)
    for step in range(5):
        if step == 3:
            monkeypatch.setattr(started.runs[0].tracker, "step", lambda: 1 / 0)
        train(discriminator, d, 1, start=step)
        train(generator, g, 1, start=step)
    started.end()
    assert SnapshotStore.open(tmp_path / "Discriminator").times == [2]
    assert SnapshotStore.open(tmp_path / "Generator").times == [2, 4, 5]
    problems = [text for kind, text in started.events if kind == "problem"]
    assert problems == ["Discriminator: division by zero"]
    assert len(caplog.records) == 1


# ---- resuming


def checkpointing(folder, steps, every=3, load=True):
    """A script that resumes from its own checkpoints; returns what it trains."""
    net, optimizer = make()
    done, path = 0, folder / "checkpoint.pt"
    if load and path.exists():
        held = torch.load(path)
        net.load_state_dict(held["net"])
        optimizer.load_state_dict(held["optimizer"])
        done = held["done"]
    for step in range(done, steps):
        train(net, optimizer, 1, start=step)
        if (step + 1) % every == 0:
            held = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            torch.save(held, path)
    return net, optimizer


def test_running_it_again_continues_bit_for_bit(process, tmp_path):
    whole = process(tmp_path / "whole")
    (tmp_path / "a").mkdir()
    checkpointing(tmp_path / "a", 11)
    whole.end()
    first = process()
    checkpointing(tmp_path, 8)
    for handle in first.handles:
        handle.remove()
    first.handles = []  # killed: nothing at the end; the script goes on from step 6
    for tracker in first.trackers:
        tracker.close()
    again = process()
    checkpointing(tmp_path, 11)
    again.end()
    assert again.reports()["Net"]["continued"] == 6
    assert again.trackers[0].time == 11
    for sigma_rel in (0.05, 0.1):
        for name, average in whole.trackers[0].averages(sigma_rel).items():
            assert torch.equal(average, again.trackers[0].averages(sigma_rel)[name])
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 6, 8, 10, 11]
    first.launch._ending._finished = True


def test_the_last_two_checkpoints_and_the_last_snapshot_have_states(process, tmp_path):
    started = process()
    checkpointing(tmp_path, 11)
    started.runs[0]._states.flush()
    assert [int(p.name[:12]) for p in sorted((tmp_path / "s/state").iterdir())] == [6, 9, 10]


def test_without_states_nothing_is_kept(process, tmp_path):
    started = process(states="off")
    checkpointing(tmp_path, 5)
    started.end()
    assert not (tmp_path / "s/state").exists()


def test_a_fresh_start_over_snapshots_names_both_numbers_and_the_choices(process, tmp_path):
    first = process()
    checkpointing(tmp_path, 6)
    first.end()
    process()
    with pytest.raises(TrackingError) as caught:
        checkpointing(tmp_path, 6, load=False)
    message = str(caught.value)
    for part in ("up to 6", "states to continue from at 3, 6", "starts at its beginning"):
        assert part in message
    for choice in ("--resume nearest", "--restart", "--out"):
        assert choice in message
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 6]


def test_an_unknown_place_in_training_names_both_numbers(process, tmp_path):
    first = process()
    net, optimizer = checkpointing(tmp_path, 6)
    first.end()
    train(net, optimizer, 2, start=6)  # went on untracked
    process()
    with pytest.raises(TrackingError, match=r"from at 3, 6; this one starts at step 8 of the"):
        train(net, optimizer, 2, start=8)


def test_other_weights_at_the_same_step_are_another_run(process, tmp_path):
    first = process()
    net, optimizer = checkpointing(tmp_path, 6)
    first.end()
    with torch.no_grad():
        net.head.weight.add_(1)
    process()
    with pytest.raises(
        TrackingError, match="starts at step 6 of the optimizer, with other weights"
    ):
        train(net, optimizer, 2, start=6)


def test_nearest_takes_the_gap_as_one_update(process, tmp_path):
    first = process()
    net, optimizer = checkpointing(tmp_path, 6)
    first.end()
    train(net, optimizer, 3, start=6)  # steps 7 to 9 are not seen
    again = process(resume="nearest")
    train(net, optimizer, 2, start=9)
    again.end()
    assert again.trackers[0].time == 11
    assert again.reports()["Net"]["continued"] == 6
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 6, 10, 11]


def test_restart_discards_what_is_there(process, tmp_path):
    first = process()
    checkpointing(tmp_path, 6)
    first.end()
    again = process(restart="yes")
    checkpointing(tmp_path / "nowhere", 5, every=100)
    again.end()
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 5]
    assert [int(p.name[:12]) for p in (tmp_path / "s/state").iterdir()] == [5]


def test_an_optimizer_without_a_counter_is_recognised_by_the_weights(process, tmp_path):
    torch.manual_seed(0)
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    first = process()
    train(net, optimizer, 4)
    first.end()
    again = process()
    train(net, SGD(net.parameters(), lr=0.1), 3, start=4)
    again.end()
    assert again.trackers[0].time == 7


def test_a_damaged_state_gives_way_to_another(process, tmp_path):
    first = process()
    checkpointing(tmp_path, 6)
    first.end()
    for path in (tmp_path / "s/state").iterdir():
        path.write_bytes(b"nothing")
    process()
    with pytest.raises(TrackingError, match="with states to continue from at none"):
        checkpointing(tmp_path, 8)


def test_a_mark_sees_one_step_and_a_move_does_not_change_it():
    net, optimizer = make()
    train(net, optimizer, 2)
    mark = mark_of(optimizer)
    assert mark.counter == 2
    assert mark_of(optimizer) == mark
    train(net, optimizer, 1, start=2)
    assert mark_of(optimizer) != mark


# ---- errors, signals, ends


def test_an_error_is_said_once_and_training_goes_on(process, caplog):
    started = process(on_error="warn")
    net, optimizer = make()
    with caplog.at_level(logging.ERROR, logger="posthoc_ema"):
        train(net, optimizer, 2)
        net.head.bias = None
        train(net, optimizer, 6, start=2)
    assert len(caplog.records) == 1
    started.end()
    report = started.reports()["Net"]
    assert "'head.bias'" in report["failure"]


def test_a_snapshot_on_demand(process, tmp_path):
    process(every="100")
    net, optimizer = make()
    train(net, optimizer, 3)
    signal.raise_signal(signal.SIGUSR1)
    assert SnapshotStore.open(tmp_path / "s").times == [3]


def test_a_signal_during_a_step_waits_for_its_end(process, tmp_path):
    class Interrupted(Adam):
        def step(self, closure=None):
            loss = super().step(closure)
            if self.state[self.param_groups[0]["params"][0]]["step"] == 4:
                signal.raise_signal(signal.SIGUSR1)
                assert SnapshotStore.open(tmp_path / "s").times == []
            return loss

    process(every="100")
    net, _ = make()
    optimizer = Interrupted(net.parameters())
    train(net, optimizer, 6)
    assert SnapshotStore.open(tmp_path / "s").times == [4]


def test_handlers_of_the_script_are_left_alone(process):
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append("theirs"))
    process()
    net, optimizer = make()
    train(net, optimizer, 3)
    signal.raise_signal(signal.SIGUSR1)
    assert seen == ["theirs"]


def test_of_weights_that_were_replaced_at_the_end_only_the_averages_are_stored(process, tmp_path):
    """A script may load its best weights before it ends: only the averages are those of the last step."""
    started = process()
    net, optimizer = make()
    best = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, optimizer, 5)
    net.load_state_dict(best)
    started.end()
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4, 5]
    assert not list((tmp_path / "s").glob("*5-raw.safetensors"))


def test_schedule_free_averages_are_those_of_training_and_no_snapshot_shows_the_other_weights(
    process, tmp_path
):
    schedulefree = pytest.importorskip("schedulefree")
    started = process()
    net, _ = make()
    optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.01)
    optimizer.train()
    train(net, optimizer, 5)
    optimizer.eval()
    signal.raise_signal(signal.SIGUSR1)
    started.trackers[0].flush()
    assert SnapshotStore.open(tmp_path / "s").times == [2, 4]
    optimizer.train()
    train(net, optimizer, 1, start=5)
    started.end()
    assert started.trackers[0].time == 6


def test_what_is_left_of_a_dropped_optimizer_is_where_it_stood():
    net, optimizer = make()
    train(net, optimizer, 3)
    seen, mark = LastSeen(optimizer), mark_of(optimizer)
    moments = weakref.ref(optimizer.state[net.head.weight]["exp_avg"])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert moments() is None
    assert mark_of(seen) == mark
    assert mark.counter == 3
