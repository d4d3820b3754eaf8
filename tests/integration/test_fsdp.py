"""Sharded models (FSDP2, HSDP, tensor parallelism) on real ranks: the store is that of one process.

Must-show 3: snapshots and synthesized weights are bit-equal to the run of one process, and a run of four
ranks goes on with two, or one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, synthesize
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.state_files import load_state, saved_states

from .sharded_models import CODECS, OPTIONS, drive, make_odd, train

PROGRAM = Path(__file__).with_name("sharded_ranks.py")


def run_ranks(world, folder, *scenarios, kills=0):
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [sys.executable, PROGRAM, str(world), str(folder), *scenarios],
        env={**os.environ, **quiet, "KILLS": str(kills)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def told(folder, scenario):
    """What each rank of a scenario found."""
    paths = sorted(folder.glob(f"{scenario}-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def files(store):
    """Name -> content of the files of a store; neither locks nor states."""
    return {
        path.name: path.read_bytes()
        for path in store.iterdir()
        if path.is_file() and path.name != ".lock"
    }


def same_store(found, expected):
    found, expected = files(found), files(expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Stores of one process: each codec; twelve steps; real training."""
    folder = tmp_path_factory.mktemp("one")
    for codec in CODECS:
        with Tracker(make_odd(), folder / codec, dtype=codec, **OPTIONS) as tracker:
            drive(tracker._model.module, tracker, 7)
    with Tracker(make_odd(), folder / "twelve", **OPTIONS) as tracker:
        drive(tracker._model.module, tracker, 12)
    options = {**OPTIONS, "every": 8, "keep": 4, "raw": "all", "clock": "images"}
    with Tracker(make_odd(), folder / "thinned", samples_per_step=4, **options) as tracker:
        drive(tracker._model.module, tracker, 12)
    model = make_odd()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with track(optimizer, model, folder / "training", **OPTIONS) as tracker:
        for step in range(8):
            train(model, optimizer, 1, start=step)
            with torch.no_grad():
                model(torch.tensor([1, 2, 3]))
        tracker.snapshot()
        tracker.step()
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    scenarios = ["fsdp_codecs", "hybrid", "two_dimensions", "slices_of_a_mesh", "training"]
    scenarios += ["interrupted", "resumed_wrongly", "taken_folder", "one_rank_fails"]
    scenarios += ["different_models", "different_times", "unwritable_parts", "thinned"]
    scenarios += ["evaluating", "memory", "rewound", "destroyed_group"]
    run_ranks(4, folder, *scenarios)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, four):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(four / "dcp", folder / "dcp")
    for name in ("resumed_from_dcp", "resumed_from_files", "resumed_split", "resumed_two"):
        shutil.copytree(four / "interrupted", folder / name)
    scenarios = ["fsdp_codecs", "resumed_from_dcp", "resumed_from_files", "resumed_split"]
    scenarios += ["different_batches", "one_rank_takes_a_snapshot"]
    run_ranks(2, folder, *scenarios, "absent_rank")
    return folder


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_snapshots_are_those_of_one_process(request, one, ranks, codec):
    store = request.getfixturevalue(ranks) / "fsdp_codecs" / codec
    same_store(store, one / codec)
    expected = synthesize(one / codec, 0.1)
    for name, values in synthesize(store, 0.1).items():
        np.testing.assert_array_equal(values, expected[name], strict=True)


@pytest.mark.parametrize("scenario", ["hybrid", "two_dimensions", "slices_of_a_mesh"])
def test_meshes_of_two_dimensions_are_stored_as_one_process_would(four, one, scenario):
    same_store(four / scenario, one / "delta")


def test_budgets_and_raw_weights_are_those_of_one_process(four, one):
    same_store(four / "thinned", one / "thinned")


def test_averages_are_swapped_into_shards(four, one):
    model = make_odd()
    with Tracker(model, four.parent / "swapped", **OPTIONS) as tracker:
        drive(model, tracker, 6)
        expected = {}
        for name, sigma_rel in (("tracked", 0.04), ("stored", 0.1)):
            with tracker.swapped(sigma_rel=sigma_rel), torch.no_grad():
                expected[name] = model(torch.tensor([1, 2, 3, 4])).tolist()
    assert told(four, "evaluating") == [expected] * 4
    same_store(four / "evaluating", one / "delta")


def test_averages_of_shards_live_in_host_memory_or_are_rounded(four, one):
    same_store(four / "memory" / "offloaded", one / "delta")
    sums = told(four, "memory")
    exact = synthesize(one / "float32", 0.15)["large"]
    assert sums == [pytest.approx(exact.sum(dtype=float), abs=np.sqrt(exact.size) * 2**-8)] * 4


def test_a_tracker_goes_back_and_starts_anew(four, one):
    assert told(four, "rewound") == [[3, 6]] * 4
    same_store(four / "rewound", one / "delta")


def test_a_rank_that_is_missing_is_said_in_time(two):
    first = told(two, "absent_rank")[0]
    assert "did not all come to the first step of the tracker within 2 s" in first["told"]
    assert "Make the tracker on every rank" in first["told"]
    assert first["seconds"] < 30


def test_replicas_of_a_shard_are_written_once(four, one):
    found = told(four, "hybrid")
    assert [rank["large"] for rank in found] == [True, True, False, False]
    assert [rank["norm.running_mean"] for rank in found] == [True, False, False, False]


