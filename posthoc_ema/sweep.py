"""Sweep: measure a metric against the averaging length, resumable, with the raw weights as baseline."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posthoc_ema.errors import (
    ConfigError,
    MetricError,
    PhemaWarning,
    SnapshotFormatError,
    SnapshotWriteError,
)
from posthoc_ema.fitting import FitNorm
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis import RAW, out_of_reach, plan_synthesis, synthesize_to_files
from posthoc_ema.tensor_files import atomic_write, write_json

RESULTS = "sweep.json"
TABLE = "sweep.csv"
_SCHEMA = 2


class Metric(Protocol):
    """What a sweep measures with: a description that identifies it, and a call per weights file."""

    @property
    def description(self) -> str:
        """Text that changes whenever the numbers could; rows of another metric are measured anew."""
        ...

    def __call__(self, weights: Path, sigma_rel: float) -> Mapping[str, float]:
        """Measure one weights file; the first value is the one that the optimum is searched for."""
        ...


@dataclass(frozen=True)
class ShellMetric:
    """A shell command that prints its result: a number, or a JSON object, on its last line of output.

    Args:
        command: holds `{weights}`, which is replaced by the quoted path of a safetensors file. The
            environment variable PHEMA_SIGMA_REL holds the length ("raw" for the raw weights).

    Raises:
        ConfigError: the command does not hold `{weights}`.

    Example:
        >>> import sys
        >>> metric = ShellMetric(f"{sys.executable} -c 'print(0.5)' {{weights}}")
        >>> metric(Path("w.safetensors"), 0.1)
        {'value': 0.5}
    """

    command: str

    def __post_init__(self) -> None:
        if "{weights}" not in self.command:
            raise ConfigError(
                "a metric command must hold {weights}, the place of the weights file, got "
                f"{self.command!r}. Example: --metric 'python eval.py {{weights}}'."
            )

    @property
    def description(self) -> str:
        """The command."""
        return self.command

    def __call__(self, weights: Path, sigma_rel: float) -> dict[str, float]:
        """Run the command.

        Raises:
            MetricError: it failed, or its last line is neither a number nor a JSON object of numbers.
        """
        command = self.command.replace("{weights}", shlex.quote(str(weights)))
        environment = {**os.environ, "PHEMA_SIGMA_REL": label(sigma_rel)}
        done = subprocess.run(  # the user's own shell command is the feature
            command, shell=True, capture_output=True, env=environment
        )
        if done.returncode != 0:
            tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise MetricError(
                f"the metric command ended with code {done.returncode} at sigma_rel "
                f"{label(sigma_rel)}: {tail[0]}. The command was: {command}"
            )
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        return _parse(lines[-1] if lines else "", command)


def _parse(line: str, command: str) -> dict[str, float]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = line.strip()
    try:
        if isinstance(value, dict):
            numbers = {k: float(v) for k, v in value.items() if type(v) in (int, float)}
        else:
            numbers = {"value": float(value)} if not isinstance(value, bool) else {}
    except (TypeError, ValueError, OverflowError):
        numbers = {}
    if not numbers:
        raise MetricError(
            "the last line of the metric's output must be a number or a JSON object of numbers, got "
            f"{line!r}. The command was: {command}"
        )
    bad = next((k for k, v in numbers.items() if not math.isfinite(v)), None)
    if bad is not None:
        raise MetricError(f"the metric gave {bad} = {numbers[bad]}. The command was: {command}")
    return numbers


@dataclass(frozen=True)
class SweepRow:
    """One measured length.

    Attributes:
        sigma_rel: the length; 0.0 is the raw weights.
        values: what the metric gave, name -> number.
        predicted_error: expected error of the average over the norm of the weights; nan if unknown.
    """

    sigma_rel: float
    values: dict[str, float]
    predicted_error: float


@dataclass(frozen=True)
class SweepResult:
    """A sweep, finished or not.

    Attributes:
        rows: measured lengths, rising; the raw weights first.
        key: name of the value that decides.
        higher_is_better: direction of that value.
        identity: what the rows belong to: run, time, norm, metric.
    """

    rows: tuple[SweepRow, ...]
    key: str
    higher_is_better: bool
    identity: dict[str, Any]

    @property
    def raw(self) -> SweepRow | None:
        """The baseline row, if it was measured."""
        return next((row for row in self.rows if row.sigma_rel == RAW), None)

    @property
    def averaged(self) -> tuple[SweepRow, ...]:
        """The rows of synthesized averages, rising in length."""
        return tuple(row for row in self.rows if row.sigma_rel != RAW)

    @property
    def best(self) -> SweepRow:
        """The averaged row with the best value; the shortest of equals."""
        sign = -1 if self.higher_is_better else 1
        return min(self.averaged, key=lambda row: sign * row.values[self.key])


def label(sigma_rel: float) -> str:
    """A length in words: "raw" or the shortest exact decimal."""
    return "raw" if sigma_rel == RAW else repr(sigma_rel)


def run_sweep(
    store: SnapshotStore,
    sigma_rels: Sequence[float],
    metric: Metric,
    folder: Path,
    *,
    at: int | None = None,
    norm: FitNorm = "random-walk",
    key: str | None = None,
    higher_is_better: bool = False,
    batch: int = 8,
    keep_weights: bool = False,
    report: Callable[[SweepRow, int, int], None] | None = None,
) -> SweepResult:
    """Synthesize each length, measure it, and write sweep.json and sweep.csv after each.

    Running it again continues: rows of the same run, time, norm and metric are kept and not measured
    anew, so that a second call may add lengths. Rows of anything else give way.

    Args:
        store: where the averages are.
        sigma_rels: lengths; `RAW` (0.0) is the raw weights.
        metric: called with each weights file.
        folder: where results (and, with `keep_weights`, the weights) go; made if needed.
        at: training time of the averages, the last by default.
        norm: norm of the fit.
        key: value that decides; the first one the metric gives by default.
        higher_is_better: direction of that value.
        batch: lengths that are synthesized in one pass over the snapshots, and lie on disk together.
        keep_weights: keep the synthesized files as `weights-<sigma_rel>.safetensors`.
        report: called with (row, rows done, rows in all).

    Returns:
        All rows, also those of earlier calls.

    Raises:
        MetricError: the metric failed; the rows measured so far are kept.
        ConfigError: the metric gives no value `key`; the rows measured so far are kept.
        SnapshotWriteError: the folder cannot be written.
    """
    # Refuses bad targets before any work.
    plan = plan_synthesis(store, sigma_rels, at=at, norm=norm)
    message = out_of_reach(plan)
    if message:
        warnings.warn(message, PhemaWarning, stacklevel=2)
    errors = dict(zip(plan.sigma_rels, plan.predicted_error.tolist(), strict=True))
    identity = {
        "run_id": store.run_id,
        "time": plan.time,
        "clock": store.clock,
        "norm": norm,
        "metric": metric.description,
    }
    _make(folder)
    rows = {row.sigma_rel: row for row in _known_rows(folder, identity)}
    wanted = list(dict.fromkeys(plan.sigma_rels))
    missing = [
        s for s in wanted if s not in rows or (keep_weights and not _weights(folder, s).exists())
    ]
    ready = [s for s in wanted if s not in missing]
    for done, sigma_rel in enumerate(ready, 1):
        if report is not None:
            report(rows[sigma_rel], done, len(wanted))
    for start in range(0, len(missing), batch):
        for sigma_rel, path in _synthesized(
            store, missing[start : start + batch], folder, plan.time, norm, keep_weights
        ):
            if sigma_rel not in rows:
                values = dict(metric(path, sigma_rel))
                rows[sigma_rel] = SweepRow(sigma_rel, values, errors[sigma_rel])
            _save(rows, key, higher_is_better, identity, folder)
            ready.append(sigma_rel)
            if report is not None:
                report(rows[sigma_rel], len(ready), len(wanted))
    return _save(rows, key, higher_is_better, identity, folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder}: cannot be made or used as a folder: {error.strerror}. Choose another one."
        ) from error


def _weights(folder: Path, sigma_rel: float) -> Path:
    return folder / f"weights-{label(sigma_rel)}.safetensors"


def _synthesized(
    store: SnapshotStore,
    sigma_rels: Sequence[float],
    folder: Path,
    time: int,
    norm: FitNorm,
    keep: bool,
) -> Iterator[tuple[float, Path]]:
    paths = [_weights(folder, s) for s in sigma_rels]
    plan = plan_synthesis(store, sigma_rels, at=time, norm=norm)
    try:
        synthesize_to_files(store, plan, paths)
        yield from zip(sigma_rels, paths, strict=True)
    finally:
        if not keep:
            for path in paths:
                path.unlink(missing_ok=True)


def _save(
    rows: Mapping[float, SweepRow],
    key: str | None,
    higher: bool,
    identity: dict[str, Any],
    folder: Path,
) -> SweepResult:
    """Write what is measured; only then complain about the key, so that no measurement is lost."""
    ordered = tuple(rows[s] for s in sorted(rows))
    common = [name for name in ordered[0].values if all(name in row.values for row in ordered)]
    if not common:
        raise MetricError("the metric gives no value that all lengths have in common.")
    result = SweepResult(ordered, key if key in common else common[0], higher, identity)
    write_results(result, folder)
    if key is not None and key not in common:
        raise ConfigError(
            f"the metric gives {', '.join(common)}, not {key!r}. Choose one of these with --key; "
            "what is measured is kept."
        )
    return result


def write_results(result: SweepResult, folder: Path) -> None:
    """Write sweep.json (everything) and sweep.csv (one line per length), both atomically."""
    write_json(folder / RESULTS, to_json(result))
    names = list(dict.fromkeys(name for row in result.rows for name in row.values))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sigma_rel", *names, "predicted_error"])
    for row in result.rows:
        values = [row.values.get(name, "") for name in names]
        table.writerow([label(row.sigma_rel), *values, row.predicted_error])
    with atomic_write(folder / TABLE) as descriptor:
        os.write(descriptor, text.getvalue().encode())


def to_json(result: SweepResult) -> dict[str, Any]:
    """JSON form of a sweep, as in sweep.json."""
    return {
        "format": "posthoc-ema sweep",
        "schema": _SCHEMA,
        **result.identity,
        "key": result.key,
        "higher_is_better": result.higher_is_better,
        "best_sigma_rel": result.best.sigma_rel if result.averaged else None,
        "rows": [
            {
                "sigma_rel": None if row.sigma_rel == RAW else row.sigma_rel,
                "raw": row.sigma_rel == RAW,
                "values": row.values,
                "predicted_error": None if math.isnan(row.predicted_error) else row.predicted_error,
            }
            for row in result.rows
        ],
    }


def read_results(folder: Path) -> SweepResult:
    """Read sweep.json.

    Args:
        folder: the sweep's folder, or the file itself.

    Raises:
        SnapshotFormatError: there is none, or it is damaged.
    """
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != "posthoc-ema sweep" or value["schema"] != _SCHEMA:
            raise ValueError
        rows = tuple(
            SweepRow(
                RAW if row["raw"] else float(row["sigma_rel"]),
                {str(k): float(v) for k, v in row["values"].items()},
                math.nan if row["predicted_error"] is None else float(row["predicted_error"]),
            )
            for row in value["rows"]
        )
        if not all(math.isfinite(v) for row in rows for v in row.values.values()):
            raise ValueError
        if not all(value["key"] in row.values for row in rows):
            raise KeyError
        identity = {k: value[k] for k in ("run_id", "time", "clock", "norm", "metric")}
        return SweepResult(rows, value["key"], value["higher_is_better"], identity)
    except FileNotFoundError:
        raise SnapshotFormatError(f"{path} does not exist; `phema sweep --out` makes it.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SnapshotFormatError(
            f"{path}: not a sweep of this version; remove it to measure anew."
        ) from None


def _known_rows(folder: Path, identity: Mapping[str, Any]) -> tuple[SweepRow, ...]:
    if not (folder / RESULTS).exists():
        return ()
    found = read_results(folder)
    return found.rows if found.identity == dict(identity) else ()


__all__ = [
    "Metric",
    "ShellMetric",
    "SweepResult",
    "SweepRow",
    "label",
    "read_results",
    "run_sweep",
    "to_json",
    "write_results",
]
