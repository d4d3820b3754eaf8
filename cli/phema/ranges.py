"""Parsers of `plan` and `prune`: ranges of lengths and sizes; and the lengths that their tables show."""

from __future__ import annotations

import re
from pathlib import Path

from phema.options import parse_sigma_rels
from posthoc_ema import ConfigError

_SHOWN = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.10, 0.13, 0.16, 0.20, 0.25)
_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BINARY = {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}


def parse_range(text: str) -> tuple[float, float]:
    """Parse `LO,HI`.

    Raises:
        ConfigError: it is malformed or falls.
        InvalidProfileError: a length lies outside the family.
    """
    values = parse_sigma_rels(text)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or 0.0 in values or values[0] > values[1]:
        raise ConfigError(f"--range must be two rising lengths such as 0.03,0.20, got {text}.")
    return values[0], values[1]


def parse_size(text: str) -> float:
    """Bytes of `20GB`, `500 MB` or `1.5TiB`.

    Raises:
        ConfigError: it is malformed.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = {**_UNITS, **_BINARY}.get(found[2] or "b") if found else None
    if found is None or unit is None:
        raise ConfigError(f"--max-size must be a size such as 20GB or 500MiB, got {text!r}.")
    return float(found[1]) * unit


def shown_lengths(low: float, high: float) -> list[float]:
    """Round lengths inside a range, and its ends."""
    return sorted({low, high, *(s for s in _SHOWN if low < s < high)})


def check_picture(out: Path | None) -> None:
    """Refuse an ending that is no picture.

    Raises:
        ConfigError: it is not one of .png, .pdf and .svg.
    """
    if out is not None and out.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out must end in .png, .pdf or .svg, got {out}.")
