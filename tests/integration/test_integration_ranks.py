"""The callbacks under DDP, two ranks each: the first one tracks and writes, all of them see the averages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posthoc_ema import SnapshotStore, synthesize

PROGRAM = Path(__file__).with_name("framework_ranks.py")


# Lightning forks its ranks from a process that has threads already, and one run in many hangs there.
LIGHTNING = pytest.param("lightning", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[LIGHTNING, "transformers"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, PROGRAM, request.param, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def told(folder, name):
    """What each rank saw, by rank."""
    paths = sorted(folder.glob(f"{name}-*-[01].json"))
    by_length = {}
    for path in paths:
        _, steps, rank = path.stem.rsplit("-", 2)
        by_length.setdefault(int(steps), {})[int(rank)] = json.loads(path.read_text())
    return by_length


@pytest.mark.parametrize("name", ["first", "split"])
def test_all_ranks_see_the_same_average(run, name):
    for ranks in told(run, name).values():
        assert ranks.keys() == {0, 1}
        assert ranks[0] == ranks[1]
        assert len(ranks[0]["seen"]) >= 1
    whole = told(run, "whole")
    for steps, ranks in whole.items():
        resumed = told(run, name)[steps][0]
        assert resumed["time"] == ranks[0]["time"]
        assert resumed["seen"][-1] == ranks[0]["seen"][-1]


@pytest.mark.parametrize("name", ["first", "split"])
def test_a_run_that_was_resumed_stores_what_one_without_a_stop_does(run, name):
    expected, found = SnapshotStore.open(run / "whole"), SnapshotStore.open(run / name)
    assert found.times == expected.times
    assert not list(found.verify())
    for at in expected.times:
        a, b = synthesize(expected, 0.1, at), synthesize(found, 0.1, at)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[n], b[n]) for n in a)
