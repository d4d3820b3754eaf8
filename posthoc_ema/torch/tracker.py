"""Tracker: several power-function averages of a module at once, and snapshots of them."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from posthoc_ema.codecs import DEFAULT_CODEC, AnyArray, check_codec
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
from posthoc_ema.snapshot import CLOCKS, SnapshotRecord
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.averaging import new_stack, update_stack, weight_columns
from posthoc_ema.torch.parameters import live, tensor_table, to_numpy
from posthoc_ema.torch.retaining import thin_out
from posthoc_ema.torch.state import STATE_SCHEMA, check_state

_log = logging.getLogger("posthoc_ema")


def _positive(name: str, value: int | None) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")


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
        resume: continue the store that is in the folder, if there is one. Without it a folder that
            holds a store is refused.
        run_id: id of a new run; random by default.
        metadata: string map that goes into every file, for example a configuration.
        on_error: "warn" logs an error inside the tracker once and lets training go on; "raise" raises.

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
        resume: bool = False,
        run_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        _positive("every", every)
        _positive("samples_per_step", samples_per_step)
        _positive("update_every", update_every)
        _positive("keep", keep)
        if clock not in CLOCKS:
            raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}, got {clock!r}.")
        if clock == "steps" and samples_per_step is not None:
            raise ConfigError(
                "samples_per_step needs clock='images'; a step counts as 1 otherwise."
            )
        if raw not in ("last", "all", "none"):
            raise ConfigError(f"raw must be last, all or none, got {raw!r}.")
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"on_error must be warn or raise, got {on_error!r}.")
        self._sigma_rels = _lengths(sigma_rels)
        self._gammas = gamma_from_sigma_rel(self._sigma_rels)
        self._model = model
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
        self._table = tensor_table(model)
        self._averages: dict[str, torch.Tensor] = {}
        self._time = self._last_update = self._steps = self._pending = 0
        self._stored_at = 0  # time of the last snapshot; some of it may have been dropped since
        self._store: SnapshotStore | None = None
        self._stopped = self._failed = self._thinning_failed = False
        self._detach: Callable[[], None] = lambda: None
        self._folder_is_taken = (self._folder / MANIFEST).exists()
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
    def sigma_rels(self) -> tuple[float, ...]:
        """Relative lengths that are tracked."""
        return self._sigma_rels

    @property
    def store(self) -> SnapshotStore:
        """The store that snapshots go to; made when it is first needed."""
        return self._open_store()

    def averages(self, sigma_rel: float) -> dict[str, torch.Tensor]:
        """The tracked averages of one length as they are now: name -> float32 tensor, not a copy.

        Raises:
            TrackingError: `sigma_rel` is not tracked, or nothing has been averaged yet.
        """
        if sigma_rel not in self._sigma_rels or not self._averages:
            raise TrackingError(
                f"sigma_rel {sigma_rel!r} has no average now: tracked are {self._sigma_rels}, from the "
                "first step on. Other lengths: posthoc_ema.synthesize."
            )
        index = self._sigma_rels.index(sigma_rel)
        return {name: stack[index] for name, stack in self._averages.items()}

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
                loaded; or, with on_error="raise", for anything that goes wrong later.
        """
        if self._stopped:
            return
        if self._steps == 0 and self._store is None:
            self._begin()
        self._guarded(self._step)

    def snapshot(self) -> list[SnapshotRecord]:
        """Store the averages as of now; nothing happens if this time is stored already.

        Returns:
            The new records; empty if there are none.
        """
        if self._time == 0:
            raise TrackingError(
                "a snapshot needs at least one step; time 0 never enters an average."
            )
        records: list[SnapshotRecord] = []
        self._guarded(lambda: records.extend(self._snapshot()))
        return records

    def _begin(self) -> None:
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
        self._open_store()

    def _step(self) -> None:
        before = self._time
        elapsed = self._pending or self._samples_per_step
        if elapsed is None:
            raise TrackingError(
                "this step's number of samples is unknown: call tracker.advance(n) before it."
            )
        self._time += elapsed
        self._pending = 0
        self._steps += 1
        if self._steps % self._update_every == 0:
            self._update()
        if self._every is not None and self._time // self._every > before // self._every:
            self._snapshot()

    @torch.no_grad()
    def _update(self) -> None:
        """Bring the averages to the present time (EDM2, eq. 127)."""
        if self._last_update == self._time:
            return
        parameters = self._parameters()
        if not self._averages:
            self._averages = {
                name: new_stack(parameter, len(self._sigma_rels))
                for name, parameter in parameters.items()
            }
        elapsed = self._time - self._last_update
        weights = power_update_weight(self._gammas, self._time, elapsed).tolist()
        devices = list(dict.fromkeys(stack.device for stack in self._averages.values()))
        columns = weight_columns(weights, devices)
        # Ctrl-C between two tensors would leave some updated and others not, and a caught one would
        # go unnoticed: until the loop is through, the averages count as broken.
        was_failed, self._failed = self._failed, True
        for name, parameter in parameters.items():
            stack = self._averages[name]
            if stack.device != parameter.device:
                self._averages[name] = stack = stack.to(parameter.device)
                columns |= weight_columns(weights, [parameter.device])
            update_stack(stack, parameter, columns[stack.device])
        self._last_update, self._failed = self._time, was_failed

    @functools.cached_property
    def _slots(self) -> list[tuple[str, nn.Module, str]]:
        """(name, owning module, attribute) of each averaged parameter.

        Looking parameters up by attribute at each update follows re-assignment (`.to`,
        `load_state_dict(assign=True)`) at a fraction of the cost of a state_dict.
        """
        by_id = {id(p): (m, key) for m in self._model.modules() for key, p in m._parameters.items()}
        tensors = live(self._model, self._table)
        return [
            (name, *by_id[id(tensors[name])])
            for name, entry in self._table.entries.items()
            if entry.averaged
        ]

    def _parameters(self) -> dict[str, torch.Tensor]:
        parameters: dict[str, torch.Tensor] = {}
        for name, owner, key in self._slots:
            parameter = owner._parameters.get(key)
            if parameter is None or tuple(parameter.shape) != self._table.entries[name].shape:
                raise TrackingError(
                    f"parameter {name!r} was removed or reshaped while it was tracked. Start a new "
                    "tracker with a new folder for the changed model."
                )
            parameters[name] = parameter
        return parameters

    # ---- snapshots

    @torch.no_grad()
    def _snapshot(self) -> list[SnapshotRecord]:
        store = self._open_store()
        profiles = [PowerProfile(self._time, s) for s in self._sigma_rels]
        if self._stored_at == self._time or all(store.find(self._time, p) for p in profiles):
            return []
        self._update()
        tensors = live(self._model, self._table)
        self._check_identity(tensors)
        averages = [
            NewAverage(profile, self._dtype, functools.partial(self._read, tensors, index))
            for index, profile in enumerate(profiles)
        ]
        if self._raw != "none":
            read_raw = functools.partial(self._read, tensors, None)
            averages.append(NewAverage(PointProfile(self._time), self._dtype, read_raw))
        records = store.add(self._time, averages, replace_raw=self._raw == "last")
        self._stored_at = self._time
        if self._keep is not None:
            self._thin_out(store, self._keep)
        return [record for record in records if store.find(record.time, record.profile)]

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

    def _check_identity(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters().items():
            if tensors[name] is not parameter:
                raise TrackingError(
                    f"{name!r} is another parameter than the one that was tracked so far (a module was "
                    "replaced, or a tie was broken). Start a new tracker with a new folder."
                )

    def _read(self, tensors: dict[str, torch.Tensor], index: int | None, name: str) -> AnyArray:
        """Tensor `name` of average `index` (None: the raw weights) for the store."""
        tensor = tensors[name]
        if not self._table.entries[name].averaged:
            return to_numpy(tensor)
        return to_numpy(tensor.float() if index is None else self._averages[name][index])

    def _open_store(self) -> SnapshotStore:
        if self._store is None:
            self._store = SnapshotStore.create(
                self._folder,
                clock=self._clock,
                table=self._table,
                run_id=self._run_id,
                metadata=self._metadata,
            )
            self._run_id = self._store.run_id
        return self._store

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs; the tensors are the live ones, not copies.

        Returns:
            A dict of plain numbers and strings, and under "averages" name -> float32 tensor of shape
            (num_profiles, *shape). Fit for `torch.save` (it loads with weights_only=True).
        """
        return {
            "schema": STATE_SCHEMA,
            "run_id": self._open_store().run_id,
            "clock": self._clock,
            "time": self._time,
            "last_update": self._last_update,
            "steps": self._steps,
            "pending": self._pending,
            "failed": self._failed,
            "sigma_rels": list(self._sigma_rels),
            "averages": dict(self._averages),
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
        check_state(state, self._sigma_rels, self._clock, self._table)
        time = int(state["time"])
        if (self._folder / MANIFEST).exists():
            if self._store is not None:
                self._store.close()
            self._store = SnapshotStore.resume(
                self._folder,
                run_id=state["run_id"],
                clock=self._clock,
                table=self._table,
                time=time,
            )
        else:
            self._run_id = state["run_id"]
            if time:
                _log.warning(
                    "%s holds no snapshots of run %s: averages are synthesized from those that are "
                    "stored from time %d on.",
                    self._folder,
                    self._run_id,
                    time,
                )
            self._open_store()
        self._folder_is_taken = False
        self._run_id = state["run_id"]
        self._time, self._last_update = time, int(state["last_update"])
        self._steps, self._pending = int(state["steps"]), int(state["pending"])
        self._stopped = self._failed = bool(state["failed"])
        if self._failed:
            _log.error(
                "tracking had stopped at time %d when this state was saved, training went on without "
                "it: it stays stopped. To track from here on start a new tracker in a new folder.",
                time,
            )
        devices = {name: p.device for name, p in self._parameters().items()}
        self._averages = {
            name: tensor.detach().to(device=devices[name], dtype=torch.float32, copy=True)
            for name, tensor in state["averages"].items()
        }

    def restart(self) -> None:
        """Discard what the folder holds of this run and begin at time 0, under the same run id."""
        if (self._folder / MANIFEST).exists():
            if self._store is not None:
                self._store.close()
            held = SnapshotStore.open(self._folder)
            self._store = SnapshotStore.resume(
                self._folder, run_id=held.run_id, clock=self._clock, table=self._table, time=0
            )
            self._run_id = held.run_id
        self._folder_is_taken = False
        self._averages = {}
        self._time = self._last_update = self._steps = self._pending = 0

    # ---- ending

    def close(self) -> None:
        """Stop tracking: take the hook off the optimizer and give the folder free."""
        self._detach()
        self._detach = lambda: None
        self._stopped = True
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run `action`; with on_error="warn", an error is logged and training goes on."""
        try:
            action()
        except Exception as error:
            if self._on_error == "raise":
                raise
            if isinstance(error, SnapshotWriteError):
                _log.error("snapshot at time %d not stored: %s", self._time, error)
                return  # the averages are whole; the next snapshot may succeed
            self._stopped = self._failed = True
            _log.exception("tracking stopped at time %d, training goes on: %s", self._time, error)
        finally:
            if self._failed and not self._stopped:  # Ctrl-C in the middle of an update
                self._stopped = True
                _log.error(
                    "tracking stopped at time %d: an update was interrupted between two tensors. "
                    "Resume from the last checkpoint.",
                    self._time,
                )
