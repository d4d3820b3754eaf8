"""Scripted experiments that put statements about averaging length and magnitudes to the test.

Start at `run_study`. Each study is a module with a `STUDY` record: what it asks, what it trains and
measures, what the numbers say.
"""

from __future__ import annotations

from reference_trainer.studies.records import (
    Claim,
    Guide,
    Magnitudes,
    Measurement,
    Numbers,
    Plan,
    Quality,
    Report,
    Run,
    Scale,
    Study,
    Table,
    Weights,
)
from reference_trainer.studies.running import (
    STUDIES,
    StudyResult,
    first_plan,
    run_study,
    study_named,
    to_json,
    to_markdown,
)
from reference_trainer.studies.scales import SCALES, scale_named

__all__ = [
    "SCALES",
    "STUDIES",
    "Claim",
    "Guide",
    "Magnitudes",
    "Measurement",
    "Numbers",
    "Plan",
    "Quality",
    "Report",
    "Run",
    "Scale",
    "Study",
    "StudyResult",
    "Table",
    "Weights",
    "first_plan",
    "run_study",
    "scale_named",
    "study_named",
    "to_json",
    "to_markdown",
]
