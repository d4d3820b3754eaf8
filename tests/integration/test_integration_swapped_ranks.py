"""`swapped` with DistributedDataParallel and FSDP2 on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("swapped_ranks.py")


def run_ranks(world, folder, *scenarios):
    """What each rank found: scenario -> list over ranks."""
    done = subprocess.run(
        [sys.executable, PROGRAM, str(world), str(folder), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swapped")
    scenarios = (
        *("replicas", "split_averages", "sharded_model", "first_rank_alone", "nothing_to_send"),
        "training_goes_on",
    )
    return {
        **run_ranks(1, tmp_path_factory.mktemp("one"), "one_process_of"),
        **run_ranks(2, folder, *scenarios),
    }


@pytest.mark.parametrize("scenario", ["replicas", "split_averages", "sharded_model"])
def test_all_ranks_see_the_average_of_one_process(found, scenario):
    (expected,) = found["one_process_of"]
    assert len({expected[name] for name in ("before", "tracked", "other", "now")}) == 4
    assert expected["after"] == expected["before"]
    assert expected["training"]
    assert found[scenario] == [expected, expected]


def test_the_first_of_the_replicas_can_evaluate_alone(found):
    first, second = found["first_rank_alone"]
    assert first == ["entered", "entered"]
    assert all("on all ranks with broadcast=True" in message for message in second)


def test_replicas_are_told_when_there_is_no_average(found):
    first, second = found["nothing_to_send"]
    assert "from the first step on" in first
    assert "rank 0 has no average to send" in second


def test_fsdp_trains_on_as_without_evaluation(found):
    for evaluated, plain in found["training_goes_on"]:
        assert evaluated == plain
