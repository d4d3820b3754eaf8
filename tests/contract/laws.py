"""The laws that every tracker meets: what is done, and what must have come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import posthoc_ema as pe

from .histories import SIGMA_RELS
from .outcomes import Outcome, Task, read_store
from .trackers import Driver


@dataclass(frozen=True)
class Case:
    """A tracker that was put on a task.

    Attributes:
        driver: the tracker.
        task: what it was put on.
        outcome: what came of it.
        other: outcome of the same tracker for another task.
    """

    driver: Driver
    task: Task
    outcome: Outcome
    other: Callable[[Task], Outcome]

    def close(self, found, sigma_rel, step):
        """Check averages, name -> values, against the closed form after `step` steps."""
        history = self.task.played
        expected = history.expected(sigma_rel, self.task.update_steps(step))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == np.float32
            assert found[name].shape == values.shape, name
            allowed = self.driver.tolerance * history.largest(name)
            error = np.abs(found[name] - values).max(initial=0.0)
            assert error <= allowed, (name, sigma_rel, step, error, allowed)

    def final(self, sigma_rel):
        """Averages after the last step: in memory if they are there, and in any case as stored."""
        stored, _ = read_store(self.outcome.folder)
        last = stored[int(self.task.played.times[-1]), sigma_rel].averaged
        memory = {n: v for (s, n), v in self.outcome.averages.items() if s == sigma_rel}
        assert memory.keys() == last.keys()
        for name, values in memory.items():
            np.testing.assert_array_equal(values, last[name], strict=True)
        return last


def averages_are_the_profile(case):
    """Each average is the closed form of the power profile over the known weights.

    For the history "impulse" it is the profile itself: number i is the weight of step i.
    """
    for sigma_rel in SIGMA_RELS:
        final = case.final(sigma_rel)
        case.close(final, sigma_rel, len(case.task.played.elapsed))
        if case.task.played.impulse:
            assert abs(final["w"].sum() - 1) <= 4 * case.driver.tolerance


def intervals_change_nothing(case):
    """However seldom the averages are updated, the weight of all steps up to an update is the same."""
    every_step = case.other(dataclasses.replace(case.task, update_every=1))
    for sigma_rel in SIGMA_RELS:
        seldom = case.final(sigma_rel)["w"].cumsum()
        often = every_step.averages[sigma_rel, "w"].cumsum()
        updates = np.asarray(case.task.update_steps(len(case.task.played.elapsed))) - 1
        assert np.abs(seldom - often)[updates].max() <= 4 * case.driver.tolerance


def resuming_changes_no_bit(case):
    """Averages, snapshots and training of a resumed run are those of one that ran through.

    A command stores a snapshot when it ends, so there is one more at each interruption.
    """
    straight = case.other(dataclasses.replace(case.task, resume_at=()))
    mine, other = case.outcome, straight
    assert mine.averages.keys() == other.averages.keys()
    for key, values in mine.averages.items():
        np.testing.assert_array_equal(values, other.averages[key], strict=True)
    assert (mine.time, mine.steps) == (other.time, other.steps)
    assert mine.training.get("parameters") == other.training.get("parameters")
    stored, table = read_store(mine.folder)
    expected, expected_table = read_store(other.folder)
    assert table == expected_table
    more = {time for time, _ in stored} - {time for time, _ in expected}
    interruptions = {int(case.task.played.times[step - 1]) for step in case.task.resume_at}
    assert more <= (interruptions if case.driver.stores_at_the_end else set())
    assert [key for key in stored if key[0] not in more] == list(expected)
    for key, snapshot in expected.items():
        for kind in ("averaged", "copied"):
            tensors, found = getattr(snapshot, kind), getattr(stored[key], kind)
            assert tensors.keys() == found.keys()
            for name, values in tensors.items():
                np.testing.assert_array_equal(found[name], values, strict=True)


def tied_weights_are_one(case):
    """Tracked and stored once, under the first name; the others are recorded and come out again."""
    names = {spec.name for spec in case.task.played.averaged}
    assert {name for _, name in case.outcome.averages} == names
    stored, table = read_store(case.outcome.folder)
    tied = {s.name: s.tied_to for s in case.task.played.specs if s.tied_to is not None}
    assert tied
    assert dict(table.aliases) == tied
    assert all(snapshot.averaged.keys() == names for snapshot in stored.values())
    result = pe.synthesize(case.outcome.folder, SIGMA_RELS[0])
    for name, first in tied.items():
        np.testing.assert_array_equal(result[name], result[first], strict=True)


def buffers_are_copied(case):
    """Buffers and frozen parameters are those of the snapshot's moment, bit for bit."""
    history = case.task.played
    copied = [s for s in history.specs if not s.averaged and s.tied_to is None]
    assert copied
    stored, table = read_store(case.outcome.folder)
    step_at = {int(time): step for step, time in enumerate(history.times, 1)}
    for (time, _), snapshot in stored.items():
        assert snapshot.copied.keys() == {spec.name for spec in copied}
        for spec in copied:
            assert table.entries[spec.name].dtype == spec.dtype
            value = history.value(spec, step_at[time]).astype(spec.dtype)
            np.testing.assert_array_equal(snapshot.copied[spec.name], value, strict=True)


