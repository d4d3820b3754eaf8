"""From the name of a study to its results: plan, apply, report, write."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posthoc_ema import ConfigError
from posthoc_ema.plotting import plot_panels
from posthoc_ema.tensor_files import atomic_write, write_json
from reference_trainer.studies import (
    ema_by_config,
    ema_over_time,
    ema_under_guidance,
    ema_vs_capacity,
    ema_vs_lr,
    growth,
    per_tensor_ema,
)
from reference_trainer.studies.apply import Progress, apply
from reference_trainer.studies.records import (
    Measurement,
    Numbers,
    Plan,
    Report,
    Scale,
    Study,
    Table,
)

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (
        growth,
        ema_by_config,
        ema_over_time,
        ema_vs_lr,
        ema_vs_capacity,
        ema_under_guidance,
        per_tensor_ema,
    )
}
"""Name on the command line to study."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """A finished study.

    Attributes:
        study: which one.
        scale: at which scale.
        seeds: seeds of the runs.
        report: what was found.
        numbers: every number it rests on.
        folder: where results.json, results.md and figure.png are.
    """

    study: Study
    scale: Scale
    seeds: tuple[int, ...]
    report: Report
    numbers: Numbers
    folder: Path


def study_named(name: str) -> Study:
    """The study of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"study must be one of: {', '.join(STUDIES)}; got {name!r}. Did you mean {near!r}?"
        )
    return STUDIES[name]


def run_study(
    study: Study,
    scale: Scale,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
) -> StudyResult:
    """Train and measure what is missing, and write `OUT/NAME/`: results.json, results.md, figure.png.

    Running it again continues after a crash; when nothing is missing it only writes the results anew.

    Args:
        study: the study.
        scale: how large it is.
        out: folder of runs, numbers and results; studies share what they have in common.
        seeds: one run of each kind per seed.
        jobs: processes that work at the same time.
        device: see `reference_trainer.loop.train`.
        progress: called with (what was done, jobs done, jobs in all).

    Raises:
        ConfigError: there are no seeds or one is named twice, `jobs` is too small, or `out` holds runs
            of these names with another configuration.
        SnapshotFormatError: a file of numbers is damaged.
    """
    seeds = tuple(seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be different numbers of at least 0, got {seeds}.")
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}.")
    numbers: dict[Measurement, dict[str, float]] = {}
    plan: Plan | None = None
    while plan != (wanted := study.plan(scale, seeds, numbers)):
        plan = wanted
        numbers = apply(plan, scale, out, jobs=jobs, device=device, progress=progress)
    result = StudyResult(
        study=study,
        scale=scale,
        seeds=seeds,
        report=study.report(scale, seeds, numbers),
        numbers=numbers,
        folder=out / study.name,
    )
    write_result(result)
    return result


def write_result(result: StudyResult) -> None:
    """Write results.json, results.md and figure.png into the study's folder, atomically."""
    result.folder.mkdir(parents=True, exist_ok=True)
    write_json(result.folder / "results.json", to_json(result))
    with atomic_write(result.folder / "results.md") as descriptor:
        os.write(descriptor, to_markdown(result).encode())
    plot_panels(result.report.panels, result.folder / "figure.png")


def to_json(result: StudyResult) -> dict[str, Any]:
    """Everything that was found, and every number."""
    report = result.report
    return {
        "format": "reference_trainer study",
        "study": result.study.name,
        "scale": result.scale.name,
        "seeds": list(result.seeds),
        "settings": result.scale.settings,
        "finding": report.finding,
        "claims": [asdict(claim) for claim in report.claims],
        "tables": [asdict(table) for table in report.tables],
        "numbers": [
            {"kind": type(m).__name__.lower(), **asdict(m), "values": dict(values)}
            for m, values in result.numbers.items()
        ],
    }


def to_markdown(result: StudyResult) -> str:
    """The results for people: finding, tables, figure."""
    study, report = result.study, result.report
    seeds = ", ".join(map(str, result.seeds))
    parts = [
        f"# {study.question}",
        f"Study `{study.name}`, scale `{result.scale.name}`, seeds {seeds}.",
        f"The paper: {study.claim}",
        f"**Found.** {report.finding}",
        *(markdown_table(table) for table in report.tables),
    ]
    if any("*" in cell for table in report.tables for row in table.rows for cell in row):
        parts.append("`*`: an end of the measured range in at least one seed.")
    parts.append("Median over the seeds, in brackets the lowest and the highest.")
    parts.append("![figure](figure.png)")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table as Markdown, under its caption."""
    lines = [
        f"{table.caption}:\n",
        "| " + " | ".join(table.header) + " |",
        "|" + "---|" * len(table.header),
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return "\n".join(lines)


def first_plan(study: Study, scale: Scale, seeds: Sequence[int]) -> Plan:
    """What a study trains, and what it measures first; later measurements may build on these."""
    return study.plan(scale, tuple(seeds), {})
