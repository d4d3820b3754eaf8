"""The log of a run in other programs: TensorBoard, Weights & Biases, Trackio.

Each is an adapter of a few lines around its package, which is loaded only when asked for. A run that
goes on continues the same entry there: its name is the id of the run, which the snapshots carry.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from posthoc_ema import ConfigError
from reference_trainer.run_log import Report, Status, scalars

PROJECT = "phema"
"""Name of the project in Weights & Biases and Trackio, unless their own variables say otherwise."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a logger is told about a run.

    Attributes:
        folder: the run's folder.
        run_id: id of the run, the same whenever it is continued.
        name: for people.
        config: the configuration as plain values.
        nimg: images seen where the run begins or goes on.
    """

    folder: Path
    run_id: str
    name: str
    config: dict[str, Any]
    nimg: int


@contextlib.contextmanager
def _tensorboard(info: RunInfo) -> Iterator[Report]:
    _package("tensorboard")
    module = _package("torch.utils.tensorboard", "tensorboard")
    # Points of a future that was lost are hidden.
    writer = module.SummaryWriter(str(info.folder / "tensorboard"), purge_step=info.nimg + 1)

    def report(status: Status) -> None:
        for name, value in scalars(status).items():
            writer.add_scalar(name, value, status.nimg)
        writer.flush()

    with contextlib.closing(writer):
        yield report


@contextlib.contextmanager
def _wandb(info: RunInfo) -> Iterator[Report]:
    wandb = _package("wandb")
    with contextlib.redirect_stdout(sys.stderr):
        run = wandb.init(
            project=_unless_set("WANDB_PROJECT"),
            id=info.run_id,
            name=info.name,
            dir=str(info.folder),
            config=info.config,
            resume="allow",
        )
        try:
            yield lambda status: run.log({"nimg": status.nimg, **scalars(status)}, step=status.nimg)
        finally:
            run.finish()


@contextlib.contextmanager
def _trackio(info: RunInfo) -> Iterator[Report]:
    trackio = _package("trackio")
    with contextlib.redirect_stdout(sys.stderr):
        trackio.init(
            project=_unless_set("TRACKIO_PROJECT"),
            name=f"{info.name}-{info.run_id}",
            config=info.config,
            resume="allow",
        )
        try:
            yield lambda status: trackio.log(scalars(status), step=status.nimg)
        finally:
            trackio.finish()


LOGGERS: dict[str, Callable[[RunInfo], contextlib.AbstractContextManager[Report]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
"""Name on the command line to a context that gives what takes the records."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise unless all loggers are known and their packages are there, before anything begins.

    Raises:
        ConfigError: one is unknown or not installed; the message says how to install it.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"--log must be one of {', '.join(LOGGERS)}, got {name!r}.")
        _package(name)


@contextlib.contextmanager
def loggers(names: Sequence[str], info: RunInfo) -> Iterator[list[Report]]:
    """Open the loggers of these names for a run; they are closed at the end of the block.

    Raises:
        ConfigError: see `check_loggers`.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(LOGGERS[name](info)) for name in names]


def _package(module: str, package: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or module
        raise ConfigError(
            f"--log {package} needs {error.name}, which is not installed: pip install {package}."
        ) from None


def _unless_set(variable: str) -> str:
    return os.environ.get(variable, PROJECT)
