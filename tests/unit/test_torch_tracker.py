from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import (
    ConfigError,
    InvalidProfileError,
    SnapshotError,
    SnapshotMismatchError,
    SnapshotStore,
    TrackingError,
    gamma_from_sigma_rel,
    power_average,
    power_step_weights,
    synthesize,
)
from posthoc_ema.torch import Tracker

from .torch_models import Network, Scalar

SIGMA_RELS = (0.05, 0.10, 0.28)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "snapshots"


def impulse_response(folder, elapsed, *, resume_at=(), **options):
    """Weight of each step in each average: number i of the parameter is 1 during step i only."""
    count = len(elapsed)
    model = nn.Module()
    model.w = nn.Parameter(torch.full((count,), 7.0))  # initial weights that would be seen
    options = {"sigma_rels": SIGMA_RELS, "every": None, "on_error": "raise"} | options
    tracker = Tracker(model, folder, **options)
    for step, samples in enumerate(elapsed):
        if step in resume_at:
            state = tracker.state_dict()
            tracker.close()
            tracker = Tracker(model, folder, **options, resume=True)
            tracker.load_state_dict(state)
        with torch.no_grad():
            model.w.zero_()
            model.w[step] = 1
        if options.get("clock") == "images":
            tracker.advance(samples)
        tracker.step()
    tracker.snapshot()
    tracker.close()
    return torch.stack([tracker.averages(s)["w"] for s in SIGMA_RELS]).double().numpy()


def asked_response(elapsed, update_every=1):
    """The asked profile at the resolution of the updates: the last step of an interval stands for it."""
    times = np.cumsum(elapsed)
    updates = np.arange(update_every - 1, len(times), update_every)
    updates = np.union1d(updates, [len(times) - 1])
    expected = np.zeros((len(SIGMA_RELS), len(times)))
    for row, gamma in zip(expected, gamma_from_sigma_rel(SIGMA_RELS), strict=True):
        row[updates] = power_step_weights(times[updates].tolist(), gamma)
    return expected


# ---- the response to each step is the asked profile


@pytest.mark.parametrize("update_every", [1, 7, 100])
@pytest.mark.parametrize("resume_at", [(), (1, 63, 150)], ids=["straight", "resumed"])
def test_response_to_each_step_is_the_asked_profile(folder, update_every, resume_at):
    """ema-pytorch applies one step's decay per update of many: at 100 it tracks quite another profile.

    230 is a multiple of neither interval: the snapshot at the end must bring the average up to date
    (nitrous-ema stores what the last update left, and its mean lags).
    """
    elapsed = [1] * 230
    measured = impulse_response(folder, elapsed, update_every=update_every, resume_at=resume_at)
    expected = asked_response(elapsed, update_every)
    assert np.abs(measured - expected).max() < 1e-6
    assert np.abs(measured.sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("update_every", [1, 7])
def test_response_is_exact_when_the_batch_size_changes(folder, update_every):
    """The clock is the samples that were seen, not the number of steps."""
    elapsed = [8] * 40 + [128] * 30 + [64, 3, 1] * 10
    measured = impulse_response(
        folder, elapsed, clock="images", update_every=update_every, resume_at=(55,)
    )
    assert np.abs(measured - asked_response(elapsed, update_every)).max() < 1e-6


@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_width_of_the_measured_profile_is_sigma_rel(folder, update_every):
    """pytorch-posthoc-ema and ema-pytorch at interval 10 measure 0.246 where 0.05 was asked."""
    count = 2000
    measured = impulse_response(folder, [1] * count, update_every=update_every)
    times = np.arange(1, count + 1) - update_every / 2
    for row, sigma_rel in zip(measured, SIGMA_RELS, strict=True):
        row = row / row.sum()
        mean = (row * times).sum()
        held = update_every**2 / 12  # an update stands for all steps since the last one
        width = np.sqrt((row * (times - mean) ** 2).sum() + held) / count
        assert width == pytest.approx(sigma_rel, rel=0.02)


def test_response_far_into_training_keeps_its_digits(folder):
    """At dt/t = 1e-8 a float32 beta would be exactly one and the average would stand still."""
    model = Scalar(1.0)
    tracker = Tracker(
        model, folder, sigma_rels=(0.1,), every=None, clock="images", on_error="raise"
    )
    tracker.advance(10**9)
    tracker.step()
    with torch.no_grad():
        model.w.fill_(1e6 + 1)
    tracker.advance(10)
    tracker.step()
    gamma = float(gamma_from_sigma_rel(0.1))
    expected = power_average([1.0, 1e6 + 1], [10**9, 10**9 + 10], gamma)
    assert tracker.averages(0.1)["w"].item() == pytest.approx(expected, rel=1e-6)


def test_initial_weights_never_enter(folder):
    """Whatever the first interval is: the first update has beta 0."""
    model = Scalar(1e6)
    tracker = Tracker(model, folder, every=None, update_every=3)
    with torch.no_grad():
        model.w.fill_(2.0)
    for _ in range(3):
        tracker.step()
    assert tracker.averages(0.04)["w"].tolist() == [2.0]


def test_tracked_average_equals_the_oracle(folder, rng):
    values = rng.normal(size=(50, 3)).astype(np.float32)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3))
    tracker = Tracker(model, folder, every=None, on_error="raise")
    for row in values:
        model.w.data = torch.from_numpy(row)
        tracker.step()
    for sigma_rel in (0.04, 0.15):
        expected = power_average(values, range(1, 51), float(gamma_from_sigma_rel(sigma_rel)))
        np.testing.assert_allclose(tracker.averages(sigma_rel)["w"], expected, atol=1e-6)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_are_float32_whatever_the_model_is(folder, dtype):
    """A bfloat16 shadow stalls: ema-pytorch, EDM2's class, torch's and diffusers' stay at 1.0 here.

    From step 20000 an update moves the average by less than bfloat16 can hold.
    """
    model = Scalar(1.0, dtype)
    tracker = Tracker(
        model, folder, sigma_rels=(0.1,), every=None, clock="images", on_error="raise"
    )
    tracker.advance(20_000)
    tracker.step()
    with torch.no_grad():
        model.w.fill_(1.5)
    for _ in range(2000):
        tracker.advance(10)
        tracker.step()
    average = tracker.averages(0.1)["w"]
    assert average.dtype == torch.float32
    times = [20_000, *range(20_010, 40_001, 10)]
    expected = power_average([1.0] + [1.5] * 2000, times, float(gamma_from_sigma_rel(0.1)))
    assert average.item() == pytest.approx(expected, rel=1e-5)
    assert average.item() > 1.45


