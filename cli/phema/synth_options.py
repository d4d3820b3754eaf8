"""Parsers of the options that only `phema synth` has."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from phema.options import parse_sigma_rels
from posthoc_ema import ConfigError
from posthoc_ema.classical_profiles import ExponentialProfile, UniformProfile
from posthoc_ema.synthesis.checkpoints import Target


def parse_overrides(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Parse `PATTERN=SIGMA_REL` options.

    Raises:
        ConfigError: one is malformed.
        InvalidProfileError: a length lies outside the family.
    """
    found = []
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern or "," in value:
            raise ConfigError(
                f"--override {text!r}: write PATTERN=SIGMA_REL, as in 'decoder.*=0.05'."
            )
        found.append((pattern, parse_sigma_rels(value)[0]))
    return found


def parse_times(option: str, text: str, known: Sequence[int]) -> set[int]:
    """Parse TIMES: numbers, and ranges START:END of what is there (both ends, each may be left out).

    Raises:
        ConfigError: it is malformed, or a range holds nothing.
    """
    found: set[int] = set()
    for item in text.split(","):
        first, colon, last = (part.strip() for part in item.partition(":"))
        if not colon:
            found.add(_whole(option, text, first))
            continue
        low = _whole(option, text, first) if first else 0
        high = _whole(option, text, last) if last else max(known, default=0)
        inside = {t for t in known if low <= t <= high}
        if not inside:
            raise ConfigError(f"{option} {text}: there is no time from {low} to {high}.")
        found |= inside
    return found


def parse_time_list(text: str) -> list[int]:
    """Parse `--times`: whole numbers with commas.

    Raises:
        ConfigError: it is malformed.
    """
    return [_whole("--times", text, item.strip()) for item in text.split(",")]


def _whole(option: str, text: str, item: str) -> int:
    if not (item.isascii() and item.isdigit()):
        example = "100,200,300" if option == "--times" else "1000,2000 or 5000:9000"
        raise ConfigError(f"{option} {text!r}: {item!r} is not a whole number; write {example}.")
    return int(item)


def parse_profiles(texts: Sequence[str], end: int) -> list[Target]:
    """Parse `--profile`: uniform:START,END (END may be left out) and half-life:H.

    Args:
        texts: the options.
        end: time at which averages end.

    Raises:
        ConfigError: one is malformed or ends too late.
        InvalidProfileError: its numbers make no profile.
    """
    return [_target(text, end) for text in texts]


def _target(text: str, end: int) -> Target:
    kind, _, rest = text.partition(":")
    numbers = [_number(text, item) for item in rest.split(",")] if rest else []
    if kind == "uniform" and len(numbers) in (1, 2):
        start, stop = (*numbers, float(end))[:2]
        if stop > end:
            raise ConfigError(
                f"--profile {text} ends after the last checkpoint, which is of {end}."
            )
        name = f"{start:g}-{stop:g}"
        return Target(
            UniformProfile(start, stop), f"uniform {name}", f"uniform-{name}-at-{end}", None
        )
    if kind == "half-life" and len(numbers) == 1:
        profile, name = ExponentialProfile(end, numbers[0]), f"{numbers[0]:g}"
        return Target(profile, f"half-life {name}", f"half-life-{name}-at-{end}", None)
    raise ConfigError(f"--profile {text!r}: write uniform:START,END or half-life:H.")


def _number(text: str, item: str) -> float:
    try:
        value = float(item)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--profile {text!r}: {item!r} is not a number.")
    return value


def parse_part(text: str | None, num_files: int) -> tuple[int, int]:
    """Parse `--part`: I/N with I from 1 to N, or `torchrun` for RANK and WORLD_SIZE of this process.

    Returns:
        (I - 1, N); (0, 1) without the option.

    Raises:
        ConfigError: it is malformed, torchrun did not start this process, or there is one file only.
    """
    if text is None:
        return 0, 1
    if text == "torchrun":
        try:
            part = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError):
            raise ConfigError(
                "--part torchrun: RANK and WORLD_SIZE are not set. Start it by `torchrun --no-python "
                "phema synth ...`, or write --part I/N."
            ) from None
    else:
        first, _, last = text.partition("/")
        part = (int(first) - 1, int(last)) if first.isdigit() and last.isdigit() else (-1, 0)
        if not 0 <= part[0] < part[1]:
            raise ConfigError(f"--part {text}: write I/N with I from 1 to N, as in 1/8 to 8/8.")
    if num_files == 1 and part[1] > 1:
        raise ConfigError(
            "--part divides the files of the output, and there is one only. Add --shard-size."
        )
    return part
