"""Every tracker behind the same small interface: `drive(task, folder) -> Outcome`."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from posthoc_ema import PointProfile, PowerProfile, SnapshotStore, gamma_from_sigma_rel
from posthoc_ema.averaging import power_update_weight
from posthoc_ema.codecs import FLOATING
from posthoc_ema.snapshot import TensorEntry, TensorTable
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.torch import Tracker, track

from .histories import SIGMA_RELS
from .outcomes import Outcome, Task, final_averages
from .playback import Model, Playback, evidence, run

ROOT = Path(__file__).parents[2]
FLOAT32_TOLERANCE = 1e-6
"""Largest error of an average, relative to the largest value that its parameter ever has."""
BFLOAT16_TOLERANCE = 0.02
"""8 bits, rounded stochastically at each of 60 updates: a few steps of 2^-8."""


class Driver(Protocol):
    """A tracker of some kind.

    Attributes:
        tolerance: of its averages, see FLOAT32_TOLERANCE.
        stores_at_the_end: when training ends, or is interrupted, a snapshot is stored.
    """

    tolerance: float
    stores_at_the_end: bool

    def drive(self, task: Task, folder: Path) -> Outcome:
        """Put the tracker on a training that plays the task's history; the store goes to `folder`."""
        ...


# ---- in this process


class Oracle:
    """The recurrence in NumPy, with a store of its own: no PyTorch at all."""

    tolerance = FLOAT32_TOLERANCE
    stores_at_the_end = False

    def drive(self, task, folder):
        history = task.played
        state = None
        for stop in (*task.resume_at, len(history.elapsed)):
            state = self._drive(task, folder, state, stop)
        averages = {
            (s, name): values[i].astype(np.float32)
            for name, values in state["averages"].items()
            for i, s in enumerate(SIGMA_RELS)
        }
        steps = len(history.elapsed)
        return Outcome(folder, averages, int(state["time"]), steps, {}, {})

    def _drive(self, task, folder, state, stop):
        history = task.played
        entries = {
            s.name: TensorEntry(s.name, s.shape, s.dtype, s.averaged)
            for s in history.specs
            if s.tied_to is None
        }
        aliases = {s.name: s.tied_to for s in history.specs if s.tied_to is not None}
        settings = {"clock": history.clock, "table": TensorTable(entries, aliases), "run_id": "run"}
        gammas = gamma_from_sigma_rel(SIGMA_RELS)
        if state is None:
            store = SnapshotStore.create(folder, **settings)
            zeros = {s.name: np.zeros((len(SIGMA_RELS), *s.shape)) for s in history.averaged}
            state = {"step": 0, "time": 0, "updated": 0, "averages": zeros}
        else:
            store = SnapshotStore.resume(folder, time=state["time"], **settings)
        step, updated = state["step"], state["updated"]
        averages = {name: values.copy() for name, values in state["averages"].items()}
        due = task.snapshot_steps
        with store:
            while step < stop:
                step += 1
                time = int(history.times[step - 1])
                if step % task.update_every == 0 or step in due:
                    weights = power_update_weight(gammas, time, time - updated)
                    for spec in history.averaged:
                        column = weights.reshape(-1, *[1] * len(spec.shape))
                        average = averages[spec.name]
                        average += column * (history.value(spec, step) - average)
                    updated = time
                if step in due:
                    self._store(store, history, step, time, averages)
        return {"step": step, "time": time, "updated": updated, "averages": averages}

    def _store(self, store, history, step, time, averages):
        specs = {spec.name: spec for spec in history.specs}

        def read(index, name):
            spec = specs[name]
            value = history.value(spec, step)
            if spec.averaged:
                found = value if index is None else averages[name][index]
                return np.asarray(found, np.float32)
            if spec.dtype in FLOATING:
                return value.astype(spec.dtype)
            return value

        profiles = [PowerProfile(time, s) for s in SIGMA_RELS]
        new = [
            NewAverage(profile, "float32", lambda name, i=i: read(i, name))
            for i, profile in enumerate(profiles)
        ]
        new.append(NewAverage(PointProfile(time), "float32", lambda name: read(None, name)))
        store.add(time, new, replace_raw=False)


def plain(model: nn.Module) -> nn.Module:
    return model


