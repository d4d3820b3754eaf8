"""Cost of a synthesis against reading its files (must-show 5).

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

31 targets from 64 snapshots x 2 profiles of 10 M parameters in float16 (2.6 GB), files in the page cache.
The measure is the time that two threads need to read the same files once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import posthoc_ema
from posthoc_ema import NewAverage, PowerProfile, SnapshotStore, TensorEntry, TensorTable

ROOT = Path(posthoc_ema.__file__).parents[1]
SHAPES = [(256, 256, 3, 3)] * 14 + [(128, 128, 3, 3)] * 10 + [(256, 256)] * 4 + [(256,)] * 60
PEAK_LIMIT = 600  # MB
TARGETS = {"1 target": 1, "31 targets": 31}

WORKER = """
import json, os, resource, sys, time
sys.path.insert(0, sys.argv[2])
import numpy as np
from pathlib import Path
from posthoc_ema import SnapshotStore, plan_synthesis, synthesize_to_files

read, preadv = [0], os.preadv
def counted(descriptor, views, position):
    got = preadv(descriptor, views, position)
    read[0] += got
    return got
os.preadv = counted

start = time.perf_counter()
store = SnapshotStore.open(sys.argv[1])
plan = plan_synthesis(store, np.linspace(0.02, 0.25, int(sys.argv[4])).tolist())
planned = time.perf_counter() - start
paths = [Path(sys.argv[3]) / f"{i}.safetensors" for i in range(len(plan.sigma_rels))]
synthesize_to_files(store, plan, paths, dtype="float16")
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "plan": planned,
    "read": read[0],
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    table = TensorTable(
        {f"w{i}": TensorEntry(f"w{i}", s, "float32", True) for i, s in enumerate(SHAPES)}, {}
    )
    rng = np.random.default_rng(0)
    values = {n: rng.normal(size=e.shape).astype(np.float32) for n, e in table.entries.items()}
    with SnapshotStore.create(path / "store", clock="steps", table=table) as store:
        for t in range(1, 65):
            profiles = [PowerProfile(t * 1000, s) for s in (0.05, 0.1)]
            store.add(t * 1000, [NewAverage(p, "float16", values.__getitem__) for p in profiles])
    (path / "out").mkdir()
    return path


def read_once(paths):
    """Seconds to read the files, two at a time, into buffers that are used again."""

    def read(path):
        buffer = bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, paths))
    return time.perf_counter() - start


def test_synthesis_reads_each_file_once_and_stays_small(folder):
    store = SnapshotStore.open(folder / "store")
    paths = [store.path(record) for record in store.records]
    count = sum(int(np.prod(shape)) for shape in SHAPES)
    floor, results = [], {name: [] for name in TARGETS}
    for _ in range(3):
        floor.append(read_once(paths))
        for name, number in TARGETS.items():
            arguments = [str(folder / "store"), str(ROOT), str(folder / "out"), str(number)]
            command = [sys.executable, "-c", WORKER, *arguments]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            results[name].append(json.loads(run.stdout))
    read = statistics.median(floor)
    size = sum(path.stat().st_size for path in paths)
    print(
        f"\n{len(paths)} files of {count / 1e6:.1f} M parameters, {size / 1e9:.2f} GB, page cache,"
    )
    print(f"{os.cpu_count()} cores, NumPy {np.__version__}")
    print(f"{'':22}{'median s':>10}{'ratio':>8}{'plan s':>8}{'peak MB':>9}{'read':>7}")
    print(f"{'reading the files':22}{read:10.2f}{1:8.2f}")
    for name, runs in results.items():
        seconds, plan, peak = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "plan", "peak")
        )
        ratio = statistics.median(r["seconds"] / f for r, f in zip(runs, floor, strict=True))
        times_read = runs[0]["read"] / (2 * count * len(paths))
        print(f"{name:22}{seconds:10.2f}{ratio:8.2f}{plan:8.2f}{peak:9.0f}{times_read:7.3f}")
    for runs in results.values():
        for run in runs:
            assert run["peak"] < PEAK_LIMIT
            assert run["read"] == 2 * count * len(paths)  # every byte of the data once
