"""The log of a run: one JSON object per line in `log.jsonl`, and the same record for whoever listens."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posthoc_ema.tensor_files import atomic_write

Event = Literal["start", "resume", "changed", "fallback", "status", "complete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One line of the log.

    Attributes:
        event: "start" or "resume" (training begins at `nimg`), "fallback" (a damaged checkpoint was
            passed over), "changed" (the run goes on with other settings that do not decide its result),
            "status" (regular report), "complete" (there was nothing left to do).
        nimg: images seen.
        total_images: length of the run.
        loss: mean loss per element since the last report; None when there is none or it is not finite.
        learning_rate: rate of the last step.
        images_per_second: speed since the last report of this process.
        seconds: time since this process began to train.
        seconds_left: what the rest of the run takes at that speed.
        memory_bytes: most memory used so far by the first process: of the GPU, or resident.
        dynamics: measurements of the training dynamics, see `telemetry.read`, and
            "loss_by_ln_sigma", the mean static loss per element by noise level since the last report.
        message: what happened, in words.
    """

    event: Event
    nimg: int
    total_images: int
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    memory_bytes: int | None = None
    dynamics: dict[str, dict[str, float]] | None = None
    message: str | None = None


Report = Callable[[Status], None]


class RunLog:
    """Appends to the log file and reports to callbacks.

    Args:
        path: the log file, made by the first line; None writes nothing.
        reports: called with every record.
    """

    def __init__(self, path: Path | None, *reports: Report) -> None:
        self._path = path
        self._reports = list(reports)

    def add(self, *reports: Report) -> None:
        """Report to these as well from now on."""
        self._reports += reports

    def write(self, status: Status) -> None:
        """Append one record and report it."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_line(status))
        self.show(status)

    def show(self, status: Status) -> None:
        """Report a record without writing it."""
        for report in self._reports:
            report(status)

    def sync(self) -> None:
        """Make the lines durable, so that a checkpoint is never newer than its log."""
        if self._path is not None and self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, nimg: int) -> None:
        """Drop the records of a future that is lost, and a line that a kill left unfinished.

        Args:
            nimg: images seen at the point from which the run goes on; later records go.
        """
        if self._path is None or not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _nimg(line) <= nimg]
        with atomic_write(self._path) as descriptor, os.fdopen(os.dup(descriptor), "w") as file:
            file.writelines(line + "\n" for line in kept)


def to_line(status: Status) -> str:
    """A record as one line of JSON; absent and non-finite values are left out."""
    return json.dumps(_sayable(dataclasses.asdict(status))) + "\n"


def _sayable(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say of a record."""
    kept = {k: _sayable(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {
        k: v
        for k, v in kept.items()
        if v is not None and not (isinstance(v, float) and not math.isfinite(v))
    }


def scalars(status: Status) -> dict[str, float]:
    """The numbers of a record under flat names, `loss` or `weights/enc.r8_block0`.

    Example:
        >>> scalars(Status(event="status", nimg=8, total_images=16, loss=0.5))
        {'loss': 0.5}
    """
    fields = ("loss", "learning_rate", "images_per_second", "memory_bytes")
    own = {name: getattr(status, name) for name in fields}
    found = {name: float(value) for name, value in own.items() if value is not None}
    for kind, values in (status.dynamics or {}).items():
        found |= {f"{kind}/{name}": value for name, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete records of a log file, in order."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_nimg(line))]


def _nimg(line: str) -> float:
    """Images seen at a line, infinity for a line that is no record."""
    try:
        return int(json.loads(line)["nimg"])
    except (ValueError, TypeError, KeyError):
        return math.inf
