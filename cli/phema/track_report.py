"""What `phema track` says when its command has ended: what was tracked, or why nothing was."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_FEW = 8
_PLENTY = 32
"""Snapshots of a run: with fewer than the first, averages of other lengths are poor."""


def end_lines(options: dict[str, Any], events: str) -> list[str]:
    """The lines to print, in words; with `--report` the facts are written to a file too.

    Args:
        options: values of all options.
        events: the file to which the processes of the command have appended lines.
    """
    seen = _read(events)
    reports = list(seen["report"].values())
    by_default = options.get("every") is None
    problems = list(dict.fromkeys(seen["problem"].values()))
    lines = [_line(report, by_default) for report in reports] or [_why_nothing(seen)]
    if reports:
        lines = _with_problems(lines, problems)
    if options.get("report"):
        content = {"tracked": reports, "problems": problems, "lines": lines}
        lines += _write(options["report"], content)
    return lines


def _with_problems(lines: list[str], problems: list[str]) -> list[str]:
    """What went wrong stands behind what was tracked; of several models, on lines of its own."""
    new = [problem for problem in problems if not any(problem in line for line in lines)]
    if len(lines) == 1:
        return ["; ".join([*lines, *new])]
    return [*lines, *new]


def _read(events: str) -> dict[str, dict[Any, Any]]:
    """Events by kind: process or folder -> what it said last."""
    seen: dict[str, dict[Any, Any]] = {
        kind: {} for kind in ("python", "torch", "missing", "report", "problem", "replica")
    }
    try:
        with open(events, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            lines = file.read().splitlines()
    except OSError:
        return seen
    for line in lines:
        kind, _, rest = line.partition(" ")
        pid, _, text = rest.partition(" ")
        if kind == "report":
            import json

            try:
                report = json.loads(text)
            except ValueError:  # the disk was full
                continue
            # A process that died on the way has said what it had reached at its last snapshot.
            seen[kind][pid, report["folder"]] = report
        elif kind == "problem":
            seen[kind][pid, text] = text
        elif kind in seen:
            seen[kind][pid] = text
    return seen


def _line(report: dict[str, Any], by_default: bool) -> str:
    count = f"{report['steps']} steps"
    if report["clock"] != "steps":
        count += f" ({report['time']} {report['clock']})"
    if report["continued"]:
        count += f", continued at {report['continued']}"
    stored = report["snapshots"]
    lengths = ", ".join(f"{s:g}" for s in report["sigma_rels"])
    line = (
        f"{count}, {stored} snapshot{'s' * (stored != 1)} in {_place(report['folder'])} "
        f"(sigma_rel {lengths})"
    )
    if report.get("remark"):
        line += f"; {report['remark']}"
    if report["failure"]:
        return f"{line}; tracking stopped there: {report['failure']}"
    if not report["ended"]:
        return f"at least {line}; the process was ended by force"
    if by_default and report["time"] < _FEW * report["every"]:
        every = max(1, report["time"] // _PLENTY)
        line += f"; for a run of this length --every {every} stores more"
    return line


def _place(folder: str) -> str:
    short = os.path.relpath(folder)
    return f"./{short}" if not short.startswith("..") else folder


def _why_nothing(seen: dict[str, dict[Any, Any]]) -> str:
    if seen["problem"]:
        return f"nothing was tracked: {' '.join(dict.fromkeys(seen['problem'].values()))}"
    if seen["replica"]:
        return (
            f"nothing was tracked here: {next(iter(seen['replica'].values()))}. If each rank is a "
            "training of its own, unset RANK and WORLD_SIZE."
        )
    if seen["missing"]:
        python, _, why = next(iter(seen["missing"].values())).partition("\t")
        return (
            f"nothing was tracked: {python} could not load posthoc_ema ({why}). Install it there: "
            "pip install 'posthoc-ema[torch]'."
        )
    if not seen["python"]:
        return (
            "nothing was tracked: no Python process of the command took up the hook. `python -I`, `-E` "
            "and `-S` keep it out, and so does a command that replaces PYTHONPATH or starts no Python."
        )
    count = len(seen["python"])
    processes = f"any of {count} Python processes" if count > 1 else "the Python process"
    if not seen["torch"]:
        return f"nothing was tracked: torch.optim was not imported in {processes} of the command."
    return f"nothing was tracked: no optimizer took a step in {processes} of the command."


def _write(path: str, content: dict[str, Any]) -> list[str]:
    import json

    try:
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(content, file, indent=1)
            file.write("\n")
    except OSError as error:
        return [f"--report {path}: {error.strerror}. The report was not written."]
    return []
