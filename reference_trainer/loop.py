"""The training loop.

A run is a folder: `config.json` (what it is), `log.jsonl` (what happened), `checkpoints` (what resuming
needs), `snapshots` (the stored averages) and `direct` (averages tracked to check syntheses against).
Running the same command again resumes: a run that was killed at any point, any number of times, ends
bit for bit like one that was not (on a CPU with the same number of threads).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from posthoc_ema import ConfigError, SnapshotNotFoundError, SnapshotStore, SnapshotWriteError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.tensor_files import is_temporary_name, write_json
from posthoc_ema.torch import Tracker
from reference_trainer.checkpoint import Checkpoint, latest_checkpoint, restore, save_checkpoint
from reference_trainer.config import TrainConfig, differing_fields
from reference_trainer.data import load_dataset
from reference_trainer.run_log import Event, Report, RunLog, Status
from reference_trainer.schedule import learning_rate
from reference_trainer.state import Batches, TrainState, new_batches, new_state, train_step


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        folder: the run's folder.
        nimg: images seen in total.
        started_at: images seen when this call began; equal to `nimg` if the run was complete already.
    """

    folder: Path
    nimg: int
    started_at: int

    @property
    def already_complete(self) -> bool:
        """Whether there was nothing left to do."""
        return self.started_at == self.nimg


def train(
    config: TrainConfig, folder: Path, *, device: str = "auto", report: Report | None = None
) -> TrainResult:
    """Train a network, track its averages and store snapshots; resume if the folder holds a run.

    Args:
        config: everything that determines the run.
        folder: the run's folder, made if needed.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        report: called with every log record, for a progress bar.

    Returns:
        A `TrainResult`.

    Raises:
        ConfigError: the folder holds a run with another configuration or is in use, the data set does
            not fit the network, or the device does not exist.
        SnapshotError: a checkpoint or snapshot cannot be read or written; what is stored is untouched.

    Example:
        train(digits_xs(), Path("run"))  # minutes; call it again after a crash
    """
    folder, target = Path(folder), resolve_device(device)
    dataset = load_dataset(config.data.name)  # before a wrong name is written to the folder
    with run_folder(folder, config), _reproducible(target):
        log = RunLog(folder / "log.jsonl", report)
        checkpoint, damaged = latest_checkpoint(folder / "checkpoints")
        if checkpoint is not None and checkpoint.nimg >= config.total_images:
            message = f"the run in {folder} is complete: nothing to do"
            log.show(_event(config, "complete", checkpoint.nimg, message))
            return TrainResult(folder, checkpoint.nimg, checkpoint.nimg)
        batches = new_batches(dataset, config, target)
        state = new_state(config, folder, target)
        with contextlib.ExitStack() as stack:
            for tracker in state.trackers.values():
                stack.enter_context(tracker)
            begin(state, config, checkpoint, damaged, log)
            started_at = state.nimg
            run(state, batches, config, folder, log)
    return TrainResult(folder, state.nimg, started_at)


def begin(
    state: TrainState,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    damaged: list[str],
    log: RunLog,
) -> None:
    """Bring state, stores and log to the point where training goes on."""
    if checkpoint is not None:
        restore(state, checkpoint)
    else:  # killed before the first checkpoint, or new
        for tracker in state.trackers.values():
            _refuse_to_discard(tracker, config)
        for tracker in state.trackers.values():
            tracker.restart()
    log.truncate(state.nimg if checkpoint is not None else -1)
    for problem in damaged:
        log.write(_event(config, "fallback", state.nimg, f"older checkpoint used: {problem}"))
    log.write(_event(config, "resume" if checkpoint else "start", state.nimg))


def _refuse_to_discard(tracker: Tracker, config: TrainConfig) -> None:
    """Only what was stored before the first checkpoint may be dropped without being asked."""
    if (tracker.folder / MANIFEST).exists():
        stored = max(SnapshotStore.open(tracker.folder).times, default=0)
        if stored > config.checkpoint_every:
            raise SnapshotNotFoundError(
                f"{tracker.folder} holds snapshots up to {stored} images, but there is no checkpoint "
                "to continue from. Restore the checkpoints, choose a new folder, or remove the run's "
                "folder to train from the beginning."
            )


def run(
    state: TrainState, batches: Batches, config: TrainConfig, folder: Path, log: RunLog
) -> None:
    """Train to the end. At each time the order is: step, snapshot, log line, checkpoint.

    Only the checkpoint commits: whatever a kill leaves behind of a later time is dropped and redone.
    """
    clock = _Clock(state.nimg)
    while state.nimg < config.total_images:
        train_step(state, batches, config)
        done = state.nimg == config.total_images
        if done:
            for tracker in state.trackers.values():
                tracker.snapshot()
        if done or state.nimg % config.status_every == 0:
            log.write(take_status(state, config, clock))
        if done or state.nimg % config.checkpoint_every == 0:
            log.sync()
            save_checkpoint(state, folder / "checkpoints")


class _Clock:
    """Wall clock of this process, for the speed in the log."""

    def __init__(self, nimg: int) -> None:
        self._start = self._last = time.perf_counter()
        self._nimg = nimg

    def lap(self, nimg: int) -> tuple[float, float]:
        """Seconds since the start, and images per second since the last lap."""
        now = time.perf_counter()
        speed = (nimg - self._nimg) / max(now - self._last, 1e-9)
        self._last, self._nimg = now, nimg
        return now - self._start, speed


def take_status(state: TrainState, config: TrainConfig, clock: _Clock) -> Status:
    """The regular report; the mean of the loss begins anew."""
    seconds, speed = clock.lap(state.nimg)
    loss = float(state.loss_sum) / state.loss_count
    state.loss_sum.zero_()
    state.loss_count = 0
    before = state.nimg - config.batch_size
    return Status(
        event="status",
        nimg=state.nimg,
        total_images=config.total_images,
        loss=loss,
        learning_rate=learning_rate(before, config.batch_size, config.optim),
        images_per_second=round(speed, 1),
        seconds=round(seconds, 3),
    )


def resolve_device(device: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: the name is unknown, or CUDA is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise ConfigError(
            f"device {device!r} does not exist: this machine has {count} CUDA devices that torch can "
            "use. Choose cpu or auto."
        )
    return resolved


@contextlib.contextmanager
def run_folder(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Own a run's folder: lock it, check or write its configuration, remove what a kill left.

    Raises:
        ConfigError: it is in use, or holds another configuration.
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
        _settle_config(folder / "config.json", config)
        for place in (folder, folder / "checkpoints"):
            for leftover in place.glob(".*"):
                if is_temporary_name(leftover.name):
                    leftover.unlink()
        yield
    finally:
        lock.release()


def _settle_config(path: Path, config: TrainConfig) -> None:
    if not path.exists():
        write_json(path, config.to_dict())
        return
    try:
        stored = TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} Restore the file or choose a new folder.") from error
    if stored != config:
        fields = ", ".join(differing_fields(stored, config))
        raise ConfigError(
            f"{path.parent} holds a run with another configuration; these differ (there and here): "
            f"{fields}. Use the same configuration to resume, or choose a new folder."
        )


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA: full float32 convolutions and the same algorithms in every run (EDM2: TF32 off)."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def _event(config: TrainConfig, event: Event, nimg: int, message: str | None = None) -> Status:
    return Status(event=event, nimg=nimg, total_images=config.total_images, message=message)
