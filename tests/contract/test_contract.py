"""Every tracker meets every law; what one cannot meet stands in EXCEPTIONS, with the reason."""

from __future__ import annotations

import itertools

import pytest

from .laws import LAWS, Case
from .outcomes import Task
from .trackers import BFLOAT16_TOLERANCE, Command, InProcess, Oracle, Workers

TRACKERS = {
    "oracle": Oracle(),
    "eager": InProcess({"kernel": "eager"}),
    "hook": InProcess(hook=True),
    "foreground": InProcess({"background": False}),
    "compiled": InProcess({"kernel": "compiled"}),
    "offloaded": InProcess({"device": "cpu"}),
    "bfloat16": InProcess({"average_dtype": "bfloat16"}, tolerance=BFLOAT16_TOLERANCE),
    "triton-interpreter": Workers("triton", variables={"TRITON_INTERPRET": "1"}),
    "ddp": Workers("ddp", group=True),
    "fsdp2": Workers("fsdp", group=True),
    "zero-code": Command(),
    "process-group-2": Workers("process-group", 2),
    "ddp-2": Workers("ddp", 2),
    "ddp-split-2": Workers("ddp-split", 2),
    "fsdp2-2": Workers("fsdp", 2),
    "fsdp2-4": Workers("fsdp", 4),
}

SLOW = {"process-group-2", "ddp-2", "ddp-split-2", "fsdp2-2", "fsdp2-4"}
QUICK_COMMANDS = {
    Task("impulse"),
    Task("tied"),
    Task("buffers"),
    Task("mixed-dtypes"),
    Task("scalars-and-empty"),
    Task("impulse", resume_at=(1, 13, 40)),
}
"""What is left for `make test` of the commands, each of which takes seconds; the others are slow."""

EXCEPTIONS = {
    ("oracle", "training_is_untouched"): "there is no training: the oracle reads the history",
    ("zero-code", "clocks_are_right"): "the clock is in another process; snapshots show its times",
}
FSDP_LAYOUT = "fully_shard refuses parameters that are not contiguous"
ZERO_CODE_SAMPLES = "a command does not say its batch sizes: --samples-per-step is one number"


def _reason(tracker, law, task):
    if tracker == "zero-code" and task.played.clock != "steps":
        return ZERO_CODE_SAMPLES
    if tracker.startswith("fsdp2") and task.history == "transposed":
        return FSDP_LAYOUT
    return EXCEPTIONS.get((tracker, law.__name__))


def _table():
    for tracker in TRACKERS:
        for law, tasks in LAWS.items():
            for task in tasks:
                reason = _reason(tracker, law, task)
                marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
                if tracker in SLOW or (tracker == "zero-code" and task not in QUICK_COMMANDS):
                    marks.append(pytest.mark.slow)
                parts = [task.history, f"every-{task.update_every}" * (task.update_every > 1)]
                parts += ["resumed"] * bool(task.resume_at)
                name = "-".join([tracker, law.__name__, *filter(None, parts)])
                yield pytest.param(tracker, law, task, id=name, marks=marks)


@pytest.fixture(scope="session")
def drive(tmp_path_factory):
    """drive(tracker, task) -> Outcome; each is done once, whatever the number of laws that look at it."""
    folder = tmp_path_factory.mktemp("contract")
    outcomes = {}
    numbers = itertools.count()

    def call(tracker: str, task: Task):
        if (tracker, task) not in outcomes:
            place = folder / f"{tracker}-{next(numbers)}"
            outcomes[tracker, task] = TRACKERS[tracker].drive(task, place)
        return outcomes[tracker, task]

    yield call
    for tracker in TRACKERS.values():
        if isinstance(tracker, Workers):
            tracker.close()


@pytest.mark.parametrize(("tracker", "law", "task"), list(_table()))
def test_tracker_meets_law(drive, tracker, law, task):
    law(Case(TRACKERS[tracker], task, drive(tracker, task), lambda other: drive(tracker, other)))


def test_exceptions_are_of_trackers_and_laws_that_exist():
    laws = {law.__name__ for law in LAWS}
    assert all(tracker in TRACKERS and law in laws for tracker, law in EXCEPTIONS)
