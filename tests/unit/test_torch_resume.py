from __future__ import annotations

import hashlib
import logging

import pytest
import torch
from torch import nn

from posthoc_ema import SnapshotMismatchError, SnapshotStore, TrackingError
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.averaging import Averages

from .torch_models import Network, Scalar, train

OPTIONS = {"every": 3, "on_error": "raise", "run_id": "run"}


def start(folder, **options):
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, Tracker(model, folder, **(OPTIONS | options))


def run(model, optimizer, tracker, first, last):
    for step in range(first, last):
        train(model, optimizer, 1, start=step)
        tracker.step()


def save(path, model, optimizer, tracker):
    states = {"model": model, "optimizer": optimizer, "tracker": tracker}
    torch.save({name: each.state_dict() for name, each in states.items()}, path)


def load(path, model, optimizer, tracker):
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    tracker.load_state_dict(state["tracker"])


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("update_every", [1, 4])
@pytest.mark.parametrize("stop", [1, 6, 7])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, update_every, stop):
    """pytorch-posthoc-ema starts fresh averages and re-uses old step numbers."""
    options = {"update_every": update_every}
    whole = start(tmp_path / "whole", **options)
    run(*whole, 0, 12)
    whole[2].close()

    first = start(tmp_path / "parts", **options)
    run(*first, 0, stop)
    save(tmp_path / "checkpoint.pt", *first)
    run(*first, stop, min(stop + 4, 12))  # a future that is lost
    first[2].close()

    second = start(tmp_path / "parts", resume=True, **options)
    load(tmp_path / "checkpoint.pt", *second)
    run(*second, stop, 12)
    for sigma_rel in (0.04, 0.15):
        for name, average in whole[2].averages(sigma_rel).items():
            assert torch.equal(average, second[2].averages(sigma_rel)[name])
    second[2].close()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert list(SnapshotStore.open(tmp_path / "parts").verify()) == []


def test_state_is_plain_and_holds_the_live_averages(tmp_path):
    model, optimizer, tracker = start(tmp_path / "s")
    run(model, optimizer, tracker, 0, 2)
    state = tracker.state_dict()
    assert state["averages"]["embed.weight"].shape == (2, 6, 4)
    plain = {k: v for k, v in state.items() if k != "averages"}
    assert plain == {
        "schema": 1,
        "run_id": "run",
        "clock": "steps",
        "time": 2,
        "last_update": 2,
        "steps": 2,
        "pending": 0,
        "failed": False,
        "sigma_rels": [0.04, 0.15],
    }
    tracker.close()


def test_loaded_averages_are_copies(tmp_path):
    """Two trackers that share tensors would average twice."""
    first = start(tmp_path / "s")
    run(*first, 0, 2)
    state = first[2].state_dict()
    first[2].close()
    second = start(tmp_path / "s", resume=True)
    second[2].load_state_dict(state)
    before = state["averages"]["gain"].clone()
    run(*second, 2, 4)
    assert torch.equal(state["averages"]["gain"], before)
    second[2].close()


def test_future_snapshots_go_and_earlier_ones_stay(tmp_path):
    first = start(tmp_path / "s")
    run(*first, 0, 4)
    state = first[2].state_dict()
    state = {**state, "averages": {n: t.clone() for n, t in state["averages"].items()}}
    run(*first, 4, 10)
    first[2].close()
    assert SnapshotStore.open(tmp_path / "s").times == [3, 6, 9]
    _, _, tracker = start(tmp_path / "s", resume=True)
    tracker.load_state_dict(state)
    assert SnapshotStore.open(tmp_path / "s").times == [3]
    assert tracker.time == 4
    tracker.close()


def test_resume_without_state_is_refused_before_anything_is_lost(tmp_path):
    first = start(tmp_path / "s")
    run(*first, 0, 3)
    first[2].close()
    before = digests(tmp_path / "s")
    model, _, tracker = start(tmp_path / "s", resume=True)
    with pytest.raises(TrackingError, match=r"starts at time 0.*load_state_dict.*restart\(\)"):
        tracker.step()
    assert digests(tmp_path / "s") == before
    assert model is not None