def test_parameters_of_mixed_dtypes_are_tracked_together(folder):
    """torch's averaged model raises for a float32 average of a bfloat16 model."""
    model = nn.ModuleDict(
        {
            str(i): Scalar(1.0 + i, dtype)
            for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        }
    )
    with Tracker(model, folder, every=1, dtype="float32", on_error="raise") as tracker:
        tracker.step()
    result = synthesize(folder, 0.07)
    assert {name: values.item() for name, values in result.items()} == pytest.approx(
        {f"{i}.w": 1.0 + i for i in range(4)}
    )


# ---- what is averaged and what is copied


def test_buffers_and_frozen_parameters_are_copied_never_averaged(folder):
    """Averaged counters read 130 at step 100, and summed BatchNorm variances turn negative, in peers."""
    model = Network()
    tracker = Tracker(model, folder, every=None, on_error="raise")
    for step in range(5):
        with torch.no_grad():
            model.count.fill_(70_001 + step)
            model.norm.running_var.fill_(0.5**step)
            model.norm.num_batches_tracked.fill_(4095 + step)
            model.mask.copy_(torch.tensor([step % 2 == 0, True]))
            model.fixed.weight.fill_(1 / 3 + step)
        tracker.step()
    assert set(tracker.averages(0.04)) == {
        *("embed.weight", "norm.weight", "norm.bias", "module.weight", "module.bias", "gain")
    }
    tracker.snapshot()
    tracker.close()
    for sigma_rel in (0.04, 0.07, 0.15, 0):
        result = synthesize(folder, sigma_rel)
        assert result["count"].item() == 70_005
        assert result["count"].dtype == np.int64
        assert result["norm.num_batches_tracked"].item() == 4099
        assert (result["norm.running_var"] == 0.5**4).all()
        assert result["mask"].tolist() == [True, True]
        assert (result["fixed.weight"] == np.float32(1 / 3 + 4)).all()
        assert "scratch" not in result


def test_tied_weights_are_averaged_once(folder):
    """timm's state_dict loop updates a tied tensor under both names: 0.19 instead of 0.10."""
    model = nn.ModuleDict({"a": Scalar(0.0), "b": Scalar(0.0)})
    model["b"].w = model["a"].w
    tracker = Tracker(model, folder, sigma_rels=(0.1,), every=None, on_error="raise")
    tracker.step()
    with torch.no_grad():
        model["a"].w.fill_(1.0)
    tracker.step()
    assert set(tracker.averages(0.1)) == {"a.w"}
    expected = power_average([0.0, 1.0], [1, 2], float(gamma_from_sigma_rel(0.1)))
    assert tracker.averages(0.1)["a.w"].item() == pytest.approx(expected, rel=1e-6)
    tracker.snapshot()
    result = synthesize(folder, 0.1)
    assert set(result) == {"a.w", "b.w"}
    assert result["a.w"] is result["b.w"]