def snapshots_hold_what_they_say(case):
    """Taken when they are due, each with the averages of its time and the weights as they were."""
    history = case.task.played
    stored, _ = read_store(case.outcome.folder)
    steps = case.task.snapshot_steps
    lengths = (*SIGMA_RELS, None)
    assert set(stored) == {(int(history.times[k - 1]), s) for k in steps for s in lengths}
    for step in steps:
        time = int(history.times[step - 1])
        for sigma_rel in SIGMA_RELS:
            case.close(stored[time, sigma_rel].averaged, sigma_rel, step)
        for spec in history.averaged:
            value = history.value(spec, step).astype(np.float32)
            raw = stored[time, None].averaged[spec.name]
            np.testing.assert_array_equal(raw, value, strict=True)


def clocks_are_right(case):
    """Time is the sum of what the steps took; steps are counted."""
    assert case.outcome.time == case.task.played.times[-1]
    assert case.outcome.steps == len(case.task.played.elapsed)


def training_is_untouched(case):
    """Weights, gradients, buffers, random state, grad mode, hooks and train flags are as without."""
    assert case.outcome.training
    assert case.outcome.training == case.outcome.untracked


STRAIGHT = tuple(
    Task(name)
    for name in (
        "impulse",
        "tied",
        "buffers",
        "float64",
        "float16",
        "bfloat16",
        "mixed-dtypes",
        "scalars-and-empty",
        "shapes",
        "transposed",
    )
)
FIXED_SAMPLES = (Task("impulse-fixed-samples"),)
SAMPLES = (Task("impulse-samples"), Task("impulse-samples", update_every=7))
SELDOM = (Task("impulse", update_every=7), Task("impulse", update_every=60))
RESUMED = (
    Task("impulse", resume_at=(1, 13, 40)),
    Task("shapes", update_every=7, resume_at=(30,)),
    Task("mixed-dtypes", resume_at=(7, 40)),
    Task("transposed", resume_at=(13,)),
    Task("tied", resume_at=(20,)),
    Task("buffers", resume_at=(21,)),
    Task("scalars-and-empty", resume_at=(33,)),
)
RESUMED_SAMPLES = (Task("impulse-samples", update_every=7, resume_at=(29, 51)),)

LAWS: dict[Callable[[Case], None], tuple[Task, ...]] = {
    averages_are_the_profile: (*STRAIGHT, *SELDOM, *FIXED_SAMPLES, *SAMPLES),
    intervals_change_nothing: (*SELDOM, SAMPLES[1]),
    resuming_changes_no_bit: (*RESUMED, *RESUMED_SAMPLES),
    tied_weights_are_one: (Task("tied"),),
    buffers_are_copied: (Task("buffers"),),
    snapshots_hold_what_they_say: (
        Task("impulse"),
        SELDOM[0],
        *FIXED_SAMPLES,
        *SAMPLES,
        Task("mixed-dtypes"),
    ),
    clocks_are_right: (Task("impulse"), *FIXED_SAMPLES, Task("impulse-samples"), RESUMED[0]),
    training_is_untouched: (*STRAIGHT, RESUMED[0], RESUMED[2]),
}
"""Each law and what the trackers are put on to see it."""
