"""A writer that is killed, or whose disk is full, in the middle of a snapshot: real processes, real files."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import posthoc_ema
from posthoc_ema import PowerProfile, SnapshotStore, synthesize

ROOT = Path(posthoc_ema.__file__).parents[1]

WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from posthoc_ema import *

table = TensorTable({f"w{i}": TensorEntry(f"w{i}", (50, 40), "float32", True) for i in range(8)}, {})
def average(time, sigma_rel):
    values = np.full((50, 40), time * sigma_rel, dtype=np.float32)
    return NewAverage(PowerProfile(time, sigma_rel), "float32", lambda name: values)

folder, start, end = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
limit = int(sys.argv[5])
if start:
    store = SnapshotStore.resume(folder, run_id="r", clock="steps", table=table, time=start)
else:
    store = SnapshotStore.create(folder, clock="steps", table=table, run_id="r")
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
print("ready", flush=True)
try:
    for time in range(start + 1, end + 1):
        store.add(time, [average(time, s) for s in (0.05, 0.1)])
except SnapshotWriteError as error:
    print(type(error).__name__, error, flush=True)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.add(time, [average(time, s) for s in (0.05, 0.1)])
        print("stored again", flush=True)
"""


def writer(folder, start, end, limit=0):
    arguments = [str(folder), str(ROOT), str(start), str(end), str(limit)]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def check_whole(store):
    """Times without a gap, every file right to the last bit and value."""
    assert store.times == list(range(1, len(store.times) + 1))
    assert len(store.records) == 2 * len(store.times)
    for record in store.records:
        problems = [p for p in store.verify() if p.file == record.file]
        assert problems == []
    if store.times:
        value = synthesize(store, 0.1)["w3"]
        np.testing.assert_allclose(value, 0.1 * store.times[-1], rtol=1e-5)


def test_writer_killed_at_any_moment_leaves_a_readable_store(tmp_path):
    """kill -9 at random moments; each next writer resumes where the store says, and cleans up."""
    choose, folder, start = random.Random(0), tmp_path / "s", 0
    leftovers = 0
    for _ in range(6):
        with writer(folder, start, 10**9) as process:
            time.sleep(choose.uniform(0.0, 0.25))
            process.kill()
        store = SnapshotStore.open(folder)
        check_whole(store)
        leftovers += len([p for p in store.verify() if "not listed" in p.what])
        leftovers += len(list(folder.glob(".tmp-*")))
        start = store.times[-1] if store.times else 0
        if not start:  # killed before the first snapshot: nothing to resume, the manifest is there
            with writer_at_zero(folder):
                pass
    with writer(folder, start, start + 2) as process:
        assert process.wait(60) == 0
    store = SnapshotStore.open(folder)
    assert store.times[-1] == start + 2
    assert list(store.verify()) == []
    assert not list(folder.glob(".tmp-*"))
    assert start > 3
    assert leftovers > 0


def writer_at_zero(folder):
    table = SnapshotStore.open(folder).table
    return SnapshotStore.resume(folder, run_id="r", clock="steps", table=table, time=0)


@pytest.mark.parametrize("limit", [2_000, 20_000, 64_000])
def test_full_disk_loses_nothing_and_the_run_can_go_on(tmp_path, limit):
    """A file-size limit stands for a full disk: in the manifest (2 kB) or in a snapshot (64 kB)."""
    with writer(tmp_path / "s", 0, 3) as process:
        assert process.wait(60) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with writer(tmp_path / "s", 3, 5, limit) as process:
        first, second = process.stdout.readlines()
        assert process.wait(60) == 0
    assert first.startswith("SnapshotWriteError ")
    assert "could not be written" in first
    assert "Make room" in first
    assert second == "stored again\n"
    store = SnapshotStore.open(tmp_path / "s")
    check_whole(store)
    assert store.times == [1, 2, 3, 4]
    assert list(store.verify()) == []
    assert not list((tmp_path / "s").glob(".tmp-*"))
    for name, content in before.items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "s" / name).read_bytes() == content


def test_two_writers_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("posthoc_ema.store._LOCK_SECONDS", 0.1)
    process = writer(tmp_path / "s", 0, 10**9)
    try:
        with pytest.raises(posthoc_ema.SnapshotError, match="being written by another process"):
            writer_at_zero(tmp_path / "s")
    finally:
        process.kill()
        process.communicate()
    writer_at_zero(tmp_path / "s").close()
    assert SnapshotStore.open(tmp_path / "s").find(1, PowerProfile(1, 0.1)) is None