def test_training_is_not_touched(folder):
    model = Network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    version = {name: p._version for name, p in model.named_parameters()}
    with Tracker(model, folder, every=1, on_error="raise") as tracker:
        tracker.step()
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {name: p._version for name, p in model.named_parameters()} == version
    assert all(p.grad is None for p in model.parameters())
    assert not any(a.requires_grad for a in tracker.averages(0.04).values())


def test_model_that_cannot_be_copied_is_tracked(folder):
    """ema-pytorch ends the process with status 0 when a model refuses deepcopy."""

    class Proud(Scalar):
        def __deepcopy__(self, memo):
            raise RuntimeError

    with Tracker(Proud(1.0), folder, every=1, on_error="raise") as tracker:
        tracker.step()
    assert synthesize(folder, 0.1)["w"].tolist() == [1.0]


# ---- snapshots on schedule


def test_snapshots_are_stored_when_time_passes_a_multiple(folder):
    """7 images a step divide nothing: the first step at or past each multiple of 100 stores."""
    tracker = Tracker(Scalar(), folder, every=100, clock="images", samples_per_step=7)
    for _ in range(60):
        tracker.step()
    assert tracker.time == 420
    assert tracker.store.times == [105, 203, 301, 406]
    assert tracker.store.clock == "images"
    tracker.close()


def test_step_that_passes_several_multiples_stores_once(folder):
    tracker = Tracker(Scalar(), folder, every=10, clock="images", on_error="raise")
    tracker.advance(95)
    tracker.step()
    assert tracker.store.times == [95]


def test_accumulated_micro_batches_count_together(folder):
    tracker = Tracker(Scalar(), folder, every=None, clock="images", samples_per_step=5)
    for samples in (8, 8, 3):
        tracker.advance(samples)
    tracker.step()
    assert tracker.time == 19
    tracker.step()
    assert tracker.time == 24


def test_snapshot_on_demand_is_stored_once(folder):
    model = Scalar(1.0)
    with Tracker(model, folder, every=None, on_error="raise") as tracker:
        tracker.step()
        assert len(tracker.snapshot()) == 3
        assert tracker.snapshot() == []
        assert tracker.store.times == [1]


def test_snapshot_is_aligned_with_the_last_step(folder):
    """nitrous-ema tests its counter before and after the increment: snapshots lag behind their time."""
    model = Scalar(0.0)
    tracker = Tracker(model, folder, sigma_rels=(0.28,), every=10, update_every=4, dtype="float32")
    for step in range(1, 11):
        with torch.no_grad():
            model.w.fill_(float(step))
        tracker.step()
    tracker.flush()
    gamma = float(gamma_from_sigma_rel(0.28))
    expected = power_average([4.0, 8.0, 10.0], [4, 8, 10], gamma)
    assert synthesize(folder, 0.28)["w"].item() == pytest.approx(expected, rel=1e-6)
    assert synthesize(folder, 0)["w"].item() == 10
    tracker.close()


@pytest.mark.parametrize(("raw", "times"), [("last", [4]), ("all", [2, 4]), ("none", [])])
def test_raw_weights_are_kept_as_asked(folder, raw, times):
    with Tracker(Scalar(), folder, every=2, raw=raw, on_error="raise") as tracker:
        for _ in range(5):
            tracker.step()
    store = SnapshotStore.open(folder)
    assert [r.time for r in store.records if r.sigma_rel is None] == times
    assert store.times == [2, 4]


def test_metadata_and_run_id_reach_the_store(folder):
    with Tracker(Scalar(), folder, every=1, run_id="mine", metadata={"a": "b"}) as tracker:
        tracker.step()
    store = SnapshotStore.open(folder)
    assert (store.run_id, store.metadata) == ("mine", {"a": "b"})


def test_nothing_is_made_before_the_first_step(folder):
    tracker = Tracker(Network(), folder, every=1)
    assert not folder.exists()
    tracker.close()
    assert not folder.exists()


