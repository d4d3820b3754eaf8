"""What importing the library loads, seen from a fresh interpreter."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import posthoc_ema

ROOT = Path(posthoc_ema.__file__).parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(posthoc_ema.__path__, "posthoc_ema.")]
CORE = ["posthoc_ema", *(name for name in MODULES if not name.startswith("posthoc_ema.torch"))]
HEAVY = {"torch", "typer", "rich", "matplotlib", "huggingface_hub", "sklearn", "reference_trainer"}


def loaded_by(statement):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(run.stdout.split())


def test_importing_every_core_module_loads_nothing_heavy():
    assert not loaded_by("import " + ", ".join(CORE)) & HEAVY


def test_importing_the_tracker_loads_torch_and_nothing_else_heavy():
    assert loaded_by("import posthoc_ema.torch") & HEAVY == {"torch"}


@pytest.mark.parametrize("name", ["posthoc_ema", *MODULES])
def test_examples_in_the_docstrings_are_right(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, report=False)
    assert failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = sum(
        len(test.examples)
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
    )
    assert examples > 40