def test_rows_that_are_cut_twice_are_strided_shards(four):
    found = told(four, "two_dimensions")[0]
    assert "_StridedShard" in found["narrow.weight"]
    assert found["large"] == "(Shard(dim=0), Shard(dim=1))"


def test_training_is_tracked_as_in_one_process(four, one):
    """Gathered weights between the steps do not matter: what is tracked is the shards."""
    same_store(four / "training", one / "training")
    for rank in told(four, "training"):
        assert rank == {"gathered": True, "kind": "DTensor", "stored": [8, 8, 8]}


@pytest.mark.parametrize("scenario", ["resumed_from_dcp", "resumed_from_files", "resumed_split"])
def test_four_ranks_go_on_as_two(two, one, scenario):
    same_store(two / scenario, one / "twelve")
    assert told(two, scenario)[0] in ({"time": 12, "steps": 12}, None)


def test_four_ranks_go_on_as_one(four, one, tmp_path):
    folder = Path(shutil.copytree(four / "interrupted", tmp_path / "store"))
    model = make_odd()
    with Tracker(model, folder, resume=True, **OPTIONS) as tracker:
        (saved,) = saved_states(folder / "state")
        assert len(saved.paths) == 4
        tracker.load_state_dict(load_state(saved, tracker._model.averaged()))
        drive(model, tracker, 7, start=5)
    same_store(folder, one / "twelve")


def test_the_part_of_another_rank_is_refused(four):
    first, *others = told(four, "resumed_wrongly")
    assert first == {"split": None, "fsdp": None}
    for number, rank in enumerate(others, start=1):
        for message in rank.values():
            assert "are the part of rank 0, (2, 17, 129) from (0, 0, 0) on; " in message
            assert f"rank {number} holds" in message


def test_all_ranks_hear_why_the_first_cannot_begin(four):
    for rank in told(four, "taken_folder"):
        assert "holds snapshots, but training starts at time 0" in rank["told"]
        assert rank["seconds"] < 30


def test_all_ranks_stop_when_one_does(four):
    """Nobody waits for the rank that has stopped, and what was stored before stays."""
    for number, rank in enumerate(told(four, "one_rank_fails")):
        prefix = "" if number == 1 else "rank 1: "
        assert rank["failure"].startswith(
            f"{prefix}parameter 'narrow.bias' was removed or reshaped"
        )
        assert rank["times"] == [3]


def test_ranks_that_differ_are_refused(four):
    for rank in told(four, "different_models"):
        assert "tensor '0.large' has shape None on rank 1 and [67, 129] on rank 0" in rank["told"]
    for rank in told(four, "different_times"):
        assert "every is 4 on rank 1 and 3 on rank 0" in rank["told"]


def test_clocks_that_differ_stop_all_ranks(two):
    for less, equal in told(two, "different_batches"):
        assert less.startswith("time is 11 on rank 1 and 8 on rank 0: give `advance` the global")
        assert equal.startswith("rank 1 came to time 12 by other times than the first rank: give")
    for name in ("less", "equal"):
        assert SnapshotStore.open(two / "different_batches" / name).times == []


def test_a_snapshot_of_one_rank_says_for_whom_it_waits(two):
    first, second = told(two, "one_rank_takes_a_snapshot")
    late, absent = first["said"]
    assert late == absent
    assert "a snapshot is waiting for ranks [1] for 0 s; `snapshot` is for all" in late
    assert first["stored"] == second["stored"] > 0
    assert "does not answer (waiting for ranks [1]: " in first["told"]
    assert "call `snapshot` on every rank" in first["told"]
    assert first["seconds"] < 20
    assert second["said"] == []


def test_parts_that_cannot_be_written_cost_one_snapshot(four):
    for rank in told(four, "unwritable_parts"):
        assert rank == {"failure": None, "times": [6], "left": []}


def test_the_last_snapshot_outlives_the_process_group(four, one):
    assert [rank["times"] for rank in told(four, "destroyed_group")] == [[3, 6]] * 4
    expected = SnapshotStore.open(one / "delta")
    store = SnapshotStore.open(four / "destroyed_group")
    assert store.records == expected.records
    assert list(store.verify()) == []


def test_a_rank_that_dies_does_not_hang_the_others(tmp_path):
    run_ranks(3, tmp_path, "dying_rank")
    found = told(tmp_path, "dying_rank")
    assert len(found) == 2
    for rank in found:
        assert rank["told"].startswith("TrackingError: another rank has ended")
        assert rank["seconds"] < 30
    assert SnapshotStore.open(tmp_path / "dying_rank").times == [3]


def test_ranks_that_are_killed_go_on_bit_by_bit(tmp_path):
    """Two kills at random moments: the store is always readable, and in the end that of one process."""
    run_ranks(2, tmp_path, "killed", kills=2)
    model = make_odd()
    with Tracker(model, tmp_path / "one", **{**OPTIONS, "every": 2}) as tracker:
        drive(model, tracker, 30)
    same_store(tmp_path / "killed", tmp_path / "one")
    assert list((tmp_path / "killed").glob(".parts-*")) == []
    assert told(tmp_path, "killed")[0][1] >= 6  # where the last start went on