# ---- wrong use


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma_rels": (0.3,)}, InvalidProfileError, "0.2887"),
        ({"sigma_rels": (float("nan"),)}, InvalidProfileError, "nan"),
        ({"sigma_rels": ()}, ConfigError, "one or more"),
        ({"sigma_rels": (0.1, 0.1)}, ConfigError, "different"),
        ({"every": 0}, ConfigError, "every must be a positive"),
        ({"every": 1.5}, ConfigError, "every must be a positive"),
        ({"update_every": 0}, ConfigError, "update_every"),
        ({"clock": "epochs"}, ConfigError, "clock must be"),
        ({"samples_per_step": 4}, ConfigError, "clock='images'"),
        ({"dtype": "int8"}, ConfigError, "dtype must be"),
        ({"raw": "some"}, ConfigError, "raw must be"),
        ({"on_error": "exit"}, ConfigError, "on_error must be"),
    ],
    ids=[
        "0.3",
        "nan",
        "none",
        "twice",
        *["every0", "every1.5", "update", "clock", "samples", "dtype", "raw", "error"],
    ],
)
def test_bad_option_is_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        Tracker(Scalar(), folder, **({"every": 1} | options))
    assert not folder.exists()


def test_model_without_trainable_parameters_is_refused(folder):
    with pytest.raises(TrackingError, match="nothing to average"):
        Tracker(nn.Flatten(), folder, every=1)


def test_image_clock_without_a_batch_size_is_refused_at_the_first_step(folder):
    tracker = Tracker(Scalar(), folder, every=1, clock="images")
    with pytest.raises(TrackingError, match="samples_per_step=N"):
        tracker.step()
    assert not folder.exists()


def test_snapshot_before_the_first_step_is_refused(folder):
    """cloneofsimo's loop stores at time 0, which the solver then divides by."""
    tracker = Tracker(Scalar(), folder, every=1)
    with pytest.raises(TrackingError, match="time 0 never enters"):
        tracker.snapshot()
    with pytest.raises(TrackingError, match="no average now"):
        tracker.averages(0.04)


@pytest.mark.parametrize("samples", [0, -1, 1.5, None])
def test_bad_number_of_samples_is_refused(folder, samples):
    with pytest.raises(ConfigError, match="samples must be"):
        Tracker(Scalar(), folder, every=1, clock="images").advance(samples)


def test_folder_of_another_run_is_refused_at_once(folder):
    with Tracker(Scalar(), folder, every=1) as tracker:
        tracker.step()
    with pytest.raises(
        SnapshotMismatchError, match=r"already holds run .* up to time 1.*resume=True"
    ):
        Tracker(Scalar(), folder, every=1)


def test_folder_is_locked_while_it_is_tracked(folder, monkeypatch):
    monkeypatch.setattr("posthoc_ema.store._LOCK_SECONDS", 0.05)
    tracker = Tracker(Scalar(), folder, every=1)
    tracker.step()
    state = tracker.state_dict()
    other = Tracker(Scalar(), folder, every=1, resume=True)
    with pytest.raises(SnapshotError, match="written by another process"):
        other.load_state_dict(state)
    tracker.close()
    other.load_state_dict(state)
    other.close()


# ---- errors while training


def step_twice(tracker):
    tracker.step()
    tracker.step()


def changed_shape(model):
    model.module.weight = nn.Parameter(torch.zeros(5, 4))


def replaced_module(model):
    model.module = nn.Linear(4, 4)


def removed(model):
    del model.module.bias
    model.module.register_parameter("bias", None)


def added(model):
    model.extra = nn.Linear(1, 1)


def cast(model):
    model.half()


