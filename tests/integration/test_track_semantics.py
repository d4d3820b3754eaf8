"""Time is one for each iteration that moves the weights, however training is written.

Each kind of training in tests/scripts/semantics.py is tracked by `track` in this process and by `phema
track` in one of its own. The averages must be those of the weights that the training itself wrote down
after each iteration; where a tracker cannot follow, it says so, and training goes on.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import posthoc_ema as pe
from posthoc_ema.torch import track

from .conftest import environment

SCRIPT = Path(__file__).parents[1] / "scripts/semantics.py"
SIGMA_RELS = (0.05, 0.2)

spec = importlib.util.spec_from_file_location("semantics", SCRIPT)
semantics = importlib.util.module_from_spec(spec)
sys.modules["semantics"] = semantics
spec.loader.exec_module(semantics)

REFUSED = {
    "unfrozen": "was float32 (6, 4), not trainable and is float32 (6, 4), trainable",
    "moved_to_double": "was float32 (6, 4), trainable and is float64 (6, 4), trainable",
    "layer_removed": "'extra.weight' is gone",
    "layer_widened": "was float32 (6, 4), trainable and is float32 (9, 4), trainable",
}
"""Trainings that cannot be followed, and what is said then; all others are."""
EVERY = 4
HALF = semantics.STEPS // 2
FOLLOWED = sorted(semantics.KINDS.keys() - REFUSED.keys())


def expected_average(history, sigma_rel, name):
    values = np.stack([weights[name].double().numpy() for weights in history])
    times = range(1, len(history) + 1)
    return pe.power_average(values, times, float(pe.gamma_from_sigma_rel(sigma_rel)))


def check_averages(found, history, sigma_rel):
    assert found.keys() == history[-1].keys()
    for name, values in found.items():
        expected = expected_average(history, sigma_rel, name)
        np.testing.assert_allclose(np.asarray(values), expected, atol=3e-6, err_msg=name)


def tracked(kind, folder, **options):
    """Run a training in this process under `track`; gives the tracker and the history."""
    torch.manual_seed(0)
    training = semantics.KINDS[kind]()
    options = {"every": EVERY, "dtype": "float32", "sigma_rels": SIGMA_RELS} | options
    tracker = track(training.optimizers, training.model, folder, **options)
    moved = (semantics.weights_of(training.model) for moved in training.iterate() if moved)
    history = list(moved)
    return tracker, history


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, as it compiles
@pytest.mark.parametrize("kind", FOLLOWED)
def test_track_follows(kind, tmp_path):
    if kind == "assigned":
        pytest.skip("a second optimizer is nothing that track was told of: see the test below")
    tracker, history = tracked(kind, tmp_path / "snapshots", on_error="raise")
    tracker.snapshot()
    tracker.flush()
    assert tracker.steps == tracker.time == len(history) == semantics.STEPS
    for sigma_rel in SIGMA_RELS:
        check_averages(tracker.averages(sigma_rel), history, sigma_rel)
        stored = pe.synthesize(tracker.store, sigma_rel, at=semantics.STEPS)
        check_averages(stored, history, sigma_rel)
    tracker.close()


def test_track_follows_assigned_parameters_of_an_optimizer_that_is_tracked_too(tmp_path):
    """`load_state_dict(assign=True)` makes new parameters; the new optimizer's steps are to be counted."""
    torch.manual_seed(0)
    model = semantics.Net()
    first = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"every": None, "sigma_rels": SIGMA_RELS, "on_error": "raise"}
    with track(first, model, tmp_path / "snapshots", **options) as tracker:
        history = []
        for _ in semantics.simple(model, first):
            history.append(semantics.weights_of(model))
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
            first.param_groups[0]["params"] = list(model.parameters())
        for sigma_rel in SIGMA_RELS:
            check_averages(tracker.averages(sigma_rel), history, sigma_rel)


@pytest.mark.parametrize("kind", REFUSED)
def test_track_refuses_with_a_sentence_and_training_goes_on(kind, tmp_path, caplog):
    with caplog.at_level(logging.ERROR, "posthoc_ema"):
        tracker, history = tracked(kind, tmp_path / "snapshots")
        tracker.snapshot()  # "layer_widened" trains on with an optimizer that `track` was not told of
    assert len(history) == semantics.STEPS
    assert tracker.stopped
    assert REFUSED[kind] in tracker.failure
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1, "an error is reported once"
    assert REFUSED[kind] in said[0].getMessage()
    tracker.flush()
    assert all(time <= HALF for time in tracker.store.times)
    for time in tracker.store.times:
        stored = pe.synthesize(tracker.store, SIGMA_RELS[0], at=time)
        averaged = {n: v for n, v in stored.items() if tracker.store.table.entries[n].averaged}
        for name, values in averaged.items():
            expected = expected_average(history[:time], SIGMA_RELS[0], name)
            np.testing.assert_allclose(values, expected, atol=3e-6)
    tracker.close()


def test_track_on_error_raise_stops_training(tmp_path):
    with pytest.raises(pe.TrackingError, match="is gone"):
        tracked("layer_removed", tmp_path / "snapshots", on_error="raise")


# ---- phema track


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """commands(kind) -> (folder, finished process), of a training under `phema track`; each runs once."""
    place = tmp_path_factory.mktemp("commands")

    def run(kind):
        folder = place / kind
        folder.mkdir()
        lengths = ",".join(map(str, SIGMA_RELS))
        options = ["--every", str(EVERY), "--sigma-rel", lengths, "--dtype", "float32"]
        command = [sys.executable, "-m", "phema", "track", *options, "--"]
        command += [sys.executable, str(SCRIPT), kind, "weights.pt"]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment(PYTHONWARNINGS="default"),
            capture_output=True,
            text=True,
            timeout=200,
        )
        return folder, done

    return functools.cache(run)


QUICK = {
    "lookahead",
    "in_backward",
    "schedule_free",
    "scaler_fused",
    "two_optimizers",
    "two_models",
    "assigned",
    "layer_widened",
}
"""What is left of the commands for `make test`, since each takes seconds; the others are slow tests."""


def commands_for(kinds):
    return [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in kinds]


@pytest.mark.parametrize("kind", commands_for(FOLLOWED))
def test_command_is_followed(kind, commands):
    folder, done = commands(kind)
    assert (done.returncode, done.stdout) == (0, f"{semantics.STEPS} iterations\n"), done.stderr
    history = torch.load(folder / "weights.pt", weights_only=True)
    assert done.stderr.splitlines()[-1].startswith(f"phema track: {semantics.STEPS} steps, "), done
    with pe.SnapshotStore.open(folder / "snapshots") as store:
        assert store.times == [4, 8, 12]
        for sigma_rel in SIGMA_RELS:
            for time in store.times:
                stored = pe.synthesize(store, sigma_rel, at=time)
                check_averages(stored, history[:time], sigma_rel)


@pytest.mark.parametrize("kind", commands_for(REFUSED))
def test_command_that_cannot_be_followed_goes_on(kind, commands):
    folder, done = commands(kind)
    assert (done.returncode, done.stdout) == (0, f"{semantics.STEPS} iterations\n"), done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("phema track: ")
    assert REFUSED[kind] in last
    with pe.SnapshotStore.open(folder / "snapshots") as store:
        assert store.times
        assert all(time <= HALF for time in store.times)


def test_command_that_trains_two_models_names_the_other(commands):
    _, done = commands("two_models")
    assert "tracking Generator; Discriminator is trained too and not tracked" in done.stderr
