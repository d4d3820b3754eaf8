"""A run's folder: one owner at a time, one configuration, nothing that a kill has left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import filelock

from posthoc_ema import ConfigError, SnapshotWriteError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.tensor_files import is_temporary_name, write_json
from reference_trainer.config import TrainConfig, differing_fields
from reference_trainer.data import Dataset


@contextlib.contextmanager
def run_folder(folder: Path, config: TrainConfig, dataset: Dataset) -> Iterator[list[str]]:
    """Own a run's folder: lock it, check or write what it is, remove what a kill left.

    Args:
        folder: the run's folder, made if needed.
        config: the run's configuration.
        dataset: the run's data set; its fingerprint is kept in `data.json`.

    Yields:
        Settings in which the run goes on otherwise than it went: those that do not decide its result.

    Raises:
        ConfigError: it is in use, or holds a run of another configuration or other data.
        SnapshotWriteError: it cannot be written.
    """
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=2)  # a killed process's lock is gone with it
    except filelock.Timeout:
        raise ConfigError(
            f"{folder} is being trained in by another process. Stop that one, or choose a new folder."
        ) from None
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder} cannot be used for a run: {error.strerror}. Choose a folder that you may write."
        ) from error
    try:
        changes = _settle_config(folder / "config.json", config)
        _settle_data(folder / "data.json", dataset)
        for place in (folder, folder / "checkpoints"):
            for leftover in place.glob(".*"):
                if is_temporary_name(leftover.name):
                    leftover.unlink()
        yield changes
    finally:
        lock.release()


def _settle_config(path: Path, config: TrainConfig) -> list[str]:
    """Write the configuration, or compare it with the one that is there; returns harmless changes."""
    if not path.exists():
        write_json(path, config.to_dict())
        return []
    try:
        stored = TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} Restore the file or choose a new folder.") from error
    if _decisive(stored) != _decisive(config) and _holds_work(path.parent):
        fields = ", ".join(differing_fields(_decisive(stored), _decisive(config)))
        raise ConfigError(
            f"{path.parent} holds a run with another configuration; these differ (there and here): "
            f"{fields}. Use the same configuration to resume, or choose a new folder."
        )
    changes = differing_fields(stored, config)
    if changes:
        write_json(path, config.to_dict())
    return changes if _holds_work(path.parent) else []


def _settle_data(path: Path, dataset: Dataset) -> None:
    """Write which data the run is of, or compare: a path may change, what lies there may not."""
    now = {"name": dataset.name, "num_images": len(dataset), "fingerprint": dataset.fingerprint}
    if path.exists() and _holds_work(path.parent):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, count = stored["fingerprint"], stored["num_images"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read: {error!r}. Restore it or choose a new folder."
            ) from None
        if fingerprint != dataset.fingerprint:
            raise ConfigError(
                f"{path.parent} holds a run on other data: {count} images when it began, {len(dataset)} "
                "now, of other names, sizes or labels. Give it the data it began with, or choose a new "
                "folder."
            )
        return
    write_json(path, now)


def _holds_work(folder: Path) -> bool:
    """Whether anything of the run has been stored: a start that failed does not bind the next one."""
    stored = ("checkpoints/*.safetensors", f"*/{MANIFEST}")
    return any(True for pattern in stored for _ in folder.glob(pattern))


def _decisive(config: TrainConfig) -> TrainConfig:
    """The configuration without what may change while a run is interrupted."""
    neutral = type(config.compute)()
    return dataclasses.replace(
        config, compute=neutral, data=dataclasses.replace(config.data, path=None)
    )
