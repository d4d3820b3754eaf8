"""Tracker: several power-function averages of a module at once, and snapshots of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from posthoc_ema.codecs import DEFAULT_CODEC, check_codec
from posthoc_ema.errors import (
    ConfigError,
    SnapshotError,
    SnapshotMismatchError,
    SnapshotWriteError,
    TrackingError,
)
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.profiles import (
    DEFAULT_SIGMA_RELS,
    PointProfile,
    PowerProfile,
    gamma_from_sigma_rel,
    power_update_weight,
)
from posthoc_ema.retention import keep_online
from posthoc_ema.snapshot import CLOCKS, SnapshotRecord, StoredProfile
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.averaging import Averages
from posthoc_ema.torch.averaging.averages import DTYPES, KERNELS
from posthoc_ema.torch.background import Background
from posthoc_ema.torch.parameters import SELECTIONS, TrackedModel
from posthoc_ema.torch.ranks import Ranks
from posthoc_ema.torch.retaining import thin_out
from posthoc_ema.torch.sharding import local_part
from posthoc_ema.torch.snapshots import LazyTensors, TakenSnapshot
from posthoc_ema.torch.state import STATE_SCHEMA, check_state
from posthoc_ema.torch.swap import swapped

_log = logging.getLogger("posthoc_ema")


def _positive(name: str, value: int | None) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")


def _one_of(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _lengths(sigma_rels: Any) -> tuple[float, ...]:
    """The lengths as a tuple of floats; their range is checked where gamma is computed."""
    rule = f"sigma_rels must be one or more different numbers, such as (0.05, 0.10), got {sigma_rels!r}."
    try:
        lengths = [] if isinstance(sigma_rels, str) else [s + 0.0 for s in sigma_rels]
    except TypeError:
        raise ConfigError(rule) from None
    if not lengths or len(set(lengths)) != len(lengths):
        raise ConfigError(rule)
    return tuple(float(s) for s in lengths)


def _average(averages: Averages, index: int, name: str) -> torch.Tensor:
    return averages.average(name, index)


@dataclass(frozen=True)
class _Memory:
    """How the averages are held: the arguments of `Averages`."""

    kernel: str
    dtype: str
    device: torch.device | None

    @classmethod
    def checked(cls, kernel: str, dtype: str, device: str | torch.device | None) -> _Memory:
        _one_of("kernel", kernel, KERNELS)
        _one_of("average_dtype", dtype, DTYPES)
        try:
            return cls(kernel, dtype, None if device is None else torch.device(device))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"device must be one that PyTorch knows, such as 'cpu', or None for averages beside "
                f"the parameters, got {device!r} ({str(error).splitlines()[0]})."
            ) from None


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
        _positive("every", every)
        _positive("samples_per_step", samples_per_step)
        _positive("update_every", update_every)
        _positive("keep", keep)
        _one_of("clock", clock, CLOCKS)
        if clock == "steps" and samples_per_step is not None:
            raise ConfigError(
                "samples_per_step needs clock='images'; a step counts as 1 otherwise."
            )
        _one_of("raw", raw, ("last", "all", "none"))
        _one_of("tensors", tensors, SELECTIONS)
        _one_of("on_error", on_error, ("warn", "raise"))
        self._memory = _Memory.checked(kernel, average_dtype, device)
        self._sigma_rels = _lengths(sigma_rels)
        self._gammas = gamma_from_sigma_rel(self._sigma_rels)
        self._folder = Path(folder)
        self._every = every
        self._clock = clock
        self._samples_per_step = 1 if clock == "steps" else samples_per_step
        self._update_every = update_every
        self._dtype = check_codec(dtype)
        if keep is not None:
            keep_online(
                [PointProfile(1)], keep=keep, sigma_rels_range=keep_range
            )  # checks the range
        self._keep, self._keep_range = keep, keep_range
        self._raw = raw
        self._run_id = run_id
        self._metadata = dict(metadata or {})
        self._on_error = on_error
        self._model = TrackedModel(model, tensors)
        self._ranks = Ranks.of(
            model, self._model.live(), list(self._model.averaged()), shard_averages
        )
        self._begun = self._due = False
        self._averages: Averages | None = None
        self._time = self._last_update = self._steps = self._pending = 0
        self._taken_at = 0  # time of the last snapshot that was begun
        self._stored_at = (
            0  # and of the last that is stored; some of it may have been dropped since
        )
        self._written: list[SnapshotRecord] = []
        self._num_snapshots = 0
        self._store: SnapshotStore | None = None
        self._jobs = Background(self._job_failed) if background else None
        self._job_error: Exception | None = None
        self._stopped = self._failed = self._thinning_failed = self._has_diverged = False
        self._failure: str | None = None
        self._busy = self._updating = self._swapped = False
        self._detach: Callable[[], None] = lambda: None
        self._settle: Callable[[], None] = lambda: None  # counts a step of which it was not known
        self._folder_is_taken = self._ranks.writes and (self._folder / MANIFEST).exists()
        if self._folder_is_taken and not resume:
            held = SnapshotStore.open(self._folder)
            raise SnapshotMismatchError(
                f"{self._folder} already holds run {held.run_id} up to time "
                f"{max(held.times, default=0)}. To continue that run pass resume=True and load the "
                "tracker's state; for a new run choose a new folder."
            )

    # ---- looking

    @property
    def folder(self) -> Path:
        """Folder of the store."""
        return self._folder

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
        self._wait()
        return self._open_store() if self._ranks.writes else SnapshotStore.open(self._folder)

    @property
    def session(self) -> str:
        """A word that the ranks of a sharded run share and no other start of it has; else empty."""
        return self._ranks.session

    @property
    def num_snapshots(self) -> int:
        """Snapshots that this object has stored."""
        return self._num_snapshots

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
        if self._clock == "steps":
            raise ConfigError("advance counts samples, this tracker steps: give it clock='images'.")
        if type(samples) is not int or samples < 1:
            raise ConfigError(f"samples must be a positive whole number, got {samples!r}.")
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

        Returns:
            The new records; empty if there are none.

        Raises:
            TrackingError: before the first step; or while averages are swapped into the model.
        """
        if self._time == 0:
            raise TrackingError(
                "a snapshot needs at least one step; time 0 never enters an average."
            )
        self._refuse_swapped("a snapshot")
        self._settle()
        self._wait()
        self._written = []
        if self._failed:
            self._notify()
        elif self._ranks.tracks:
            if not self._begun:
                self._begin()
            self._guarded(self._snapshot)
            self.flush()
        return list(self._written)

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
        self._wait()
        if self._averages is not None:
            self._averages.wait()
        self._raise_from_job()

    def _wait(self) -> None:
        if self._jobs is not None:
            self._jobs.wait()

    def _begin(self) -> None:
        """What the first step of this object needs: a store, and the other ranks."""
        if self._ranks.sharded:
            try:
                self._meet()
            except Exception as error:
                self._stopped, self._failure = True, str(error)
                raise
        elif self._ranks.writes:
            self._begin_store()
        self._begun = True

    def _meet(self) -> None:
        """Agree with the other ranks of a sharded run, see `Ranks.meet`."""
        from posthoc_ema.torch.distributed_snapshots import remove_left_parts

        self._ranks.arrive()
        problem: Exception | None = None
        first: dict[str, Any] = {}
        try:
            if self._ranks.writes:
                first = self._begin_store()
                remove_left_parts(self._folder)
        except Exception as error:
            problem = error  # the others hear of it when they meet
        agreed = {
            "time": self._time,
            "steps": self._steps,
            "clock": self._clock,
            "sigma_rels": list(self._sigma_rels),
            "every": self._every,
            "update_every": self._update_every,
            "raw": self._raw,
        }
        try:
            told = self._ranks.meet(agreed, first, None if problem is None else str(problem))
        except TrackingError as error:
            raise problem or error from None
        self._run_id, self._stored_at = told["run_id"], told["stored_at"]

    def _begin_store(self) -> dict[str, Any]:
        """Open the store; returns what the other ranks want to know of it."""
        if self._steps == 0 and self._store is None:
            self._check_beginning()
        store = self._open_store()
        return {"run_id": store.run_id, "stored_at": self._time if self._is_stored(store) else 0}

    def _check_beginning(self) -> None:
        if self._clock == "images" and self._samples_per_step is None and not self._pending:
            raise TrackingError(
                "clock='images' needs to know the batch size: pass samples_per_step=N, or call "
                "tracker.advance(len(batch)) before each step."
            )
        if self._folder_is_taken:
            raise TrackingError(
                f"{self._folder} holds snapshots, but training starts at time 0. Load the state that "
                "belongs to them (tracker.load_state_dict), or discard them (tracker.restart())."
            )

    def _step(self) -> None:
        self._advance_clock()
        if not self._ranks.tracks:
            return
        if self._steps % self._update_every == 0:
            self._update()
        if self._due:
            self._snapshot()

    def _advance_clock(self) -> None:
        before, self._due = self._time, False
        elapsed = self._pending or self._samples_per_step
        if elapsed is None:
            raise TrackingError(
                "this step's number of samples is unknown: call tracker.advance(n) before it."
            )
        self._time += elapsed
        self._pending = 0
        self._steps += 1
        self._due = self._every is not None and self._time // self._every > before // self._every

    def _step_stopped(self) -> None:
        """Where the others wait for this rank's part of a snapshot, say that tracking has stopped."""
        if self._ranks.awaited:
            with contextlib.suppress(TrackingError):
                self._advance_clock()
            if self._due:
                self._notify()

    def _notify(self) -> None:
        if self._ranks.awaited and self._failure is not None:
            from posthoc_ema.torch.distributed_snapshots import give_notice

            notice = functools.partial(give_notice, self._ranks, self._failure)
            if self._jobs is None:
                notice()
            else:
                self._jobs.start(notice)

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

    def _new_averages(self, parameters: Mapping[str, torch.Tensor]) -> Averages:
        return Averages(
            parameters,
            len(self._sigma_rels),
            kernel=self._memory.kernel,
            dtype=self._memory.dtype,
            device=self._memory.device,
        )

    # ---- snapshots

    def _snapshot(self) -> None:
        """Take a snapshot of the present time, and store it or have it stored."""
        self._wait()
        self._raise_from_job()
        if self._failed:  # what was in the background has failed
            return
        store = self._open_store() if self._ranks.writes else None
        if self._stored_at == self._time or (not self._ranks.sharded and self._is_stored(store)):
            return
        self._update()
        taken = self._take()
        self._taken_at = taken.time
        if self._jobs is None:
            self._write(store, taken)
        else:
            copy = taken.on_host()
            self._jobs.start(lambda: self._write(store, copy))

    def _is_stored(self, store: SnapshotStore | None) -> bool:
        """Whether the averages of now are in the store."""
        return (
            store is not None
            and self._time > 0
            and all(store.find(self._time, PowerProfile(self._time, s)) for s in self._sigma_rels)
        )

    @torch.no_grad()
    def _take(self) -> TakenSnapshot:
        averages = self._averages
        assert averages is not None  # the update before has made them
        averages.wait()
        tensors = self._model.live()
        entries = self._model.table.entries.values()
        mine = [n for n in averages.names if self._ranks.is_written_here(n)]
        taken: dict[StoredProfile, Mapping[str, torch.Tensor]] = {
            PowerProfile(self._time, s): LazyTensors(mine, functools.partial(_average, averages, i))
            for i, s in enumerate(self._sigma_rels)
        }
        if self._raw != "none":
            raw = self._ranks.parts({name: tensors[name] for name in mine})
            taken[PointProfile(self._time)] = raw
        copied = {
            entry.name: local_part(tensors[entry.name])
            for entry in entries
            if not entry.averaged and self._ranks.is_written_here(entry.name)
        }
        return TakenSnapshot(self._time, taken, copied)

    def _write(self, store: SnapshotStore | None, taken: TakenSnapshot) -> None:
        self._check_finite(taken)
        replace_raw = self._raw == "last"
        if self._ranks.sharded:
            from posthoc_ema.torch.distributed_snapshots import store_parts

            records = store_parts(
                self._ranks, self._folder, store, taken, self._dtype, replace_raw=replace_raw
            )
        else:
            assert store is not None
            records = taken.add_to(store, self._dtype, replace_raw=replace_raw)
        self._stored_at = taken.time
        self._num_snapshots += 1
        if store is not None:
            if self._keep is not None:
                self._thin_out(store, self._keep)
            records = [r for r in records if store.find(r.time, r.profile)]
        self._written = records

    def _check_finite(self, taken: TakenSnapshot) -> None:
        """Say once that the averages have diverged: nothing else would, they never recover."""
        name = None if self._has_diverged else taken.first_not_finite()
        if name is not None:
            self._has_diverged = True
            _log.warning(
                "the averages at time %d are not finite (first in %r): the weights had NaN or infinite "
                "values since the last snapshot, and an average keeps them for ever. Continue from a "
                "checkpoint before that.",
                taken.time,
                name,
            )

    def _thin_out(self, store: SnapshotStore, keep: int) -> None:
        """Keep the budget; a damaged old file stops neither training nor storing."""
        try:
            thin_out(store, keep, self._keep_range)
        except SnapshotError as error:
            if not self._thinning_failed:
                _log.error(
                    "the store is not thinned any more, snapshots go on: %s After the run: `phema verify "
                    "--drop`, then `phema prune`.",
                    error,
                )
            self._thinning_failed = True

    def _open_store(self) -> SnapshotStore:
        if self._store is None:
            self._store = SnapshotStore.create(
                self._folder,
                clock=self._clock,
                table=self._model.table,
                run_id=self._run_id,
                metadata=self._metadata,
            )
            self._run_id = self._store.run_id
        return self._store

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
            (num_profiles, *shape), live ones or copies. Fit for `torch.save` (it loads with
            weights_only=True). Sharded averages are DTensors: call this on every rank, and save and
            load through `torch.distributed.checkpoint`. Of replicas the first rank has the averages.

        Raises:
            TrackingError: averages are swapped into the model, whose weights a checkpoint would hold.
        """
        self._settle()
        self._refuse_swapped("a checkpoint")
        self.flush()
        return self._state()

    def _state(self) -> dict[str, Any]:
        """The state of now, while a snapshot may still be being written."""
        if self._averages is not None:
            self._averages.wait()
        if self._averages is None and self._ranks.tracks and self._ranks.several:
            # torch.distributed.checkpoint loads into tensors that are there, before the first step.
            self._averages = self._new_averages(self._ranks.parts(self._model.averaged()))
        averages, rows = self._averages, len(self._sigma_rels)
        if self._ranks.writes and not self._folder_is_taken:
            self._run_id = self._open_store().run_id
        return {
            "schema": STATE_SCHEMA,
            "run_id": self._run_id,
            "clock": self._clock,
            "time": self._time,
            "last_update": self._last_update,
            "steps": self._steps,
            "pending": self._pending,
            "failed": self._failed,
            "sigma_rels": list(self._sigma_rels),
            "averages": {
                name: self._ranks.whole(name, averages.stack(name), rows) for name in averages.names
            }
            if averages
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
        self.flush()
        check_state(state, self._sigma_rels, self._clock, self._model.table)
        if self._ranks.tracks and state["last_update"] and not state["averages"]:
            raise TrackingError(
                "the state holds no averages: it is that of a replica that does not track. Load that of "
                f"rank {self._ranks.members[0]} on every rank."
            )
        time = int(state["time"])
        if self._ranks.writes:
            self._resume_store(state["run_id"], time)
        self._folder_is_taken = False
        self._run_id = state["run_id"]
        self._time, self._last_update = time, int(state["last_update"])
        self._steps, self._pending = int(state["steps"]), int(state["pending"])
        self._stored_at = 0
        self._stopped = self._failed = bool(state["failed"])
        if self._failed:
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

    def _resume_store(self, run_id: str, time: int) -> None:
        if (self._folder / MANIFEST).exists():
            if self._store is not None:
                self._store.close()
            self._store = SnapshotStore.resume(
                self._folder,
                run_id=run_id,
                clock=self._clock,
                table=self._model.table,
                time=time,
            )
        else:
            self._run_id = run_id
            if time:
                _log.warning(
                    "%s holds no snapshots of run %s: averages are synthesized from those that are "
                    "stored from time %d on.",
                    self._folder,
                    self._run_id,
                    time,
                )
            self._open_store()

    def restart(self) -> None:
        """Discard what the folder holds of this run and begin at time 0, under the same run id."""
        self.flush()
        if self._ranks.writes and (self._folder / MANIFEST).exists():
            if self._store is not None:
                self._store.close()
            held = SnapshotStore.open(self._folder)
            self._store = SnapshotStore.resume(
                self._folder,
                run_id=held.run_id,
                clock=self._clock,
                table=self._model.table,
                time=0,
            )
            self._run_id = held.run_id
        self._folder_is_taken = False
        self._forget_averages()
        self._begun = False
        self._time = self._last_update = self._steps = self._pending = self._stored_at = 0

    def _forget_averages(self) -> None:
        if self._averages is not None:
            self._averages.close()
        self._averages = None

    # ---- ending

    def close(self) -> None:
        """Stop tracking: the hook goes, what is being written is finished, the folder is given free."""
        self._settle()
        self._detach()
        self._detach = self._settle = lambda: None
        self._stopped = True
        try:
            self.flush()
        finally:
            if self._averages is not None:
                self._averages.close()
            if self._store is not None:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run `action`; with on_error="warn", an error is logged and training goes on."""
        self._raise_from_job()
        self._busy = True
        try:
            action()
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._report(error)
        finally:
            self._busy = False
            self._failed |= self._updating
            if self._updating and not self._stopped:  # Ctrl-C in the middle of an update
                self._stopped = True
                self._failure = "an update was interrupted between two tensors"
                _log.error(
                    "tracking stopped at time %d: an update was interrupted between two tensors. "
                    "Resume from the last checkpoint.",
                    self._time,
                )

    def _job_failed(self, error: Exception) -> None:
        """Called in the background, with what storing a snapshot raised."""
        if self._on_error == "raise":
            self._job_error = error
        else:
            self._report(error)

    def _raise_from_job(self) -> None:
        error, self._job_error = self._job_error, None
        if error is not None:
            raise error

    def _report(self, error: Exception) -> None:
        if isinstance(error, SnapshotWriteError):
            _log.error("snapshot at time %d not stored: %s", self._taken_at, error)
            return  # the averages are whole; the next snapshot may succeed
        self._stopped = self._failed = True
        self._failure = str(error) or type(error).__name__
        _log.error(
            "tracking stopped at time %d, training goes on: %s", self._time, error, exc_info=error
        )
        if self._due and self._taken_at != self._time:
            self._notify()
