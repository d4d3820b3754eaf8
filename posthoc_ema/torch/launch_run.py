"""One model that `phema track` tracks: its tracker, its saved states, its reports."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from posthoc_ema.manifest import MANIFEST
from posthoc_ema.torch.launch_leader import LastSeen
from posthoc_ema.torch.launch_models import class_name
from posthoc_ema.torch.launch_resume import STATE_FOLDER, Mark, find_state, is_empty, mark_of
from posthoc_ema.torch.launch_states import KeptStates
from posthoc_ema.torch.launch_weights import LastWeights
from posthoc_ema.torch.sharding import is_sharded
from posthoc_ema.torch.state_files import load_state
from posthoc_ema.torch.stepping import Iterations, parameters_of
from posthoc_ema.torch.tracker import Tracker

_log = logging.getLogger("posthoc_ema")
DEFAULT_EVERY = 1000


def tracker_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Tracker` from values of the options of `phema track`."""
    samples = options["samples_per_step"]
    names = (
        "update_every",
        "dtype",
        "keep",
        "raw",
        "tensors",
        "kernel",
        "average_dtype",
        "on_error",
    )
    chosen = {name: options[name] for name in names}
    if options["shard_averages"]:
        chosen["shard_averages"] = True
    return {
        **chosen,
        "sigma_rels": tuple(options["sigma_rels"]),
        "every": options["every"] or DEFAULT_EVERY * (samples or 1),
        "clock": "images" if samples else "steps",
        "samples_per_step": samples,
        "keep_range": tuple(options["keep_range"]),
        "device": None if options["device"] == "auto" else options["device"],
    }


