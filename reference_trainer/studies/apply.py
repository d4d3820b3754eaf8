"""Carry a plan out: train what is not trained, measure what is not measured, keep every number.

An output folder holds `runs/NAME` (a run folder each, which resumes by itself) and `numbers/NAME.json`
(every number that was measured of a run, written after each measurement). Studies that use one output
folder share runs and numbers. A second call finds everything there and does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import filelock

from posthoc_ema import SnapshotFormatError, SnapshotStore
from posthoc_ema.tensor_files import write_json
from reference_trainer.studies.records import (
    Measurement,
    Plan,
    Quality,
    Run,
    Scale,
    measurement_key,
    runs_of,
)

_FORMAT = "reference_trainer study numbers"
Progress = Callable[[str, int, int], None]
"""Called with what was done, jobs done, jobs in all."""
_Job = tuple[str, Callable[..., None], tuple[Any, ...]]
"""What is said when it is done, the function, its arguments."""


def run_folder_of(out: Path, run: str) -> Path:
    """Where a run of a study is trained."""
    return out / "runs" / run


def numbers_file_of(out: Path, run: str) -> Path:
    """Where the numbers of a run are kept."""
    return out / "numbers" / f"{run}.json"


def reference_file_of(out: Path) -> Path:
    """Where the statistics of the training images are kept, if the metric needs them."""
    return out / "reference.safetensors"


def apply(
    plan: Plan,
    scale: Scale,
    out: Path,
    *,
    jobs: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[Measurement, dict[str, float]]:
    """Do what a plan says, as far as it is not done, and return its numbers.

    Args:
        plan: runs and measurements.
        scale: how to measure.
        out: the output folder; made if needed.
        jobs: processes that train and measure at the same time.
        device: see `reference_trainer.loop.train`.
        progress: see `Progress`.

    Returns:
        measurement -> name -> number, in the order of the plan.

    Raises:
        ConfigError: the folder holds a run of one of the names with another configuration.
        SnapshotFormatError: a file of numbers is damaged.
    """
    compares = any(isinstance(m, Quality) for m in plan.measurements)
    groups: dict[str, list[Measurement]] = {}
    for measurement in plan.measurements:
        groups.setdefault(runs_of(measurement)[0], []).append(measurement)
    stages: list[list[_Job]] = [
        [(f"trained {run.name}", train_run, (run, out, device)) for run in plan.runs],
        [("looked at the training images", refer, (scale, out, device))] if compares else [],
        [
            (f"measured {name}", measure_run, (name, plan, group, scale, out, device))
            for name, group in groups.items()
        ],
    ]
    total, done = sum(map(len, stages)), 0
    with _workers(jobs) as pool:
        for stage in stages:  # a guide must be trained before a guided network is measured
            for text in _each(stage, pool):
                done += 1
                if progress is not None:
                    progress(text, done, total)
    kept = {name: read_numbers(out, name) for name in groups}
    identity = _Identity(plan, scale, out)
    return {m: kept[runs_of(m)[0]][identity.key(m)] for m in plan.measurements}


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that work at the same time; none for one job at a time."""
    if jobs == 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_one_of_many, initargs=(threads,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _each(stage: Sequence[_Job], pool: ProcessPoolExecutor | None) -> Iterator[str]:
    """Do the jobs of a stage, here or in processes; gives the text of each as it is done."""
    if pool is None:
        for text, function, arguments in stage:
            function(*arguments)
            yield text
        return
    texts: dict[Future[None], str] = {
        pool.submit(function, *arguments): text for text, function, arguments in stage
    }
    for future in as_completed(texts):
        future.result()
        yield texts[future]


def _one_of_many(threads: int) -> None:
    """A worker: its share of the cores."""
    import torch

    torch.set_num_threads(threads)


def refer(scale: Scale, out: Path, device: str) -> None:
    """Make the statistics of the training images, if the metric needs them and they are missing."""
    from reference_trainer.studies.measuring import make_reference

    make_reference(scale, reference_file_of(out), device)


def train_run(run: Run, out: Path, device: str) -> None:
    """Train a run to its end; at once if it is trained."""
    from reference_trainer.loop import train

    train(run.config, run_folder_of(out, run.name), device=device)


class _Identity:
    """Keys of numbers: what was measured, how, and of which trained networks."""

    def __init__(self, plan: Plan, scale: Scale, out: Path) -> None:
        self._ids = {
            run.name: SnapshotStore.open(run_folder_of(out, run.name) / "snapshots").run_id
            for run in plan.runs
        }
        self._settings = scale.settings

    def key(self, measurement: Measurement) -> str:
        """The key under which a number is kept."""
        of = [self._ids[name] for name in runs_of(measurement)]
        return json.dumps([measurement_key(measurement), of, self._settings])


def measure_run(
    name: str,
    plan: Plan,
    measurements: Sequence[Measurement],
    scale: Scale,
    out: Path,
    device: str,
) -> None:
    """Measure what is missing of a run; each number is written as soon as it is there."""
    identity = _Identity(plan, scale, out)
    numbers = read_numbers(out, name)
    missing = [m for m in measurements if identity.key(m) not in numbers]
    if not missing:
        return
    from reference_trainer.studies.measuring import measure

    configs = {run.name: run.config for run in plan.runs}
    folders = {run: run_folder_of(out, run) for run in configs}
    for measurement, values in measure(
        missing, scale, configs, folders, reference_file_of(out), device
    ):
        keep_number(out, name, identity.key(measurement), values)


def read_numbers(out: Path, run: str) -> dict[str, dict[str, float]]:
    """The numbers that are kept of a run, empty if there are none.

    Raises:
        SnapshotFormatError: the file is damaged.
    """
    path = numbers_file_of(out, run)
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != _FORMAT:
            raise ValueError
        numbers = {
            json.dumps(row["of"]): {str(k): float(v) for k, v in row["values"].items()}
            for row in value["numbers"]
        }
        if not all(math.isfinite(v) for row in numbers.values() for v in row.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SnapshotFormatError(
            f"{path}: not the numbers of a study; remove it to measure anew."
        ) from None
    return numbers


def keep_number(out: Path, run: str, key: str, values: dict[str, float]) -> None:
    """Add what was measured to the file of a run; other studies may do so at the same time."""
    path = numbers_file_of(out, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{run}.lock")):
        numbers = {**read_numbers(out, run), key: values}
        rows = [{"of": json.loads(k), "values": v} for k, v in numbers.items()]
        write_json(path, {"format": _FORMAT, "numbers": rows})
