"""Marks each test by its folder, makes NumPy strict, and offers what many tests need."""

from __future__ import annotations

import os
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


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def not_launched():
    """Frameworks leave what torchrun sets in the environment; the next test is not of that job."""
    before = {name: os.environ.get(name) for name in LAUNCHED}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def rng():
    return np.random.default_rng(0)
