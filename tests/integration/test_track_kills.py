"""A zero-code run that is killed at random moments loses one snapshot at most, and ends bit-equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import posthoc_ema as pe
from posthoc_ema.tensor_files import TensorFile
from posthoc_ema.torch.state_files import saved_states

from .conftest import environment

SCRIPT = Path(__file__).parents[1] / "scripts/resumable.py"
STEPS = 600
EVERY = 7


class Killer:
    """One run after the other, killed and started again until it is through.

    Args:
        folder: for the runs.
        seed: of the moments.
    """

    def __init__(self, folder, seed):
        self._folder = folder
        self._random = random.Random(seed)
        self._number = 0
        self.folder = folder / "0"
        self.kills = 0
        self.completed = []
        self.early = 0
        self.lost = set()
        self._first = 0

    def start(self):
        """Start the run of now, or go on with it; returns when training begins."""
        checkpointed = (self.folder / "training/checkpoint.pt").exists()
        # A training that had no checkpoint yet begins anew, and its snapshots are discarded.
        again = [] if checkpointed else ["--restart"]
        command = [sys.executable, "-m", "phema", "track", "--out", self.folder / "snapshots"]
        command += ["--every", str(EVERY), "--keep", "all", *again, "--"]
        command += [sys.executable, SCRIPT, self.folder / "training", "--steps", str(STEPS)]
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment(PYTHONWARNINGS="default"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        line = process.stdout.readline()
        assert line.startswith("training from step"), process.communicate()
        self._first = int(line.split()[-1])
        return process

    def kill_once(self):
        """Start, kill at a random moment, look at what is left; or look at the end if it came first."""
        process = self.start()
        try:
            self._wait(process)
            if process.poll() is None:
                self._kill(process)
            else:
                self._ended(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def _wait(self, process):
        """Some kills fall into the start, most into training, wherever in a step."""
        if self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, 1))
            return
        goal = self._step() + self._random.randint(1, 100)
        while self._step() < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(self._random.uniform(0, 0.02))

    def _kill(self, process):
        number = self.kills % 2
        if number == 0:
            os.killpg(process.pid, signal.SIGKILL)
        elif self._random.random() < 0.5:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()  # phema track alone: it hands the signal on
        out, err = process.communicate(timeout=60)
        if process.returncode == 0:  # the end came first
            self._check_end(err)
            return
        expected = (signal.SIGKILL, signal.SIGTERM)[number]
        assert process.returncode == -expected, (process.returncode, out, err)
        assert "Traceback" not in err, err
        self.kills += 1
        self.early += not self._check_store()

    def _check_store(self):
        """The store is whole, and holds all but the snapshot in flight; False if there is none yet."""
        folder = self.folder / "snapshots"
        if not (folder / "manifest.json").exists():
            assert self._step() <= EVERY
            return False
        store = pe.SnapshotStore.open(folder)
        broken = [p for p in store.verify() if "left by an interrupted run" not in p.what]
        assert broken == []
        due = set(range(EVERY, self._step() + 1, EVERY))
        missing = due - set(store.times)
        # One that was in flight at an earlier kill stays lost if a checkpoint was made meanwhile.
        assert missing - self.lost <= {max(due, default=0)}, (missing, self.lost, self._step())
        self.lost = missing
        return True

    def _step(self):
        return int((self.folder / "training/progress").read_bytes())

    def _ended(self, process):
        _, err = process.communicate()
        assert process.returncode == 0, err
        self._check_end(err)

    def _check_end(self, err):
        last = err.splitlines()[-1]
        if self._first == STEPS:  # it was killed after its last checkpoint: nothing was left to do
            assert "nothing was tracked: no optimizer took a step" in last
        else:
            assert last.startswith(f"phema track: {STEPS} steps, "), err
            assert "stopped" not in last
        assert self._check_store()
        self.completed.append(self.folder)
        self.lost = set()
        self._number += 1
        self.folder = self._folder / str(self._number)

    def run(self, kills):
        """Kill so many times; then let the last run end."""
        while self.kills < kills:
            self.kill_once()
        if (self.folder / "training").exists():
            process = self.start()
            self._ended(process)
        return self


def final_bits(folder):
    """Bits of the averages in the last state, and of the weights in the last checkpoint."""
    found = {}
    state = saved_states(folder / "snapshots/state")[-1]
    assert state.time == STEPS
    for path in state.paths:
        with TensorFile(path) as file:
            for name in file.header.tensors:
                found[name] = file.read(name).tobytes()
    checkpoint = torch.load(folder / "training/checkpoint.pt", weights_only=True)
    for name, tensor in checkpoint["model"].items():
        found["weights", name] = tensor.numpy().tobytes()
    return found


@pytest.mark.parametrize(
    "kills",
    [6, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_killed_run_goes_on_and_ends_bit_equal(tmp_path, kills):
    undisturbed = Killer(tmp_path / "undisturbed", 0)
    begin = time.perf_counter()
    lanes = [Killer(tmp_path / f"lane-{seed}", seed) for seed in (1, 2)]
    with ThreadPoolExecutor(3) as threads:
        expected = threads.submit(lambda: undisturbed._ended(undisturbed.start()))
        runs = [threads.submit(lane.run, kills // 2) for lane in lanes]
        for run in (expected, *runs):
            run.result()
    reference = final_bits(undisturbed.completed[0])
    completed = [folder for lane in lanes for folder in lane.completed]
    assert len(completed) >= 2
    for folder in completed:
        assert final_bits(folder) == reference, folder
    print(
        f"{sum(lane.kills for lane in lanes)} kills, {len(completed)} runs completed, "
        f"{sum(lane.early for lane in lanes)} kills before the store was made, "
        f"{time.perf_counter() - begin:.0f} s"
    )


def command(folder, *arguments):
    """Run the script under `phema track` to its end; gives the exit code and the last line."""
    track = [sys.executable, "-m", "phema", "track", "--out", folder / "snapshots", "--every", "7"]
    done = subprocess.run(
        [*map(str, track), "--", sys.executable, str(SCRIPT), str(folder / "training"), *arguments],
        env=environment(PYTHONWARNINGS="default"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (("--steps", "1"), 0),
        (("--steps", "30", "--checkpoint-every", "1", "--crash-at", "1"), -signal.SIGKILL),
    ],
    ids=["ended", "killed"],
)
def test_run_that_got_one_step_far_is_continued(tmp_path, first, code):
    """The tracker is made when the second step begins, unless a checkpoint or the end comes before."""
    assert command(tmp_path, *first)[0] == code
    returned, line = command(tmp_path, "--steps", "30")
    assert returned == 0
    assert line.startswith("phema track: 30 steps, continued at 1, "), line
