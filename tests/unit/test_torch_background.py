"""Snapshots that are written while training goes on."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

from posthoc_ema import SnapshotStore, SnapshotWriteError, TrackingError, synthesize
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.snapshots import TakenSnapshot

from .torch_models import Scalar

WAIT = 20.0


@pytest.fixture
def slow_writing(monkeypatch):
    """Storing begins when `begin` is set; the list says what has begun."""
    begin, times = threading.Event(), []
    add_to = TakenSnapshot.add_to

    def slow(self, *arguments, **options):
        times.append(self.time)
        assert begin.wait(WAIT)
        return add_to(self, *arguments, **options)

    monkeypatch.setattr(TakenSnapshot, "add_to", slow)
    yield begin, times
    begin.set()


def set_to(model, value):
    with torch.no_grad():
        model.w.fill_(value)


def test_training_goes_on_while_a_snapshot_is_written_from_a_copy(tmp_path, slow_writing):
    begin, _ = slow_writing
    model = Scalar(1.0)
    with Tracker(model, tmp_path, every=2, dtype="float32", on_error="raise") as tracker:
        tracker.step()
        tracker.step()  # snapshot of time 2 begins and does not end
        for value in (7.0, 8.0):
            set_to(model, value)
            if value == 7.0:
                tracker.step()
        assert tracker.time == 3
        assert SnapshotStore.open(tmp_path).times == []
        begin.set()
        assert tracker.store.times == [2]
        assert synthesize(tmp_path, 0)["w"].item() == 1.0
        assert synthesize(tmp_path, 0.15)["w"].item() == pytest.approx(1.0)


def test_next_snapshot_waits_for_the_last(tmp_path, slow_writing):
    begin, times = slow_writing
    model = Scalar(1.0)
    with Tracker(model, tmp_path, every=1, dtype="float32", on_error="raise") as tracker:
        tracker.step()
        second = threading.Thread(target=tracker.step)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert times == [1]
        begin.set()
        second.join(WAIT)
        assert not second.is_alive()
        assert tracker.store.times == [1, 2]


def test_state_waits_until_the_snapshots_before_it_are_stored(tmp_path, slow_writing):
    """A checkpoint must not claim more than the store holds."""
    begin, _ = slow_writing
    with Tracker(Scalar(1.0), tmp_path, every=1, on_error="raise") as tracker:
        tracker.step()
        threading.Timer(0.2, begin.set).start()
        assert tracker.state_dict()["time"] == 1
        assert SnapshotStore.open(tmp_path).times == [1]


def test_background_stores_the_same_bytes(tmp_path):
    folders = []
    for background in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
        folder = tmp_path / f"{len(folders)}"
        with Tracker(model, folder, every=2, run_id="r", background=background) as tracker:
            for _ in range(6):
                for parameter in model.parameters():
                    parameter.data.add_(torch.randn_like(parameter))
                model(torch.randn(8, 5))
                tracker.step()
        folders.append({p.name: p.read_bytes() for p in folder.glob("*.safetensors")})
    assert len(folders[0]) == 7
    assert folders[0] == folders[1]


def failing(error):
    def add_to(self, *arguments, **options):
        raise error

    return add_to


def test_error_in_the_background_is_logged_once_and_tracking_stops(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TakenSnapshot, "add_to", failing(TrackingError("the reason")))
    with (
        caplog.at_level(logging.ERROR, logger="posthoc_ema"),
        Tracker(Scalar(), tmp_path, every=1) as tracker,
    ):
        for _ in range(4):
            tracker.step()
        tracker.flush()
        assert (tracker.stopped, tracker.failure) == (True, "the reason")
    (record,) = caplog.records
    assert "tracking stopped" in record.getMessage()


def test_error_in_the_background_is_raised_at_the_next_call_when_asked(tmp_path, monkeypatch):
    error = SnapshotWriteError("disk full")
    with Tracker(Scalar(), tmp_path, every=2, on_error="raise") as tracker:
        with monkeypatch.context() as patch:
            patch.setattr(TakenSnapshot, "add_to", failing(error))
            tracker.step()
            tracker.step()
            with pytest.raises(SnapshotWriteError, match="disk full"):
                tracker.flush()
        tracker.step()
        tracker.step()
        assert tracker.store.times == [4]


def test_diverged_averages_are_named_once(tmp_path, caplog):
    """A NaN never leaves an average again; the loss of a run that recovers does not show it."""
    model = torch.nn.Linear(2, 1)
    with (
        caplog.at_level(logging.WARNING, logger="posthoc_ema"),
        Tracker(model, tmp_path, every=1, dtype="float32") as tracker,
    ):
        tracker.step()
        with torch.no_grad():
            model.bias.fill_(float("nan"))
        tracker.step()
        with torch.no_grad():
            model.bias.zero_()
        tracker.step()
    (record,) = caplog.records
    assert "at time 2" in record.getMessage()
    assert "'bias'" in record.getMessage()
    assert SnapshotStore.open(tmp_path).times == [1, 2, 3]


def test_job_is_done_at_once_where_no_thread_can_be_had(tmp_path, monkeypatch):
    """Python 3.12 starts none while it shuts down, where the last snapshot is taken."""

    def none(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", none)
    tracker = Tracker(Scalar(1.0), tmp_path, every=1, on_error="raise")
    tracker.step()
    assert SnapshotStore.open(tmp_path).times == [1]
    tracker.close()


def test_snapshot_that_was_begun_is_finished_at_exit(tmp_path):
    """A script that never closes its tracker and ends in the middle of writing."""
    script = f"""
import time, torch
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.snapshots import TakenSnapshot
add_to = TakenSnapshot.add_to
def slow(self, *a, **k):
    time.sleep(0.5)
    return add_to(self, *a, **k)
TakenSnapshot.add_to = slow
tracker = Tracker(torch.nn.Linear(2, 2), {str(tmp_path)!r}, every=1)
tracker.step()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    store = SnapshotStore.open(tmp_path)
    assert store.times == [1]
    assert list(store.verify()) == []
