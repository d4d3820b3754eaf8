"""The log of a run: one JSON object per line in `log.jsonl`, and the same record for a progress bar."""

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

Event = Literal["start", "resume", "fallback", "status", "complete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One line of the log.

    Attributes:
        event: "start" or "resume" (training begins at `nimg`), "fallback" (a damaged checkpoint was
            passed over), "status" (regular report), "complete" (there was nothing left to do).
        nimg: images seen.
        total_images: length of the run.
        loss: mean loss per element since the last report; None when there is none or it is not finite.
        learning_rate: rate of the last step.
        images_per_second: speed since the last report of this process.
        seconds: time since this process began to train.
        message: what happened, in words.
    """

    event: Event
    nimg: int
    total_images: int
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    message: str | None = None


Report = Callable[[Status], None]


class RunLog:
    """Appends to the log file and reports to a callback.

    Args:
        path: the log file; made by the first line.
        report: called with every record, None for nobody.
    """

    def __init__(self, path: Path, report: Report | None = None) -> None:
        self._path = path
        self._report = report

    def write(self, status: Status) -> None:
        """Append one record and report it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(to_line(status))
        self.show(status)

    def show(self, status: Status) -> None:
        """Report a record without writing it."""
        if self._report is not None:
            self._report(status)

    def sync(self) -> None:
        """Make the lines durable, so that a checkpoint is never newer than its log."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, nimg: int) -> None:
        """Drop the records of a future that is lost, and a line that a kill left unfinished.

        Args:
            nimg: images seen at the point from which the run goes on; later records go.
        """
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _nimg(line) <= nimg]
        with atomic_write(self._path) as descriptor, os.fdopen(os.dup(descriptor), "w") as file:
            file.writelines(line + "\n" for line in kept)


def to_line(status: Status) -> str:
    """A record as one line of JSON; absent and non-finite values are left out."""
    values = {k: v for k, v in dataclasses.asdict(status).items() if v is not None}
    finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
    return json.dumps(finite) + "\n"


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