class TrackedRun:
    """A model that is tracked in this process.

    Args:
        module: the model.
        optimizers: that train it, the one that steps first in an iteration first.
        folder: of the snapshots.
        mark: where the first optimizer stood before its first step in this process.
        options: values of the options of `phema track`.
        note: appends a line to the events of this run of `phema track`.

    Raises:
        TrackingError: the folder holds snapshots, and no saved state belongs to `mark`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        folder: Path,
        mark: Mark,
        options: Mapping[str, Any],
        note: Callable[[str, str], None],
    ) -> None:
        self.name = class_name(module)
        self.iterations = Iterations(self.count, optimizers, optimizers[0])
        self._module = module
        # Not kept alive: a run is over when the script has dropped its optimizers.
        self._leader = cast(Optimizer, LastSeen(optimizers[0]))
        self._note = note
        self._options = options
        self._states = KeptStates(folder / STATE_FOLDER) if options["states"] == "on" else None
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._process = os.getpid()
        self._working = False
        self._ended = False
        self._weights = LastWeights()
        self._remark = ""
        self._told = 0
        self._snapshot_wanted = False
        taken = (folder / MANIFEST).exists()
        found = None
        if taken and not options["restart"] and not is_empty(folder):
            found = find_state(folder, mark, options["resume"] == "nearest")
        if found is None and mark.counter:
            _log.warning(
                "the optimizer has made %d steps before: time, and with it the length of averages, counts "
                "from here, not from the beginning of training.",
                mark.counter,
            )
        self.tracker = Tracker(module, folder, resume=taken, **tracker_options(options))
        if found is not None:
            state = load_state(found.saved, self._averaged(module))
            if found.gap:
                # The next step stands for all that were made since: one update over the whole gap.
                state["pending"] = (found.gap + 1) * (options["samples_per_step"] or 1)
            self.tracker.load_state_dict(state)
        elif taken:
            self.tracker.restart()
        self._continued = self.tracker.steps
        if self._states is not None:
            self._states.begin(self.tracker.time)

    def _averaged(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return dict(self.tracker._model.averaged())

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` trains parameters of this model."""
        owned = {id(parameter) for parameter in self._module.parameters()}
        return any(id(parameter) in owned for parameter in parameters_of(optimizer))

    def add(self, optimizer: Optimizer) -> None:
        """Save the tracker's state whenever the script asks this optimizer for its own."""
        if optimizer in self._followed:
            return
        self._followed.add(optimizer)
        if self._states is not None:
            optimizer.register_state_dict_post_hook(self._on_state_dict)

    @property
    def busy(self) -> bool:
        """Whether the averages or the store are being worked on right now."""
        return self._working or self.tracker.busy

    # ---- an iteration is over

    def count(self) -> None:
        """Count one iteration."""
        tracker = self.tracker
        if tracker.stopped:
            return
        self._working = True
        try:
            before = tracker.time
            tracker.step()
            self._weights.remember(self._leader)
            every = self._every()
            if tracker.time // every > before // every:
                self._save()
                self.report()
            if self._snapshot_wanted:
                self._snapshot()
            if tracker.num_snapshots != self._told or self.tracker.stopped:
                self.report()  # of what was stored beside the training, too
        finally:
            self._working = False

    def _every(self) -> int:
        return int(tracker_options(self._options)["every"])

    def request_snapshot(self) -> None:
        """Store a snapshot now, or after the next step if the weights have been touched since the last."""
        if self.iterations.open or not self._weights.unchanged():
            self._snapshot_wanted = True
            return
        self._working = True
        try:
            self._snapshot()
        finally:
            self._working = False

    def _snapshot(self) -> None:
        self._snapshot_wanted = False
        if self.tracker.stopped or self.tracker.time == 0 or self._is_sharded():
            return
        self.tracker.snapshot()
        self._save()
        self.report()

    def _save(self) -> None:
        if self._states is not None and not self.tracker.stopped:
            self._states.save_for_snapshot(self.tracker, mark_of(self._leader))

    def _snapshot_averages(self) -> None:
        """Store the averages of the last step, when the weights are not those that it left any more."""
        tracker = self.tracker
        if tracker.stopped or tracker.time == 0 or self._is_sharded():
            return
        before = tracker.num_snapshots
        tracker._snapshot_averages()
        if tracker.num_snapshots > before and self._options["raw"] != "none":
            self._remark = (
                "the last snapshot has no raw weights, because the weights were changed after "
                f"step {tracker.steps}"
            )
        self.report()

    def _is_sharded(self) -> bool:
        return any(is_sharded(p) for p in parameters_of(self._leader))

    # ---- states

    def _on_state_dict(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """The script makes a checkpoint: what resuming from it needs is saved before it is written."""
        if self._ended or self.tracker.stopped or self._working or self._states is None:
            return
        if os.getpid() != self._process:  # a forked child
            return
        self._working = True
        try:
            self.iterations.settle()
            self._states.save_for_checkpoint(self.tracker, mark_of(self._leader))
        finally:
            self._working = False

    # ---- the end

    def finish(self, store: bool) -> None:
        """Count what is open, store the last averages, and say what was tracked.

        Args:
            store: False after an error: nothing is stored any more.
        """
        if self._ended:
            return
        self._working = True
        try:
            if store:
                self.iterations.settle()
                if self._weights.unchanged():
                    self._snapshot()
                else:
                    self._snapshot_averages()
            if self._states is not None:
                self._states.flush()
            self.tracker.close()
        except Exception as error:
            _log.error("the last snapshot was not stored: %s", error, exc_info=error)
        finally:
            self._ended = True
            self._working = False
            self.report()

    def report(self) -> None:
        """Say how far tracking has got; the last word of a process counts."""
        tracker = self.tracker
        if not tracker._ranks.writes:  # one rank speaks for all that track a sharded model
            return
        self._told = tracker.num_snapshots
        report = {
            "model": self.name,
            "folder": str(tracker.folder),
            "clock": "images" if self._options["samples_per_step"] else "steps",
            "time": tracker.time,
            "steps": tracker.steps,
            "continued": self._continued,
            "snapshots": self._told,
            "sigma_rels": list(tracker.sigma_rels),
            "failure": tracker.failure,
            "ended": self._ended,
            "every": self._every(),
            "remark": self._remark,
        }
        self._note("report", json.dumps(report))
