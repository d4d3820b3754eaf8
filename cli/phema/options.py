"""Options and parsers that commands share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from posthoc_ema import ConfigError, PowerProfile, SnapshotStore
from posthoc_ema.errors import SnapshotNotFoundError
from posthoc_ema.manifest import MANIFEST

_MOST = 1000  # values of one range: more is a slip of the pen
_DOTS = ("...", "…")

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
Steps = Annotated[int, typer.Option("--steps", min=2, help="Steps of the Heun sampler.")]
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
        if items[i] in _DOTS:
            values += _range(text, items[max(0, i - 2) : i], items[i + 1 : i + 2])
            i += 1
        else:
            values.append(_number(text, items[i]))
        i += 1
    return list(dict.fromkeys(float(value) for value in values))


def _number(text: str, item: str) -> Decimal:
    if item == "raw":
        return Decimal(0)
    try:
        value, nearest = Decimal(item), float(item)  # the float refuses "sNaN", which Decimal takes
    except (InvalidOperation, ValueError):
        wrong = f"{item!r} is not a number" if item else "a value is missing beside a comma"
        raise ConfigError(
            f"--sigma-rel {text!r}: {wrong if text.strip() else 'it is empty'}. Write 0.07, "
            "0.05,0.10 or 0.010,0.015,...,0.250."
        ) from None
    PowerProfile(1.0, nearest)  # raises outside (0, 0.2887]: only the word `raw` stands for 0
    return value


def _range(text: str, before: list[str], after: list[str]) -> list[Decimal]:
    """Values that `...` stands for, and the end."""
    if len(before) < 2 or not after or not {"raw", *_DOTS}.isdisjoint([*before, *after]):
        raise ConfigError(
            f"--sigma-rel {text}: a range needs two numbers before the dots and one after, "
            "as in 0.010,0.015,...,0.250."
        )
    first, second, end = (_number(text, item) for item in (*before, *after))
    step = second - first
    if step <= 0 or end <= second:
        raise ConfigError(f"--sigma-rel {text}: a range must rise, as in 0.010,0.015,...,0.250.")
    if end - second > _MOST * step:
        raise ConfigError(
            f"--sigma-rel {text}: steps of {step} make more than {_MOST} values; take wider ones."
        )
    count, left_over = divmod(end - second, step)
    if left_over:
        raise ConfigError(
            f"--sigma-rel {text}: steps of {step} from {second} do not meet {end}; the nearest ends "
            f"are {second + count * step} and {second + (count + 1) * step}."
        )
    return [second + k * step for k in range(1, int(count) + 1)]


def find_store(folder: Path) -> SnapshotStore:
    """Open a store, given its folder or the run folder around it."""
    inside = folder / "snapshots"
    if not (folder / MANIFEST).exists() and (inside / MANIFEST).exists():
        folder = inside
    return SnapshotStore.open(folder)


@contextlib.contextmanager
def extra(command: str, name: str = "trainer") -> Iterator[None]:
    """Turn a missing optional package into one sentence with the pip line.

    Loads torch, and keeps its threads from spinning while they wait for each other (unless the user
    says how long): for small networks beside other busy processes that costs several times the work
    itself. libgomp reads the variable when torch loads it; the processes that we start do not see it.
    """
    ours = "GOMP_SPINCOUNT" not in os.environ and "torch" not in sys.modules
    try:
        if ours:
            os.environ["GOMP_SPINCOUNT"] = "1000"
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise _missing(error, command, name) from None
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "sklearn", "safetensors.torch"):
            raise
        raise _missing(error, command, name) from None


def _missing(error: ModuleNotFoundError, command: str, name: str) -> ConfigError:
    return ConfigError(
        f"`phema {command}` needs {error.name}, which is not installed: "
        f"pip install 'posthoc-ema[{name}]'."
    )


def need_file(path: Path) -> Path:
    """Return `path` if it is there."""
    if not path.exists():
        raise SnapshotNotFoundError(f"{path} does not exist. Check the path.")
    return path
