from __future__ import annotations

import inspect
from pathlib import Path

import posthoc_ema.errors as errors

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"


def test_every_class_is_on_the_page():
    """Its messages are checked by tests/integration/test_docs.py."""
    page = PAGE.read_text("utf-8")
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert [
        c.__name__ for c in classes if c.__module__ == errors.__name__ and c.__name__ not in page
    ] == []
