"""Trackers after something went wrong, or was put to another time."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from posthoc_ema import SnapshotStore, SnapshotWriteError, TrackingError, synthesize
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.averaging import Averages
from posthoc_ema.torch.snapshots import TakenSnapshot

from .torch_models import Scalar


def set_to(model, value):
    with torch.no_grad():
        model.w.fill_(value)


def broken_update(self, *arguments, **options):
    raise RuntimeError("no memory")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_failed_tracker_recovers_by_an_earlier_state(tmp_path, monkeypatch, device):
    model = Scalar(1.0)
    tracker = Tracker(model, tmp_path, every=None, device=device)
    tracker.step()
    good = copy.deepcopy(tracker.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(Averages, "update", broken_update)
        tracker.step()
    assert (tracker.stopped, tracker.failure) == (True, "no memory")
    assert tracker.state_dict()["failed"]
    tracker.load_state_dict(good)
    assert (tracker.stopped, tracker.failure) == (False, None)
    tracker.step()
    assert tracker.time == 2
    with tracker.swapped(sigma_rel=0.15):
        assert model.w.item() == 1.0
    tracker.close()


def test_failed_work_of_the_offloading_thread_stops_tracking_and_nothing_else(tmp_path):
    model = Scalar(1.0)
    tracker = Tracker(model, tmp_path, every=None, device="cpu")
    tracker.step()
    good = copy.deepcopy(tracker.state_dict())

    def fail(*arguments):
        raise RuntimeError("no memory")

    tracker._averages._offload._work = fail
    tracker.step()
    tracker.flush()
    tracker.step()
    assert tracker.stopped
    assert "no memory" in tracker.failure
    assert tracker.state_dict()["failed"]
    tracker.load_state_dict(good)
    tracker.step()
    assert not tracker.stopped
    tracker.restart()
    tracker.close()


def test_restart_after_a_failure_tracks_again(tmp_path, monkeypatch):
    tracker = Tracker(Scalar(1.0), tmp_path, every=1)
    with monkeypatch.context() as patch:
        patch.setattr(TakenSnapshot, "add_to", broken_update)
        tracker.step()
        tracker.flush()
    assert tracker.stopped
    tracker.restart()
    tracker.step()
    assert (tracker.time, tracker.stopped, tracker.store.times) == (1, False, [1])
    tracker.close()


def test_step_at_which_an_earlier_error_is_raised_is_counted(tmp_path, monkeypatch):
    tracker = Tracker(Scalar(1.0), tmp_path, every=2, on_error="raise")
    with monkeypatch.context() as patch:

        def full(self, *arguments, **options):
            raise SnapshotWriteError("disk full")

        patch.setattr(TakenSnapshot, "add_to", full)
        tracker.step()
        tracker.step()
        tracker._recorder.wait()
        with pytest.raises(SnapshotWriteError, match="disk full"):
            tracker.step()
    assert tracker.time == 3
    tracker.step()
    assert tracker.time == 4
    assert tracker.store.times == [4]
    tracker.close()


def test_error_of_an_update_is_named_as_what_it_is(tmp_path, monkeypatch):
    tracker = Tracker(Scalar(1.0), tmp_path, every=None, on_error="raise")
    monkeypatch.setattr(Averages, "update", broken_update)
    with pytest.raises(RuntimeError, match="no memory"):
        tracker.step()
    assert tracker.failure == "no memory"
    tracker.close()


def test_closed_tracker_takes_no_snapshot_and_cannot_be_put_elsewhere(tmp_path):
    tracker = Tracker(Scalar(1.0), tmp_path, every=None, on_error="raise")
    tracker.step()
    state = tracker.state_dict()
    tracker.close()
    assert tracker.snapshot() == []
    assert tracker.failure is None
    with pytest.raises(TrackingError, match="the tracker is closed"):
        tracker.load_state_dict(state)
    tracker.close()


def test_folder_stays_the_same_when_the_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker(Scalar(1.0), "snapshots", every=1, on_error="raise") as tracker:
        tracker.step()
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        tracker.step()
    assert SnapshotStore.open(tmp_path / "snapshots").times == [1, 2]


def test_state_that_has_moved_on_is_refused(tmp_path):
    """The averages of a state are the tracker's own: a dict that is kept is not a copy."""
    model = Scalar(1.0)
    with Tracker(model, tmp_path, every=None, on_error="raise") as tracker:
        tracker.step()
        state = tracker.state_dict()
        tracker.load_state_dict(state)  # nothing has happened since
        state = tracker.state_dict()
        set_to(model, 9.0)
        tracker.step()
        with pytest.raises(TrackingError, match=r"copy\.deepcopy"):
            tracker.load_state_dict(state)


