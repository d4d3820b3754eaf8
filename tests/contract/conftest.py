"""The trackers, put on tasks; what came of it is kept for all laws."""

from __future__ import annotations

import itertools

import pytest

from .outcomes import Task
from .table import TRACKERS
from .trackers import Workers


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
