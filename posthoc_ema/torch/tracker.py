"""Tracker: several power-function averages of a module at once, and snapshots of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from posthoc_ema.codecs import DEFAULT_CODEC
from posthoc_ema.errors import ConfigError, SnapshotWriteError, TrackingError
from posthoc_ema.profiles import (
    DEFAULT_SIGMA_RELS,
    PointProfile,
    PowerProfile,
    gamma_from_sigma_rel,
    power_update_weight,
)
from posthoc_ema.snapshot import SnapshotRecord, StoredProfile
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.averaging import Averages
from posthoc_ema.torch.distributed.ranks import Ranks
from posthoc_ema.torch.distributed.sharding import local_part
from posthoc_ema.torch.parameters import TrackedModel
from posthoc_ema.torch.recording import Recorder
from posthoc_ema.torch.settings import Settings
from posthoc_ema.torch.snapshots import LazyTensors, TakenSnapshot
from posthoc_ema.torch.state import STATE_SCHEMA, check_state
from posthoc_ema.torch.swap import swapped

_log = logging.getLogger("posthoc_ema")


def _average(averages: Averages, index: int, name: str) -> torch.Tensor:
    return averages.average(name, index)


class Tracker:
    """Tracks power-function averages of a module's parameters and stores snapshots of them.

    Call `step` once after each optimizer step (`track` does it by a hook). The averages are float32
    whatever the model's dtype, live on the parameters' devices, and are exact for any update interval
    and batch size, because each update knows the true time since the last one. Training is never
    touched: no weights are swapped, no values are copied to the host between snapshots.

    Args:
        model: the module that is trained; wrappers (DistributedDataParallel, torch.compile) are fine.
        folder: where the snapshots go, see `SnapshotStore`.
        sigma_rels: relative lengths to track, in (0, 0.2887]. The default serves 0.015 to 0.25; the
            paper's choice is (0.05, 0.10), and (0.02, 0.06, 0.20) is better for one more copy.
        every: store a snapshot whenever training time passes a multiple of this, in clock units; None
            stores only when `snapshot` is called.
        clock: unit of time, "steps" or "images" (or any other samples).
        samples_per_step: with clock="images", images per optimizer step. `advance` overrides it.
        update_every: update the averages on every n-th step only. The profile stays as asked, at the
            resolution of n steps; before a snapshot they are always brought up to date.
        dtype: how averages are stored: "delta" (default; differences, tens of times more exact than
            float16 at fewer bytes), "delta-float16", "delta-int8", "float16", "float32" or "bfloat16".
        keep: keep so many stored averages at most, chosen anew at each snapshot such that lengths in
            `keep_range` come out best at whatever time training ends; all by default.
        keep_range: lengths that will be asked for, (low, high).
        raw: keep the raw weights of the "last" snapshot (default), of "all", or of "none".
        tensors: "all" stores frozen parameters too, "trainable" leaves them out, "auto" (default) takes
            the adapter of a PEFT model only, under PEFT's own names, and all of any other model.
        resume: continue the store that is in the folder, if there is one. Without it a folder that
            holds a store is refused.
        run_id: id of a new run; random by default.
        metadata: string map that goes into every file, for example a configuration.
        device: where the averages live; None (default): beside the parameters. "cpu" frees the
            accelerator: parameters are copied on a side stream and averaged by a thread meanwhile.
        kernel: how averages are updated: "eager", "compiled" (torch.compile), "triton" (CUDA), or
            "auto", the best for the device.
        average_dtype: "float32", or "bfloat16" with stochastic rounding for half the memory.
        background: write snapshots in a thread, from a copy in host memory, while training goes on;
            the next snapshot waits for the last. False writes before `step` returns.
        shard_averages: with replicas (DistributedDataParallel), split the averages over the ranks by
            rows; by default the first rank holds them all. Models that are sharded themselves (FSDP2,
            DTensor) always have their averages sharded alike.
        on_error: "warn" logs an error inside the tracker once and lets training go on; "raise" raises
            (for one in the background, at the next call).

    Raises:
        ConfigError: an argument is wrong.
        InvalidProfileError: a sigma_rel lies outside the family.
        SnapshotMismatchError: the folder already holds a store and resume is False.
        TrackingError: the model has nothing to average.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tracker = Tracker(model, tempfile.mkdtemp() + "/snapshots", every=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     _ = optimizer.step()
        ...     tracker.step()
        >>> tracker.store.times
        [2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        sigma_rels: Sequence[float] = DEFAULT_SIGMA_RELS,
        every: int | None,
        clock: Literal["steps", "images"] = "steps",
        samples_per_step: int | None = None,
        update_every: int = 1,
        dtype: str = DEFAULT_CODEC,
        keep: int | None = None,
        keep_range: tuple[float, float] = (0.02, 0.25),
        raw: Literal["last", "all", "none"] = "last",
        tensors: Literal["auto", "all", "trainable"] = "auto",
        resume: bool = False,
        run_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        device: str | torch.device | None = None,
        kernel: Literal["auto", "eager", "compiled", "triton"] = "auto",
        average_dtype: Literal["float32", "bfloat16"] = "float32",
        background: bool = True,
        shard_averages: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self._settings = Settings(
            sigma_rels=sigma_rels,
            every=every,
            clock=clock,
            samples_per_step=samples_per_step,
            update_every=update_every,
            dtype=dtype,
            keep=keep,
            keep_range=keep_range,
            raw=raw,
            tensors=tensors,
            device=device,
            kernel=kernel,
            average_dtype=average_dtype,
            background=background,
            shard_averages=shard_averages,
            on_error=on_error,
        )
        self._sigma_rels = tuple(self._settings.sigma_rels)
        self._gammas = gamma_from_sigma_rel(self._sigma_rels)
        self._model = TrackedModel(model, tensors)
        self._ranks = Ranks.of(
            model, self._model.live(), list(self._model.averaged()), shard_averages
        )
        self._recorder = Recorder(
            Path(os.path.abspath(folder)),  # noqa: PTH100  # a script may change its directory
            self._settings,
            self._model.table,
            self._ranks,
            run_id=run_id,
            metadata=metadata or {},
            resume=resume,
            failed=self._job_failed,
        )
        self._averages: Averages | None = None
        self._time = self._last_update = self._steps = self._pending = 0
        self._given_at = -1
        self._begun = self._due = False
        self._stopped = self._failed = self._closed = False
        self._failure: str | None = None
        self._job_error: Exception | None = None
        self._busy = self._updating = self._swapped = False
        # Put here by what follows an optimizer: takes its hooks off; counts a step that it has kept back;
        # forgets such a step.
        self._detach: Callable[[], None] = lambda: None
        self._settle: Callable[[], None] = lambda: None
        self._discard: Callable[[], None] = lambda: None

    # ---- looking

    @property
    def folder(self) -> Path:
        """Folder of the store."""
        return self._recorder.folder

    @property
    def time(self) -> int:
        """Training time so far, in clock units."""
        return self._time

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._steps

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """Relative lengths that are tracked."""
        return self._sigma_rels

    @property
    def store(self) -> SnapshotStore:
        """The store that snapshots go to, with all of them; made when it is first needed.

        On ranks that do not write it, it is open for reading.
        """
        self._recorder.wait()
        return self._recorder.open()

    @property
    def session(self) -> str:
        """A word that the ranks of a sharded run share and no other start of it has; else empty."""
        return self._ranks.session

    @property
    def num_snapshots(self) -> int:
        """Snapshots that this object has stored."""
        return self._recorder.num_snapshots

    @property
    def stopped(self) -> bool:
        """Whether tracking has ended, by `close` or by an error."""
        return self._stopped

    @property
    def failure(self) -> str | None:
        """Why tracking has stopped by itself; None if it has not."""
        return self._failure

    @property
    def busy(self) -> bool:
        """Whether a call is at work on the averages: a signal handler must not take a snapshot then."""
        return self._busy

    def averages(self, sigma_rel: float) -> dict[str, torch.Tensor]:
        """The tracked averages of one length as they are now: name -> float32 tensor.

        The tensors are for reading; whether they follow later updates depends on the kernel. Sharded
        averages are DTensors, cut as the parameters are: `full_tensor()` on all ranks makes them whole.

        Raises:
            TrackingError: `sigma_rel` is not tracked, nothing has been averaged yet, or another rank
                holds the averages.
        """
        if not self._ranks.tracks:
            raise TrackingError(
                f"the averages of replicas are on rank {self._ranks.members[0]} alone. Use them there, or "
                "give the tracker shard_averages=True."
            )
        if sigma_rel not in self._sigma_rels or self._averages is None:
            raise TrackingError(
                f"sigma_rel {sigma_rel!r} has no average now: tracked are {self._sigma_rels}, from the "
                "first step on. Other lengths: posthoc_ema.synthesize."
            )
        index = self._sigma_rels.index(sigma_rel)
        self._averages.wait()
        return {
            name: self._ranks.whole(name, self._averages.average(name, index))
            for name in self._averages.names
        }

    # ---- tracking

    def advance(self, samples: int) -> None:
        """Say how many samples the coming step takes, when that varies; adds up until the step.

        Call it once per micro-batch: gradient accumulation then counts by itself.

        Args:
            samples: images (or other samples), >= 1.

        Raises:
            ConfigError: the number is not positive and whole, or the clock counts steps.
        """
        if self._settings.clock == "steps":
            raise ConfigError("advance counts samples, this tracker steps: give it clock='images'.")
        if type(samples) is not int or samples < 1:
            raise ConfigError(f"samples must be a positive whole number, got {samples!r}.")
        self._settle()  # a step that is not counted yet must not take these samples
        self._pending += samples

    def step(self) -> None:
        """Count one optimizer step: advance the clock, update the averages, store a snapshot if due.

        Raises:
            TrackingError: on the first step of a folder that already holds a store, if no state was
                loaded; while averages are swapped into the model (`swapped`); or, with
                on_error="raise", for anything that goes wrong later.
        """
        if self._swapped:
            raise TrackingError(
                "an optimizer step came while averages were swapped into the model: it has trained the "
                "average. Step outside of `with tracker.swapped(...)` only."
            )
        if self._stopped:
            self._step_stopped()
            return
        if not self._begun:
            self._begin()
        self._guarded(self._step)

    def snapshot(self) -> list[SnapshotRecord]:
        """Store the averages as of now, and wait until they are; nothing happens if they are stored.

        Where averages are sharded, every rank calls this.

        Returns:
            The new records; empty if there are none, or if the tracker is closed.

        Raises:
            TrackingError: before the first step; or while averages are swapped into the model.
        """
        if self._time == 0:
            raise TrackingError(
                "a snapshot needs at least one step; time 0 never enters an average."
            )
        self._refuse_swapped("a snapshot")
        self._settle()
        return self._stored_by(self._snapshot)

    def _snapshot_averages(self) -> list[SnapshotRecord]:
        """Store the averages as of their last update, without raw weights.

        For when the model's weights are not those that training left: averages need them no more.
        """
        self._discard()
        return self._stored_by(self._record_averages) if self._last_update else []

    def _stored_by(self, action: Callable[[], None]) -> list[SnapshotRecord]:
        self._recorder.wait()
        self._recorder.written = []
        if self._failed:
            self._give_notice()
        elif self._ranks.tracks and not self._closed:
            if not self._begun:
                self._begin()
            self._guarded(action)
            self.flush()
        return list(self._recorder.written)

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped:
            raise TrackingError(
                f"{what} cannot be taken while averages are swapped into the model: its weights are not "
                "the trained ones. Take it outside of `with tracker.swapped(...)`."
            )

    def flush(self) -> None:
        """Wait until everything that was begun in the background is done.

        Raises:
            PhemaError: with on_error="raise", what went wrong there.
        """
        self._recorder.wait()
        self._guarded(self._wait_for_averages)

    def _wait_for_averages(self) -> None:
        if self._averages is not None and not self._failed:
            self._averages.wait()

    def _begin(self) -> None:
        """What the first step of this object needs: a store, and the other ranks."""
        agreed = {
            "time": self._time,
            "steps": self._steps,
            "clock": self._settings.clock,
            "sigma_rels": list(self._sigma_rels),
            "every": self._settings.every,
            "update_every": self._settings.update_every,
            "raw": self._settings.raw,
        }
        try:
            self._recorder.begin(agreed, self._check_beginning)
        except Exception as error:
            if self._ranks.sharded:  # the others have given up as well
                self._stopped, self._failure = True, str(error)
            raise
        self._begun = True

    def _check_beginning(self) -> None:
        if self._steps or self._recorder.is_open:
            return
        if self._settings.elapsed_per_step is None and not self._pending:
            raise TrackingError(
                "clock='images' needs to know the batch size: pass samples_per_step=N, or call "
                "tracker.advance(len(batch)) before each step."
            )
        if self._recorder.is_taken:
            raise TrackingError(
                f"{self.folder} holds snapshots, but training starts at time 0. Load the state that "
                "belongs to them (tracker.load_state_dict), or discard them (tracker.restart())."
            )

    def _step(self) -> None:
        self._advance_clock()
        if not self._ranks.tracks:
            return
        if self._steps % self._settings.update_every == 0:
            self._update()
        if self._due:
            self._snapshot()

    def _advance_clock(self) -> None:
        before, self._due = self._time, False
        elapsed = self._pending or self._settings.elapsed_per_step
        if elapsed is None:
            raise TrackingError(
                "this step's number of samples is unknown: call tracker.advance(n) before it."
            )
        self._time += elapsed
        self._pending = 0
        self._steps += 1
        every = self._settings.every
        self._due = every is not None and self._time // every > before // every

    def _step_stopped(self) -> None:
        """Where the others wait for this rank's part of a snapshot, say that tracking has stopped."""
        if self._ranks.awaited:
            with contextlib.suppress(TrackingError):
                self._advance_clock()
            if self._due:
                self._give_notice()

    def _give_notice(self) -> None:
        if self._failure is not None:
            self._recorder.give_notice(self._failure)

    @torch.no_grad()
    def _update(self) -> None:
        """Bring the averages to the present time (EDM2, eq. 127)."""
        if self._last_update == self._time:
            return
        parameters = self._ranks.parts(self._model.averaged())
        if self._averages is None:
            self._averages = self._new_averages(parameters)
        elapsed = self._time - self._last_update
        weights = power_update_weight(self._gammas, self._time, elapsed).tolist()
        # Ctrl-C between two tensors would leave some updated and others not, and a caught one would
        # go unnoticed: until the update is through, the averages count as broken.
        self._updating = True
        self._averages.update(parameters, weights, seed=self._time)
        self._last_update, self._updating = self._time, False
        self._ranks.updated(self._time)

    def _new_averages(self, parameters: Mapping[str, torch.Tensor]) -> Averages:
        return Averages(
            parameters,
            len(self._sigma_rels),
            kernel=self._settings.kernel,
            dtype=self._settings.average_dtype,
            device=self._settings.device,
        )

    # ---- snapshots

    def _snapshot(self) -> None:
        """Take a snapshot of the present time, and store it or have it stored."""
        self._recorder.wait()
        # What was in the background may have failed.
        if not self._failed and not self._recorder.has(self._time):
            self._update()
            self._recorder.record(self._take(raw=self._settings.raw != "none"))

    def _record_averages(self) -> None:
        if not self._recorder.has(self._last_update):
            self._recorder.record(self._take(raw=False))

    @torch.no_grad()
    def _take(self, raw: bool) -> TakenSnapshot:
        """The averages as of the last update, with the raw weights or without."""
        averages, time = self._averages, self._last_update
        assert averages is not None  # the update before has made them
        averages.wait()
        self._ranks.begin_snapshot()
        tensors = self._model.live()
        entries = self._model.table.entries.values()
        mine = [n for n in averages.names if self._ranks.is_written_here(n)]
        taken: dict[StoredProfile, Mapping[str, torch.Tensor]] = {
            PowerProfile(time, s): LazyTensors(mine, functools.partial(_average, averages, i))
            for i, s in enumerate(self._sigma_rels)
        }
        if raw:
            taken[PointProfile(time)] = self._ranks.parts({name: tensors[name] for name in mine})
        copied = {
            entry.name: local_part(tensors[entry.name])
            for entry in entries
            if not entry.averaged and self._ranks.is_written_here(entry.name)
        }
        return TakenSnapshot(time, taken, copied)

    # ---- evaluating

    def swapped(
        self,
        model: nn.Module | None = None,
        *,
        sigma_rel: float,
        at: int | None = None,
        train: bool | None = False,
        snapshot: bool = False,
        broadcast: bool = False,
    ) -> AbstractContextManager[nn.Module]:
        """Put the average of one length into the model for the time of a `with` block.

        The weights, the buffers and the train flags come back at its end, by an exception too. See
        `posthoc_ema.torch.swap.swapped`, which does the work.

        Args:
            model: the module that takes the average; the tracked one by default.
            sigma_rel: a tracked length: its average in memory; any other is synthesized from what is
                stored.
            at: stored training time at which the average ends.
            train: train flag inside; None leaves the flags alone.
            snapshot: store a snapshot first, if the length is not a tracked one.
            broadcast: replicas: the first rank sends the average to the others, which call this as well.

        Returns:
            A context manager that gives the module.

        Example:
            >>> import tempfile, torch
            >>> model = torch.nn.Linear(2, 1)
            >>> tracker = Tracker(model, tempfile.mkdtemp() + "/snapshots", every=1)
            >>> tracker.step()
            >>> with tracker.swapped(sigma_rel=0.07) as network:
            ...     network.training
            False
        """
        return swapped(
            self,
            model,
            sigma_rel=sigma_rel,
            at=at,
            train=train,
            snapshot=snapshot,
            broadcast=broadcast,
        )

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs; waits for snapshots that are being written.

        Returns:
            A dict of plain numbers and strings, and under "averages" name -> float32 tensor of shape
            (num_profiles, *shape): the live ones, so copy them if you keep a state in memory. Fit for
            `torch.save` (it loads with weights_only=True). Sharded averages are DTensors: call this on
            every rank, and save and load through `torch.distributed.checkpoint`. Of replicas the first
            rank has the averages.

        Raises:
            TrackingError: averages are swapped into the model, whose weights a checkpoint would hold.
        """
        self._settle()
        self._refuse_swapped("a checkpoint")
        self.flush()
        return self._state()

    def _state(self) -> dict[str, Any]:
        """The state of now, while a snapshot may still be being written."""
        self._wait_for_averages()
        self._given_at = self._last_update
        if self._averages is None and self._ranks.tracks and self._ranks.several:
            # torch.distributed.checkpoint loads into tensors that are there, before the first step.
            self._averages = self._new_averages(self._ranks.parts(self._model.averaged()))
        averages, rows = self._averages, len(self._sigma_rels)
        if self._ranks.writes and not self._recorder.is_taken:
            self._recorder.open()  # a new run has its id from its store
        return {
            "schema": STATE_SCHEMA,
            "run_id": self._recorder.run_id,
            "clock": self._settings.clock,
            "time": self._time,
            "last_update": self._last_update,
            "steps": self._steps,
            "pending": self._pending,
            "failed": self._failed,
            "sigma_rels": list(self._sigma_rels),
            "averages": {
                name: self._ranks.whole(name, averages.stack(name), rows) for name in averages.names
            }
            if averages and not self._failed
            else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, bit for bit; later snapshots in the store are removed.

        Load the model's weights first or afterwards, in any order.

        Args:
            state: from `state_dict`.

        Raises:
            TrackingError: the state does not fit this tracker; the message names the difference.
            SnapshotMismatchError: the folder holds another run or model.
        """
        self._rewind()
        check_state(state, self._sigma_rels, self._settings.clock, self._model.table)
        self._refuse_moved_on(state)
        missing = state["last_update"] and not state["averages"] and not state["failed"]
        if self._ranks.tracks and missing:
            raise TrackingError(
                "the state holds no averages: it is that of a replica that does not track. Load that of "
                f"rank {self._ranks.members[0]} on every rank."
            )
        time = int(state["time"])
        self._recorder.resume(state["run_id"], time)
        self._time, self._last_update = time, int(state["last_update"])
        self._steps, self._pending = int(state["steps"]), int(state["pending"])
        self._recover()
        if state["failed"]:
            self._stopped = self._failed = True
            self._failure = f"it had stopped before time {time}, in the run that was continued"
            _log.error(
                "tracking had stopped at time %d when this state was saved, training went on without "
                "it: it stays stopped. To track from here on start a new tracker in a new folder.",
                time,
            )
        self._begun = False
        self._forget_averages()
        if state["averages"] and self._ranks.tracks:
            averages = self._new_averages(self._ranks.parts(self._model.averaged()))
            for name, stack in state["averages"].items():
                averages.load(name, self._ranks.part_of_stack(name, stack))
            self._averages = averages

    def restart(self) -> None:
        """Discard what the folder holds of this run and begin at time 0, under the same run id."""
        self._rewind()
        self._recorder.restart()
        self._recover()
        self._forget_averages()
        self._begun = False
        self._time = self._last_update = self._steps = self._pending = 0

    def _rewind(self) -> None:
        """Before the tracker is put to another time: what is under way ends, or is forgotten."""
        if self._closed:
            raise TrackingError("the tracker is closed. Make a new one, with resume=True.")
        self._discard()
        self._recorder.wait()

    def _recover(self) -> None:
        """What went wrong belongs to a past that is given up."""
        self._stopped = self._failed = self._updating = False
        self._failure = self._job_error = None

    def _refuse_moved_on(self, state: Mapping[str, Any]) -> None:
        """The tensors of `state_dict` are the live ones: later they are not those of its time."""
        live = self._averages
        # torch.distributed.checkpoint loads into the tensors that state_dict has just given: those have
        # not moved on.
        if live is None or self._failed or self._last_update == self._given_at:
            return
        for name, stack in state["averages"].items():
            mine = self._ranks.whole(name, live.stack(name), len(self._sigma_rels))
            part = local_part(stack)  # an empty one has no address
            if part.numel() and part.data_ptr() == local_part(mine).data_ptr():
                raise TrackingError(
                    "the averages of this state are the tracker's own tensors, which have moved on since "
                    "it was taken. Keep a copy: copy.deepcopy(tracker.state_dict())."
                )

    def _forget_averages(self) -> None:
        averages, self._averages = self._averages, None
        if averages is not None:
            averages.close()

    # ---- ending

    def close(self) -> None:
        """Stop tracking: the hook goes, what is being written is finished, the folder is given free."""
        with (
            contextlib.ExitStack() as stack
        ):  # from the last to the first, whatever one of them raises
            stack.callback(self._recorder.close)
            if self._averages is not None:
                stack.callback(self._averages.close)
            stack.callback(self.flush)
            stack.callback(self._end)
            self._settle()

    def _end(self) -> None:
        self._detach()
        self._detach = self._settle = self._discard = lambda: None
        self._stopped = self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run `action`; with on_error="warn", an error is logged and training goes on."""
        earlier, self._job_error = self._job_error, None
        self._busy = True
        try:
            action()
            if earlier is not None:  # of a snapshot before; what is counted now is counted
                raise earlier
        except Exception as error:
            if self._settings.on_error == "warn":
                self._report(error)
                return
            if self._updating:
                self._stop(str(error) or type(error).__name__)
            raise
        finally:
            self._busy = False
            if self._updating and not self._failed:  # Ctrl-C in the middle of an update
                self._stop("an update was interrupted between two tensors")
                _log.error(
                    "tracking stopped at time %d: an update was interrupted between two tensors. "
                    "Resume from the last checkpoint.",
                    self._time,
                )

    def _stop(self, failure: str) -> None:
        self._stopped = self._failed = True
        self._failure = failure

    def _job_failed(self, error: Exception) -> None:
        """Called in the background, with what storing a snapshot raised."""
        if self._settings.on_error == "raise":
            self._job_error = error
        else:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if isinstance(error, SnapshotWriteError):
            _log.error("snapshot at time %d not stored: %s", self._recorder.begun_at, error)
            return  # the averages are whole; the next snapshot may succeed
        self._stop(str(error) or type(error).__name__)
        _log.error(
            "tracking stopped at time %d, training goes on: %s", self._time, error, exc_info=error
        )
        if self._due and self._recorder.begun_at != self._time:
            self._give_notice()
