"""The training loop.

A run is a folder: `config.json` and `data.json` (what it is), `log.jsonl` (what happened), `checkpoints`
(what resuming needs), `snapshots` (the stored averages) and `direct` (averages tracked to check syntheses
against).
Running the same command again resumes: a run that was killed at any point, any number of times, ends
bit for bit like one that was not (on a CPU with the same number of threads and of processes).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posthoc_ema import ConfigError, SnapshotNotFoundError, SnapshotStore
from posthoc_ema.manifest import MANIFEST
from reference_trainer import telemetry
from reference_trainer.checkpoint import Checkpoint, latest_checkpoint, restore, save_checkpoint
from reference_trainer.config import TrainConfig
from reference_trainer.data import Batches, Dataset, load_dataset, new_batches
from reference_trainer.data.batches import check_fits
from reference_trainer.distributed import DistributedContext, resolve_device, started
from reference_trainer.loss_sums import loss_by_ln_sigma, mean_loss
from reference_trainer.memory import memory_advice, peak_bytes
from reference_trainer.parallel import images_per_pass, settle_buckets, without_false_alarms
from reference_trainer.run_folder import run_folder
from reference_trainer.run_log import Event, Report, RunLog, Status
from reference_trainer.run_loggers import RunInfo, check_loggers, loggers
from reference_trainer.schedule import learning_rate
from reference_trainer.state import TrainState, new_state, release, train_step

__all__ = ["TrainResult", "resolve_device", "train"]

REMEDY = "The launcher says how it ended; the same command continues from the last checkpoint."


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        folder: the run's folder.
        nimg: images seen in total.
        started_at: images seen when this call began; equal to `nimg` if the run was complete already.
        is_main: whether this is the first process, or the only one.
    """

    folder: Path
    nimg: int
    started_at: int
    is_main: bool = True

    @property
    def already_complete(self) -> bool:
        """Whether there was nothing left to do."""
        return self.started_at == self.nimg


def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "auto",
    report: Report | None = None,
    log_to: Sequence[str] = (),
) -> TrainResult:
    """Train a network, track its averages and store snapshots; resume if the folder holds a run.

    Under torchrun all processes call this alike and share each batch; the first one writes.

    Args:
        config: everything that determines the run.
        folder: the run's folder, made if needed.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        report: called with every log record, for a progress bar; in the first process only.
        log_to: names of further loggers, see `run_loggers.LOGGERS`.

    Returns:
        A `TrainResult`.

    Raises:
        ConfigError: the folder holds a run with another configuration or is in use, the data set does
            not fit the network, the device does not exist, or memory does not suffice.
        SnapshotError: a checkpoint or snapshot cannot be read or written; what is stored is untouched.
        RankError: another process of the run has ended.

    Example:
        train(digits_xs(), Path("run"))  # minutes; call it again after a crash
    """
    folder = Path(folder)
    with started(device, remedy=REMEDY) as ranks, contextlib.ExitStack() as stack:
        ranks.agree(lambda: images_per_pass(config, ranks))
        ranks.agree(lambda: check_loggers(log_to))
        dataset = ranks.agree(lambda: _fitting_data(config))  # before anything is written
        assert dataset is not None  # it was called on every process
        changes = ranks.agree(
            lambda: stack.enter_context(run_folder(folder, config, dataset)), main_only=True
        )
        stack.enter_context(_reproducible(ranks.device))
        stack.enter_context(without_false_alarms())
        stack.enter_context(memory_advice(config, ranks))
        reports = [report] if report is not None and ranks.is_main else []
        log = RunLog(folder / "log.jsonl" if ranks.is_main else None, *reports)
        checkpoint, damaged = newest_checkpoint(folder / "checkpoints", ranks)
        if checkpoint is not None and checkpoint.nimg >= config.total_images:
            message = f"the run in {folder} is complete: nothing to do"
            log.show(_event(config, "complete", checkpoint.nimg, message))
            return TrainResult(folder, checkpoint.nimg, checkpoint.nimg, ranks.is_main)
        share = {"rank": ranks.rank, "world_size": ranks.world_size}
        batches = ranks.agree(lambda: new_batches(dataset, config, ranks.device, **share))
        assert batches is not None
        stack.callback(batches.close)
        state = new_state(config, folder, ranks.device, ranks=ranks)
        stack.callback(release, state)
        settle_buckets(state.loss, config, ranks)
        for tracker in state.trackers.values():
            stack.enter_context(tracker)
        begin(state, config, checkpoint)
        started_at = state.nimg
        if ranks.is_main:
            info = RunInfo(folder, _run_id(state), config.name, config.to_dict(), started_at)
            log.add(*stack.enter_context(loggers(log_to, info)))
        introduce(log, config, checkpoint, changes or [], damaged)
        run(state, batches, config, folder, log)
    return TrainResult(folder, state.nimg, started_at, ranks.is_main)


