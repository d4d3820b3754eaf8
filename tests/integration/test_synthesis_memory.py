"""Peak memory of a synthesis: bounded by the tile, whatever the number of snapshots and targets' files."""

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
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import posthoc_ema, scipy.linalg
store = posthoc_ema.SnapshotStore.open(sys.argv[1])
plan = posthoc_ema.plan_synthesis(store, [0.03, 0.07, 0.2], at=int(sys.argv[3]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
posthoc_ema.synthesize_to_files(store, plan, [Path(sys.argv[1]) / f"out{i}" for i in range(3)])
print(len(plan.inputs), peak() - before)
"""


def test_peak_memory_does_not_grow_with_the_number_of_snapshots(tmp_path):
    table = TensorTable({"w": TensorEntry("w", (SIZE,), "float16", True)}, {})
    values = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        for time in range(1, 33):
            profiles = [PowerProfile(time, s) for s in (0.05, 0.1)]
            store.add(time, [NewAverage(p, "float16", lambda _: values) for p in profiles])
    peaks = {}
    for at in (16, 32):
        command = [sys.executable, "-c", READER, str(tmp_path), str(ROOT), str(at)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        count, peak = run.stdout.split()
        peaks[int(count)] = float(peak)
    # A tile of 2^18 elements in float32 from 32 files at a time is 32 MiB; all files are 192 MB.
    assert peaks[64] < 90
    assert peaks[64] == pytest.approx(peaks[32], abs=25)
