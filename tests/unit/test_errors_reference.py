"""The page of errors quotes messages that the code really has, and shows every class."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import posthoc_ema.errors as errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8")


def spoken():
    """All source text, with string literals over several lines joined and their f"{...}" cut out."""
    texts = []
    for package in ("posthoc_ema", "cli/phema", "reference_trainer"):
        texts += [path.read_text("utf-8") for path in sorted((ROOT / package).rglob("*.py"))]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))
    return joined.replace("{MANIFEST}", "manifest.json").replace("\\'", "'")


def test_every_quoted_message_is_in_the_code():
    source, missing = spoken(), []
    quoted = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
    assert len(quoted) > 60
    for message in quoted:
        message = message.removeprefix("manifest.json: ")
        parts = [part.strip() for part in message.split("...")]
        missing += [part for part in parts if part and part not in source]
    assert missing == []


def test_every_class_is_on_the_page():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    for cls in classes:
        if cls.__module__ == errors.__name__:
            assert cls.__name__ in PAGE