def test_averages_are_stored_without_the_weights_when_those_are_foreign(tmp_path):
    model = Scalar(1.0)
    with Tracker(model, tmp_path, every=2, update_every=3, on_error="raise") as tracker:
        for _ in range(4):
            tracker.step()
        set_to(model, 100.0)  # the script has loaded its best weights
        tracker._snapshot_averages()
    store = SnapshotStore.open(tmp_path)
    assert store.times == [2, 4]
    with Tracker(model, tmp_path / "b", every=None, update_every=3, on_error="raise") as tracker:
        set_to(model, 1.0)
        for _ in range(4):
            tracker.step()
        set_to(model, 100.0)
        records = tracker._snapshot_averages()
    assert [(r.time, r.sigma_rel) for r in records] == [(3, 0.04), (3, 0.15)]
    assert synthesize(tmp_path / "b", 0.1)["w"].item() == pytest.approx(1.0)


def test_part_that_is_frozen_for_a_while_is_averaged_on(tmp_path):
    """The half of a GAN whose turn it is not."""
    model = nn.ModuleDict({"g": Scalar(1.0), "d": Scalar(2.0)})
    with Tracker(model, tmp_path, every=1, dtype="float32", on_error="raise") as tracker:
        for turn in ("g", "d", "g"):
            for name, part in model.items():
                part.requires_grad_(name == turn)
            tracker.step()
    assert set(synthesize(tmp_path, 0.1)) == {"g.w", "d.w"}
    assert SnapshotStore.open(tmp_path).times == [1, 2, 3]


def test_part_that_was_frozen_when_tracking_began_is_not_averaged_from_its_middle_on(tmp_path):
    model = nn.ModuleDict({"g": Scalar(1.0), "d": Scalar(2.0)})
    model["d"].requires_grad_(False)
    with Tracker(model, tmp_path, every=1, on_error="raise") as tracker:
        tracker.step()
        model["d"].requires_grad_(True)
        with pytest.raises(TrackingError, match=r"'d.w' was .* not trainable and is .* trainable"):
            tracker.step()


@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_tie_that_is_broken_is_noticed_wherever_it_is(tmp_path, which):
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    model["b"].weight = model["c"].weight = model["a"].weight
    with Tracker(model, tmp_path, every=2, on_error="raise") as tracker:
        tracker.step()
        model[which].weight = nn.Parameter(torch.full((2, 2), 7.0))
        with pytest.raises(TrackingError, match="a tie was broken"):
            tracker.step()


def test_lazy_module_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(TrackingError, match="Run the model once"):
        Tracker(nn.LazyLinear(2), tmp_path, every=1)


def test_samples_of_the_next_step_do_not_go_to_one_that_is_not_counted_yet(tmp_path):
    """Two optimizers, one of which steps every other time: the iteration stays open until the next."""
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    with track([first, second], model, tmp_path, every=None, clock="images") as tracker:
        times = []
        for step in range(1, 6):
            tracker.advance(10 * step)
            times.append(tracker.time)
            first.step()
            if step % 2:
                second.step()
        tracker.state_dict()
        assert tracker.time == 150
    assert times == [0, 10, 30, 60, 100]
