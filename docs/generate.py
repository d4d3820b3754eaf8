"""Write docs/reference/command-line.md from the help texts of `phema`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "demo",
    "track",
    "train",
    "sample",
    "evaluate",
    "synth",
    "sweep",
    "study",
    "plan",
    "prune",
    "plot",
    "ls",
    "verify",
    "convert",
    "dataset",
    "dataset convert",
    "dataset encode",
    "dataset stats",
    "reference",
    "reference make",
    "reference import",
)
PAGE = Path(__file__).parent / "reference" / "command-line.md"
INTRODUCTION = """\
# Command line

Made by `make docs` from the help texts; a test compares them.

`LIST` of sigma_rel: `0.07`, `0.05,0.10`, or a range `0.010,0.015,...,0.250` (both ends, exact
decimals); `raw` is no averaging. Exit codes: 0 done, 1 input or files are wrong (one line on stderr says
what, where, what to do), 2 usage, 130 interrupted. Progress goes to stderr, and only to a terminal.
"""


def help_text(*words: str) -> str:
    """Output of `phema WORDS --help` at 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    arguments = [sys.executable, "-m", "phema", *words, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.rstrip()


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, f"```text\n{help_text()}\n```\n"]
    parts += [f"## phema {name}\n\n```text\n{help_text(*name.split())}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
