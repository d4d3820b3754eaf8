"""Importers: files of other tools become a store, without running anything in them."""

from __future__ import annotations

from posthoc_ema.importers.conversion import (
    KINDS,
    check_new,
    detect_kind,
    plan_import,
    write_import,
)
from posthoc_ema.importers.plans import ImportOptions, ImportPlan

__all__ = [
    "KINDS",
    "ImportOptions",
    "ImportPlan",
    "check_new",
    "detect_kind",
    "plan_import",
    "write_import",
]