def test_resume_into_a_new_folder_goes_on_and_says_what_is_missing(tmp_path, caplog):
    first = start(tmp_path / "s")
    run(*first, 0, 4)
    state = first[2].state_dict()
    first[2].close()
    second = start(tmp_path / "other", resume=True)
    with caplog.at_level(logging.WARNING, logger="posthoc_ema"):
        second[2].load_state_dict(state)
    assert "holds no snapshots of run run" in caplog.text
    run(*second, 4, 6)
    assert second[2].store.times == [6]
    second[2].close()


def other_model(state):
    state["averages"]["gain"] = torch.zeros(2, 3)


BAD_STATES = {
    "schema": (lambda s: s.update(schema=2), TrackingError, "schema 2, this version reads 1"),
    "other": (lambda s: s.pop("averages"), TrackingError, "'averages' is missing"),
    "empty": (lambda s: s.clear(), TrackingError, "schema None"),
    "lengths": (
        lambda s: s.update(sigma_rels=[0.05, 0.2]),
        TrackingError,
        r"sigma_rels of the saved state is \[0.05, 0.2\]",
    ),
    "clock": (lambda s: s.update(clock="images"), TrackingError, "clock of the saved state"),
    "shape": (other_model, TrackingError, r"'gain' has shape \(2, 3\).*needs \(2,\)"),
    "name": (
        lambda s: s["averages"].update(x=s["averages"].pop("gain")),
        TrackingError,
        "'gain' has shape None",
    ),
    "run": (lambda s: s.update(run_id="x"), SnapshotMismatchError, "belongs to run x"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_wrong_state_is_refused(tmp_path, name):
    change, error, message = BAD_STATES[name]
    first = start(tmp_path / "s")
    run(*first, 0, 4)
    state = first[2].state_dict()
    first[2].close()
    state["averages"] = dict(state["averages"])
    change(state)
    before = digests(tmp_path / "s")
    _, _, tracker = start(tmp_path / "s", resume=True)
    with pytest.raises(error, match=message):
        tracker.load_state_dict(state)
    assert digests(tmp_path / "s") == before
    tracker.close()


def test_state_of_another_architecture_is_refused(tmp_path):
    first = start(tmp_path / "s")
    run(*first, 0, 1)
    state = first[2].state_dict()
    first[2].close()
    tracker = Tracker(nn.Linear(2, 2), tmp_path / "t", every=1)
    with pytest.raises(TrackingError, match="belongs to another model"):
        tracker.load_state_dict(state)


def test_state_before_the_first_update_is_loaded(tmp_path):
    """With update_every=100 a checkpoint may come before there is any average."""
    model = Scalar(1.0)
    tracker = Tracker(model, tmp_path, every=None, update_every=100)
    for _ in range(3):
        tracker.step()
    state = tracker.state_dict()
    tracker.close()
    assert state["averages"] == {}
    other = Tracker(model, tmp_path, every=None, update_every=100, resume=True, on_error="raise")
    other.load_state_dict(state)
    for _ in range(97):
        other.step()
    assert other.time == 100
    assert other.averages(0.04)["w"].tolist() == [1.0]
    other.close()


def test_advance_before_a_resume_is_forgotten(tmp_path):
    tracker = Tracker(Scalar(), tmp_path, every=None, clock="images", samples_per_step=4)
    tracker.step()
    state = tracker.state_dict()
    tracker.advance(100)
    tracker.load_state_dict(state)
    tracker.step()
    assert tracker.time == 8
    tracker.close()


def test_samples_of_an_unfinished_accumulation_are_saved(tmp_path):
    options = {"clock": "images", "every": None}
    first = start(tmp_path / "s", **options)
    first[2].advance(8)
    run(*first, 0, 1)
    first[2].advance(5)
    state = first[2].state_dict()
    first[2].close()
    second = start(tmp_path / "s", resume=True, **options)
    second[2].load_state_dict(state)
    second[2].advance(3)
    run(*second, 1, 2)
    assert second[2].time == 16
    second[2].close()


def test_ctrl_c_in_the_middle_of_an_update_stops_tracking(tmp_path, monkeypatch, caplog):
    """Some tensors are updated then and others are not; going on would count those twice."""
    model, optimizer, tracker = start(tmp_path / "s")
    run(model, optimizer, tracker, 0, 1)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Averages, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracker.step()
    assert "interrupted between two tensors" in caplog.text
    tracker.step()
    assert len(calls) == 1
    assert tracker.state_dict()["failed"]
    tracker.close()