CHANGES = {
    "reshaped": (changed_shape, "removed or reshaped"),
    "replaced": (replaced_module, "'module.weight' is another parameter"),
    "removed": (removed, "'module.bias' was removed"),
    "added": (added, "'extra.weight' is new"),
    "cast": (cast, "float16"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_model_is_refused(folder, name):
    """Peers pair by position with zip: a model that lost a parameter is averaged silently, and wrongly."""
    change, message = CHANGES[name]
    model = Network()
    with Tracker(model, folder, every=2, on_error="raise") as tracker:
        for _ in range(2):
            tracker.step()
        change(model)
        with pytest.raises(TrackingError, match=message):
            step_twice(tracker)
    assert SnapshotStore.open(folder).times == [2]


def test_error_is_logged_once_and_training_goes_on(folder, caplog):
    model = Network()
    tracker = Tracker(model, folder, every=2)
    tracker.step()
    changed_shape(model)
    with caplog.at_level(logging.ERROR, logger="posthoc_ema"):
        for _ in range(5):
            tracker.step()
    (record,) = caplog.records
    assert "tracking stopped at time 2, training goes on" in record.getMessage()
    assert "reshaped" in record.getMessage()
    tracker.close()


def test_state_of_a_failed_tracker_says_so_when_it_is_loaded(folder, caplog):
    """Otherwise a resumed run would go on counting from the moment of the failure."""
    model = Network()
    tracker = Tracker(model, folder, every=None)
    tracker.step()
    changed_shape(model)
    tracker.step()
    state = tracker.state_dict()
    tracker.close()
    caplog.clear()
    other = Tracker(Network(), folder, every=None, resume=True)
    other.load_state_dict(state)
    assert "it stays stopped" in caplog.text
    time = other.time
    other.step()
    assert other.time == time
    other.close()


def test_closed_tracker_is_not_a_failed_one(folder):
    model = Network()
    tracker = Tracker(model, folder, every=None)
    tracker.step()
    tracker.close()
    state = tracker.state_dict()
    assert state["failed"] is False


def test_full_disk_is_logged_and_tracking_goes_on(folder, caplog, monkeypatch):
    model = Scalar(1.0)
    tracker = Tracker(model, folder, every=2, dtype="float32")
    for _ in range(2):
        tracker.step()
    tracker.flush()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="posthoc_ema"):
        patch.setattr("os.pwrite", full)
        for _ in range(2):
            tracker.step()
        tracker.flush()
    (record,) = caplog.records
    assert "snapshot at time 4 not stored" in record.getMessage()
    assert "No space left" in record.getMessage()
    for _ in range(2):
        tracker.step()
    tracker.close()
    store = SnapshotStore.open(folder)
    assert store.times == [2, 6]
    assert list(store.verify()) == []
    assert not list(folder.glob(".tmp*"))
    assert synthesize(store, 0.1)["w"].item() == pytest.approx(1.0)


def test_tracker_is_closed_by_an_exception(folder):
    class Boom(Exception):
        pass

    def run():
        with Tracker(Scalar(), folder, every=1) as tracker:
            tracker.step()
            raise Boom

    with pytest.raises(Boom):
        run()
    store = SnapshotStore.open(folder)
    SnapshotStore.resume(
        folder, run_id=store.run_id, clock="steps", table=store.table, time=1
    ).close()


def test_restart_discards_what_the_folder_holds(folder):
    with Tracker(Scalar(1.0), folder, every=1) as tracker:
        for _ in range(3):
            tracker.step()
        run_id = tracker.store.run_id
    with Tracker(Scalar(2.0), folder, every=2, resume=True) as tracker:
        with pytest.raises(TrackingError, match=r"restart\(\)"):
            tracker.step()
        tracker.restart()
        for _ in range(2):
            tracker.step()
    store = SnapshotStore.open(folder)
    assert (store.times, store.run_id) == ([2], run_id)
    assert synthesize(store, 0.1)["w"].item() == 2


# ---- parameters that move


def test_reassigned_parameters_are_followed(folder):
    """load_state_dict(assign=True) replaces the Parameter objects in the middle of training."""
    model = Scalar(1.0)
    with Tracker(model, folder, every=None, sigma_rels=(0.1,), on_error="raise") as tracker:
        tracker.step()
        model.load_state_dict({"w": torch.tensor([3.0])}, assign=True)
        tracker.step()
        tracker.snapshot()
    expected = power_average([1.0, 3.0], [1, 2], float(gamma_from_sigma_rel(0.1)))
    assert tracker.averages(0.1)["w"].item() == pytest.approx(expected, rel=1e-6)


def test_no_value_is_read_from_the_device_per_step(folder):
    """ema-pytorch reads seven values per update with two averages: each waits for the accelerator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    model = Network()
    tracker = Tracker(model, folder, every=None, update_every=1, on_error="raise")
    tracker.step()
    with Count() as count:
        for _ in range(3):
            tracker.step()
    reading = ("_local_scalar_dense", "item", "_to_copy", "is_nonzero", "equal", "copy_", "clone")
    assert count.calls
    assert not [call for call in count.calls if any(word in call for word in reading)]
    averaged = len(tracker.averages(0.04))
    assert sum("lerp" in call for call in count.calls) <= 2 * 3 * averaged
    tracker.close()


@pytest.mark.parametrize("sigma_rels", [0.05, "0.07", ("0.05",), [None], (), (0.1, 0.1), None])
def test_lengths_that_are_no_list_of_numbers_are_refused(folder, sigma_rels):
    with pytest.raises(ConfigError, match="sigma_rels must be one or more different numbers"):
        Tracker(Network(), folder, every=None, sigma_rels=sigma_rels)


def test_lengths_may_be_an_array(folder):
    tracker = Tracker(Network(), folder, every=None, sigma_rels=np.array([0.05, 0.1]))
    assert tracker.sigma_rels == (0.05, 0.1)
