"""Marks each test by its folder, makes NumPy strict, and offers what many tests need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

FOLDERS = ("unit", "property", "golden", "contract", "integration", "slow", "benchmarks")


def pytest_collection_modifyitems(items):
    for item in items:
        folder = Path(item.fspath).relative_to(Path(__file__).parent).parts[0]
        if folder in FOLDERS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(autouse=True)
def strict_numpy():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
