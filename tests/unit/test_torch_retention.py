"""A tracker that keeps its store within a budget while training runs on."""

from __future__ import annotations

import pytest
import torch

from posthoc_ema import ConfigError, InvalidProfileError, SnapshotStore, plan_synthesis, synthesize
from posthoc_ema.torch import Tracker


def run(folder, steps, keep, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40, bias=False)
    with Tracker(model, folder, every=10, keep=keep, on_error="raise", **options) as tracker:
        for _ in range(steps):
            with torch.no_grad():
                model.weight.add_(torch.randn(40, 40), alpha=0.01)
            tracker.step()
            assert len([r for r in tracker.store.records if r.sigma_rel]) <= keep
    return SnapshotStore.open(folder)


@pytest.mark.parametrize("dtype", ["delta", "float16"])
def test_store_stays_within_its_budget_and_can_be_used(tmp_path, dtype):
    thinned = run(tmp_path / "thinned", 640, 16, dtype=dtype, keep_range=(0.03, 0.20))
    everything = run(tmp_path / "all", 640, 1000, dtype="float32")
    assert not list(thinned.verify())
    assert thinned.times[-1] == 640
    assert sum(r.file_bytes for r in thinned.records) < 0.2 * sum(
        r.file_bytes for r in everything.records
    )
    for sigma_rel in (0.05, 0.1, 0.2):
        ours, true = (synthesize(s, sigma_rel)["weight"] for s in (thinned, everything))
        error = ((ours - true) ** 2).mean() ** 0.5 / (true**2).mean() ** 0.5
        assert error < 0.03
    # the last 16 files, what other trackers keep, know nothing of a long average
    last = [t for t in everything.times if t > 560]
    report = plan_synthesis(everything, [0.2], include=last).report(0)
    assert report.predicted_error > 5 * plan_synthesis(thinned, [0.2]).report(0).predicted_error


def test_budget_holds_across_a_resume(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    first = Tracker(model, tmp_path / "s", every=5, keep=6, on_error="raise")
    for _ in range(50):
        first.step()
    state = first.state_dict()
    first.close()
    with Tracker(model, tmp_path / "s", every=5, keep=6, resume=True, on_error="raise") as second:
        second.load_state_dict(state)
        for _ in range(50):
            second.step()
        assert second.store.times[-1] == 100
        assert len([r for r in second.store.records if r.sigma_rel]) == 6
    assert not list(SnapshotStore.open(tmp_path / "s").verify())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep": 0}, ConfigError),
        ({"keep": 2.5}, ConfigError),
        ({"keep": 4, "keep_range": (0.2, 0.02)}, ConfigError),
        ({"keep": 4, "keep_range": (0.02, 0.5)}, InvalidProfileError),
    ],
    ids=["none", "half", "falling", "outside"],
)
def test_bad_budget_is_refused_at_once(tmp_path, options, error):
    with pytest.raises(error):
        Tracker(torch.nn.Linear(2, 2), tmp_path / "s", every=5, **options)
    assert not (tmp_path / "s").exists()


def test_recorded_noise_stays_true_while_a_store_is_thinned(tmp_path):
    """What is kept for the next difference must follow when thinning writes its bases anew."""
    weights = {}
    model = torch.nn.Linear(30, 30, bias=False)
    torch.manual_seed(0)
    options = {"every": 10, "keep": 8, "on_error": "raise", "dtype": "delta-int8"}
    with Tracker(model, tmp_path / "s", **options) as tracker:
        for _ in range(300):
            with torch.no_grad():
                model.weight.add_(torch.randn(30, 30), alpha=0.01)
            tracker.step()
            for sigma_rel in tracker.sigma_rels:
                values = tracker.averages(sigma_rel)["weight"].numpy().copy()
                weights[tracker.time, sigma_rel] = values
        store = tracker.store
        for record in store.averages:
            with store.read(record) as reader:
                stored = reader.values(store.table.entries["weight"], 0, 900)
            error = stored - weights[record.time, record.sigma_rel].ravel()
            assert (error**2).mean() < 2 * record.noise + 1e-12


def test_snapshot_that_was_thinned_is_not_stored_again(tmp_path):
    model = torch.nn.Linear(20, 20)
    torch.manual_seed(0)
    options = {"every": 10, "keep": 7, "keep_range": (0.15, 0.2), "on_error": "raise"}
    with Tracker(model, tmp_path / "s", **options) as tracker:
        for _ in range(100):
            with torch.no_grad():
                model.weight.add_(torch.randn(20, 20), alpha=0.01)
            tracker.step()
            tracker.snapshot()
            assert tracker.snapshot() == []
    assert not list(SnapshotStore.open(tmp_path / "s").verify())


def test_damaged_old_file_does_not_stop_snapshots(tmp_path, caplog):
    model = torch.nn.Linear(4, 4)
    with Tracker(model, tmp_path / "s", every=5, keep=6, on_error="raise") as tracker:
        for step in range(60):
            tracker.step()
            if step == 30:
                tracker.store.path(tracker.store.averages[0]).unlink()
        assert tracker.store.times[-1] == 60
    assert caplog.text.count("is not thinned any more") == 1
