"""The laws of test_contract.py, met by trackers in processes of their own: ranks, commands."""

from __future__ import annotations

import pytest

from .laws import Case
from .table import ELSEWHERE, TRACKERS, table


@pytest.mark.parametrize(("tracker", "law", "task"), list(table(ELSEWHERE)))
def test_tracker_meets_law(drive, tracker, law, task):
    law(Case(TRACKERS[tracker], task, drive(tracker, task), lambda other: drive(tracker, other)))
