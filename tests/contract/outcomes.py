"""What a tracker was asked to do and what came of it, as records that travel between processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from posthoc_ema import PointProfile, SnapshotStore
from posthoc_ema.profiles import PowerProfile

from .histories import EVERY, HISTORIES, SIGMA_RELS


@dataclass(frozen=True)
class Task:
    """One drive of a tracker through a history.

    Attributes:
        history: its name.
        update_every: updates on every n-th step only.
        resume_at: after so many steps all but the states is thrown away, and the run goes on from them.
    """

    history: str
    update_every: int = 1
    resume_at: tuple[int, ...] = ()

    @property
    def played(self):
        return HISTORIES[self.history]

    @property
    def every(self):
        """Between snapshots, in clock units."""
        return EVERY * self.played.samples_per_step if self.played.samples_per_step else 1000

    @property
    def snapshot_steps(self):
        """Steps after which a snapshot is due, and the last, after which one is asked for."""
        passed = self.played.times // self.every
        due = np.flatnonzero(np.diff(passed, prepend=0)) + 1
        return sorted({*due.tolist(), len(passed)})

    def update_steps(self, last):
        """Steps after which the averages are updated, up to `last`, where they are looked at."""
        regular = range(self.update_every, last + 1, self.update_every)
        return sorted({*regular, *(s for s in self.snapshot_steps if s < last), last})

    @staticmethod
    def from_json(text):
        fields = json.loads(text)
        return Task(**fields | {"resume_at": tuple(fields["resume_at"])})

    def to_json(self):
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Outcome:
    """What a tracker made of a task.

    Attributes:
        folder: the store.
        averages: those in memory after the last step, (sigma_rel, name) -> float32; empty if they are
            out of reach there.
        time: the tracker's clock after the last step; None for a run without a tracker.
        steps: steps it counted, likewise.
        training: `playback.evidence` after the last step of the tracked run.
        untracked: the same of a run without a tracker.
    """

    folder: Path
    averages: dict
    time: int | None
    steps: int | None
    training: dict
    untracked: dict

    def save(self, path):
        arrays = {f"{s!r} {name}": values for (s, name), values in self.averages.items()}
        np.savez(path.with_suffix(".npz"), **arrays)
        rest = replace(self, averages={}, folder=str(self.folder))
        path.with_suffix(".json").write_text(json.dumps(asdict(rest)))

    @staticmethod
    def load(path):
        with np.load(path.with_suffix(".npz")) as arrays:
            pairs = [(key.split(" ", 1), arrays[key]) for key in arrays.files]
        averages = {(float(s), name): values for (s, name), values in pairs}
        rest = json.loads(path.with_suffix(".json").read_text())
        return Outcome(**rest | {"averages": averages, "folder": Path(rest["folder"])})


@dataclass(frozen=True)
class Stored:
    """One stored average, read back.

    Attributes:
        averaged: name -> float32.
        copied: name -> bits as stored.
    """

    averaged: dict
    copied: dict


def read_store(folder):
    """All that a store holds: (time, sigma_rel or None for raw weights) -> Stored; and its table."""
    found = {}
    with SnapshotStore.open(folder) as store:
        for record in store.records:
            assert isinstance(record.profile, PowerProfile | PointProfile)
            averaged, copied = {}, {}
            with store.read(record) as reader:
                for entry in store.table.entries.values():
                    if entry.averaged:
                        size = int(np.prod(entry.shape, dtype=np.int64))
                        values = reader.values(entry, 0, size).astype(np.float32)
                        averaged[entry.name] = values.reshape(entry.shape)
                    else:
                        copied[entry.name] = reader.copy(entry)
            found[record.time, record.sigma_rel] = Stored(averaged, copied)
        return found, store.table


def final_averages(folder, time):
    """Averages of the snapshot at `time`, as `Outcome.averages`."""
    stored, _ = read_store(folder)
    return {
        (s, name): values for s in SIGMA_RELS for name, values in stored[time, s].averaged.items()
    }