def newest_checkpoint(
    folder: Path, ranks: DistributedContext
) -> tuple[Checkpoint | None, list[str]]:
    """`latest_checkpoint`, the same on all processes; all of them together.

    Raises:
        ConfigError: processes of other machines see another folder than the first one.
    """
    found = ranks.agree(lambda: latest_checkpoint(folder))
    assert found is not None  # it was called on every process
    nimg = -1 if found[0] is None else found[0].nimg
    main = int(ranks.sum_(torch.tensor(nimg if ranks.is_main else 0)))

    def check() -> None:
        if nimg != main:
            here, there = ("no checkpoint" if n < 0 else f"one of {n} images" for n in (nimg, main))
            raise ConfigError(
                f"{folder} must be the same folder for all processes, but process {ranks.rank} finds "
                f"{here} as the newest and process 0 {there}. Use a file system that all machines share."
            )

    ranks.agree(check)
    return found


def _fitting_data(config: TrainConfig) -> Dataset:
    dataset = load_dataset(config.data)
    check_fits(dataset, config)
    return dataset


def begin(state: TrainState, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Bring state and stores to the point where training goes on; all processes together."""
    if checkpoint is not None:
        restore(state, checkpoint)
        return
    # Killed before the first checkpoint, or new.
    state.ranks.agree(lambda: _refuse_to_discard(state, config), main_only=True)
    for tracker in state.trackers.values():
        tracker.restart()


def introduce(
    log: RunLog,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    changes: Sequence[str],
    damaged: Sequence[str],
) -> None:
    """Bring the log to the point where training goes on, and say how."""
    nimg = 0 if checkpoint is None else checkpoint.nimg
    log.truncate(-1 if checkpoint is None else nimg)
    for problem in damaged:
        log.write(_event(config, "fallback", nimg, f"older checkpoint used: {problem}"))
    if changes:
        message = f"the run goes on with other settings (there and here): {', '.join(changes)}"
        log.write(_event(config, "changed", nimg, message))
    log.write(_event(config, "resume" if checkpoint else "start", nimg))


def _refuse_to_discard(state: TrainState, config: TrainConfig) -> None:
    """Only what was stored before the first checkpoint may be dropped without being asked."""
    for folder in (tracker.folder for tracker in state.trackers.values()):
        stored = SnapshotStore.open(folder).times if (folder / MANIFEST).exists() else []
        if max(stored, default=0) > config.checkpoint_every:
            raise SnapshotNotFoundError(
                f"{folder} holds snapshots up to {max(stored)} images, but there is no checkpoint "
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
            save_checkpoint(state, folder / "checkpoints", config.keep_checkpoints)


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
    """The regular report; the means of the losses begin anew. All processes together."""
    values = state.ranks.sum_(state.losses.values.clone()).cpu()  # waits for the device
    seconds, speed = clock.lap(state.nimg)
    network = config.network
    elements = network.img_channels * network.img_resolution**2
    dynamics: telemetry.Dynamics | None = None
    if state.dynamics is not None:
        dynamics = telemetry.read(state.dynamics, state.ranks)
        dynamics["loss_by_ln_sigma"] = loss_by_ln_sigma(values, elements)
    before = state.nimg - config.batch_size
    status = Status(
        event="status",
        nimg=state.nimg,
        total_images=config.total_images,
        loss=mean_loss(values, state.losses.count),
        learning_rate=learning_rate(before, config.batch_size, config.optim),
        images_per_second=round(speed, 1),
        seconds=round(seconds, 3),
        seconds_left=round((config.total_images - state.nimg) / speed, 1),
        memory_bytes=peak_bytes(state.ranks.device),
        dynamics=dynamics,
    )
    state.losses.reset()
    state.dynamics = None
    return status


def _run_id(state: TrainState) -> str:
    return state.trackers["snapshots"].store.run_id


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA: full float32 convolutions and sums, the same algorithms in every run (EDM2: TF32 off)."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def _event(config: TrainConfig, event: Event, nimg: int, message: str | None = None) -> Status:
    return Status(event=event, nimg=nimg, total_images=config.total_images, message=message)
