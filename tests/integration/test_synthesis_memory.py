"""Anonymous memory of a synthesis: bounded by the tile, whatever the number of snapshots and targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import posthoc_ema
from posthoc_ema import NewAverage, PowerProfile, SnapshotStore, TensorEntry, TensorTable

ROOT = Path(posthoc_ema.__file__).parents[1]
SIZE = 1_500_000  # elements: 3 MB as float16, so 64 files hold 192 MB

READER = """
import sys, threading
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import importlib, numpy, posthoc_ema, scipy.linalg
if sys.argv[4] == "torch":
    import posthoc_ema.torch.arithmetic
combine = importlib.import_module("posthoc_ema.synthesis.combine")
if sys.argv[5] == "cold":
    combine.is_cold = lambda *_: True

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) / 1024 for l in file if l.startswith("RssAnon"))

store = posthoc_ema.SnapshotStore.open(sys.argv[1])
lengths = numpy.linspace(0.03, 0.2, int(sys.argv[6])).tolist()
plan = posthoc_ema.plan_synthesis(store, lengths, at=int(sys.argv[3]))
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
paths = [Path(sys.argv[1]) / f"out{i}" for i in range(len(lengths))]
posthoc_ema.synthesize_to_files(store, plan, paths)
done.set()
watcher.join()
print(len(plan.inputs), peak[0] - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory")
    table = TensorTable({"w": TensorEntry("w", (SIZE,), "float16", True)}, {})
    values = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    with SnapshotStore.create(path, clock="steps", table=table) as store:
        for time in range(1, 33):
            profiles = [PowerProfile(time, s) for s in (0.05, 0.1)]
            store.add(time, [NewAverage(p, "float16", lambda _: values) for p in profiles])
    return path


@pytest.mark.parametrize("arithmetic", ["numpy", "torch"])
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_memory_does_not_grow_with_the_number_of_snapshots(folder, arithmetic, cache):
    peaks = {}
    for at in (16, 32):
        arguments = [str(folder), str(ROOT), str(at), arithmetic, cache, "3"]
        command = [sys.executable, "-c", READER, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        count, peak = run.stdout.split()
        peaks[int(count)] = float(peak)
    # Blocks read ahead take 128 MiB at most; all 64 files are 192 MB.
    assert peaks[64] < (90 if cache == "warm" else 190)
    if cache == "warm":
        assert peaks[64] == pytest.approx(peaks[32], abs=25)


def test_memory_does_not_grow_with_the_number_of_targets_beyond_a_tile(folder):
    command = [sys.executable, "-c", READER, str(folder), str(ROOT), "32", "numpy", "warm", "40"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # 40 results are 240 MB as float32.
    assert float(run.stdout.split()[1]) < 130