def _through_a_file(states):
    """What a checkpoint does to states: bytes, and back with weights_only=True."""
    memory = io.BytesIO()
    torch.save(states, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def _whole(tensor):
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().clone().numpy()


@dataclass(frozen=True)
class InProcess:
    """A `Tracker` on a model in this process.

    Attributes:
        options: arguments of `Tracker` beside those of the task.
        wrap: what is done to the model before the tracker sees it.
        hook: made by `track`, instead of a call of `step` after each step.
        in_memory: ranks whose `averages` gives all of them: "all", "first" or "none".
        tolerance: see `Driver`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[nn.Module], nn.Module] = plain
    hook: bool = False
    in_memory: str = "all"
    tolerance: float = FLOAT32_TOLERANCE
    stores_at_the_end: bool = False

    def drive(self, task, folder):
        return replace(self._parts(task, folder), untracked=self.untracked(task))

    def untracked(self, task):
        """Evidence of the same training without a tracker."""
        return self._parts(task, None).training

    def _parts(self, task, folder):
        states = None
        stops = (0, *task.resume_at, len(task.played.elapsed))
        for first, last in itertools.pairwise(stops):
            states, outcome = self._part(task, folder, states, first, last)
        return outcome

    def _part(self, task, folder, states, first, last):
        history = task.played
        inner = Model(history)
        model = self.wrap(inner)
        optimizer = Playback(inner, history)
        tracker = None
        if folder is not None:
            tracker = self._tracker(task, folder, model, optimizer, resume=states is not None)
        if states is not None:
            inner.load_state_dict(states["model"])
            optimizer.load_state_dict(states["optimizer"])
            if tracker is not None:
                tracker.load_state_dict(states["tracker"])
        torch.manual_seed(5)
        if tracker is not None and history.clock == "images":
            tracker.advance(history.elapsed[first])
        for step in run(inner.set_buffers, inner, optimizer, first, last):
            if tracker is None:
                continue
            if not self.hook:
                tracker.step()
            if history.clock == "images" and step < last:
                tracker.advance(history.elapsed[step])
        outcome = self._outcome(task, folder, tracker, inner, last)
        parts = {"model": inner, "optimizer": optimizer} | ({"tracker": tracker} if tracker else {})
        states = _through_a_file({name: part.state_dict() for name, part in parts.items()})
        if tracker is not None:
            tracker.close()
        return states, outcome

    def _tracker(self, task, folder, model, optimizer, resume):
        options = {
            "sigma_rels": SIGMA_RELS,
            "every": task.every,
            "clock": task.played.clock,
            "update_every": task.update_every,
            "dtype": "float32",
            "raw": "all",
            "run_id": "run",
            "on_error": "raise",
            "resume": resume,
            **self.options,
        }
        if self.hook:
            return track(optimizer, model, folder, **options)
        return Tracker(model, folder, **options)

    def _outcome(self, task, folder, tracker, inner, last):
        if tracker is None:
            return Outcome(Path(), {}, None, None, evidence(inner), {})
        if last == len(task.played.elapsed):
            tracker.snapshot()
        training = evidence(inner)
        averages = {}
        first = os.environ.get("RANK", "0") == "0"
        if self.in_memory == "all" or (self.in_memory == "first" and first):
            averages = {
                (s, name): _whole(tensor)
                for s in SIGMA_RELS
                for name, tensor in tracker.averages(s).items()
            }
        tracker.flush()
        if self.in_memory == "none" and first and last == len(task.played.elapsed):
            averages = final_averages(folder, tracker.time)
        return Outcome(folder, averages, tracker.time, tracker.steps, training, {})


# ---- in processes of their own


class Workers:
    """A kind of tracker in one or several processes that stay for many tasks.

    Args:
        kind: key in `worker.KINDS`.
        ranks: processes, with a gloo group over them if there is more than one or `group` is set.
        group: a gloo group even for one process.
        tolerance: see `Driver`.
        variables: further environment variables.
    """

    stores_at_the_end = False

    def __init__(self, kind, ranks=1, *, group=False, tolerance=FLOAT32_TOLERANCE, variables=None):
        self.tolerance = tolerance
        self._kind, self._ranks, self._group = kind, ranks, group or ranks > 1
        self._variables = variables or {}
        self._processes = []
        self._scratch = None

    def drive(self, task, folder):
        if not self._processes:
            self._start(folder.parent)
        request = json.dumps({"task": task.to_json(), "folder": str(folder)})
        for process in self._processes:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in self._processes]
        wrong = [answer for answer in answers if answer != "done"]
        if wrong:
            self.close()
            raise AssertionError(f"{self._kind}, {task}: {wrong}; see the standard error above")
        return Outcome.load(folder.with_name(folder.name + "-outcome"))

    def _start(self, scratch):
        variables = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(self._ranks), **self._variables}
        command = [sys.executable, "-W", "error", "-m", f"{__package__}.worker", self._kind]
        if self._group:
            command.append(str(scratch / f"meeting-{self._kind}-{self._ranks}"))
        self._processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(self._ranks)
        ]

    def close(self):
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._processes = []


class Command:
    """`phema track -- python -m tests.contract.playback`: a training that knows of no tracker."""

    tolerance = FLOAT32_TOLERANCE
    stores_at_the_end = True

    def drive(self, task, folder):
        history = task.played
        out = folder.with_name(folder.name + "-training")
        tracking = [
            *(sys.executable, "-m", "phema", "track", "--out", str(folder)),
            *("--sigma-rel", ",".join(map(repr, SIGMA_RELS)), "--every", str(task.every)),
            *("--update-every", str(task.update_every), "--dtype", "float32", "--raw", "all"),
            *("--on-error", "raise", "--report", str(out) + "-report.json"),
        ]
        if history.clock == "images":
            tracking += ["--samples-per-step", str(history.samples_per_step)]
        for stop in (*task.resume_at, len(history.elapsed)):
            training = self._train([*tracking, "--"], history, out, stop)
        untracked = InProcess().untracked(task)
        (report,) = json.loads(Path(str(out) + "-report.json").read_text())["tracked"]
        averages = final_averages(folder, int(history.times[-1]))
        return Outcome(folder, averages, report["time"], report["steps"], training, untracked)

    def _train(self, tracking, history, out, stop):
        command = [sys.executable, "-m", f"{__package__}.playback", history.name, str(out)]
        done = subprocess.run(
            [*tracking, *command, "--stop-at", str(stop)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (0, ""), done
        return json.loads((out / "evidence.json").read_text())
