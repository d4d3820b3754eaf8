"""Options and parsers that commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from posthoc_ema import RAW, ConfigError, PowerProfile, SnapshotStore
from posthoc_ema.errors import SnapshotNotFoundError
from posthoc_ema.store import MANIFEST

_MOST = 1000

Snapshots = Annotated[
    Path,
    typer.Argument(
        metavar="SNAPSHOTS", help="Folder of snapshots, or a run folder of `phema train`."
    ),
]
SigmaRels = Annotated[
    str,
    typer.Option(
        "--sigma-rel",
        metavar="LIST",
        help="Lengths: 0.07 or 0.05,0.10 or 0.010,0.015,...,0.250; `raw` is no averaging.",
    ),
]
At = Annotated[
    int | None,
    typer.Option("--at", metavar="TIME", help="Training time of the average.  [default: the last]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
NumImages = Annotated[int, typer.Option("--num-images", min=2, help="Images to generate.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of the Heun sampler.")]
Norm = Annotated[
    str, typer.Option("--norm", help="Norm of the fit: random-walk, density or published.")
]


def parse_sigma_rels(text: str) -> list[float]:
    """Parse LIST: numbers, `raw`, and ranges written as `a,b,...,c`.

    Raises:
        ConfigError: it is malformed; the message says how to write it.
        InvalidProfileError: a length lies outside the family.
    """
    items = [item.strip() for item in text.split(",")]
    values: list[Decimal] = []
    i = 0
    while i < len(items):
        if items[i] in ("...", "…"):
            values += _range(text, values, items[i + 1 : i + 2])
            i += 1
        else:
            values.append(_number(text, items[i]))
        i += 1
    result = list(dict.fromkeys(float(value) for value in values))
    for value in result:
        if value != RAW:
            PowerProfile(1.0, value)  # refuses what lies outside the family
    return result


def _number(text: str, item: str) -> Decimal:
    if item == "raw":
        return Decimal(0)
    try:
        value = Decimal(item)
    except InvalidOperation:
        raise ConfigError(
            f"--sigma-rel {text}: {item!r} is not a number. Write 0.07, 0.05,0.10 or "
            "0.010,0.015,...,0.250."
        ) from None
    if value == 0 or not value.is_finite():
        PowerProfile(1.0, float(value))  # raises: only the word `raw` asks for no averaging
    return value


def _range(text: str, before: list[Decimal], after: list[str]) -> list[Decimal]:
    """Values that `...` stands for, and the end."""
    if len(before) < 2 or not after:
        raise ConfigError(
            f"--sigma-rel {text}: a range needs two values before the dots and one after, "
            "as in 0.010,0.015,...,0.250."
        )
    step, end = before[-1] - before[-2], _number(text, after[0])
    if step <= 0 or end <= before[-1]:
        raise ConfigError(f"--sigma-rel {text}: a range must rise, as in 0.010,0.015,...,0.250.")
    count, left_over = divmod(end - before[-1], step)
    if left_over:
        raise ConfigError(
            f"--sigma-rel {text}: steps of {step} from {before[-1]} do not meet {end}; the nearest "
            f"end is {before[-1] + count * step}."
        )
    if count > _MOST:
        raise ConfigError(f"--sigma-rel {text}: {count} values are more than {_MOST}.")
    return [before[-1] + k * step for k in range(1, int(count) + 1)]


def find_store(folder: Path) -> SnapshotStore:
    """Open a store, given its folder or the run folder around it."""
    inside = folder / "snapshots"
    if not (folder / MANIFEST).exists() and (inside / MANIFEST).exists():
        folder = inside
    return SnapshotStore.open(folder)


@contextlib.contextmanager
def extra(command: str, name: str = "trainer") -> Iterator[None]:
    """Turn a missing optional package into one sentence with the pip line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "sklearn", "safetensors.torch"):
            raise
        raise ConfigError(
            f"`phema {command}` needs {error.name}, which is not installed: "
            f"pip install 'posthoc-ema[{name}]'."
        ) from None


def need_file(path: Path) -> Path:
    """Return `path` if it is there."""
    if not path.exists():
        raise SnapshotNotFoundError(f"{path} does not exist.")
    return path
