"""Every tracker meets every law; what one cannot meet stands in table.EXCEPTIONS, with the reason.

Here are the trackers that need no process of their own; the others are in test_contract_processes.py.
"""

from __future__ import annotations

import pytest

from .laws import LAWS, Case
from .table import EXCEPTIONS, HERE, TRACKERS, table


@pytest.mark.parametrize(("tracker", "law", "task"), list(table(HERE)))
def test_tracker_meets_law(drive, tracker, law, task):
    law(Case(TRACKERS[tracker], task, drive(tracker, task), lambda other: drive(tracker, other)))


def test_exceptions_are_of_trackers_and_laws_that_exist():
    laws = {law.__name__ for law in LAWS}
    assert all(tracker in TRACKERS and law in laws for tracker, law in EXCEPTIONS)
