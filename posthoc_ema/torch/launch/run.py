"""One model that `phema track` tracks: its tracker, its saved states, its reports."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import Optimizer

from posthoc_ema.errors import TrackingError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.torch.distributed.sharding import is_sharded
from posthoc_ema.torch.launch.leader import LastSeen
from posthoc_ema.torch.launch.models import class_name
from posthoc_ema.torch.launch.options import tracker_options
from posthoc_ema.torch.launch.resume import (
    STATE_FOLDER,
    Continuation,
    Mark,
    counter_of,
    exact_state,
    find_state,
    is_empty,
    mark_of,
    times_of,
)
from posthoc_ema.torch.launch.states import KeptStates
from posthoc_ema.torch.launch.weights import LastWeights
from posthoc_ema.torch.state_files import load_state, saved_states
from posthoc_ema.torch.stepping import Iterations, parameters_of
from posthoc_ema.torch.tracker import Tracker

_log = logging.getLogger("posthoc_ema")


class _Moved(NamedTuple):
    """What the script has done to its optimizers since the last step.

    Attributes:
        counter: steps that the first optimizer had counted before.
        replaced: another optimizer has taken its place; False: a state was loaded.
    """

    counter: int | None
    replaced: bool


class _Watched(Iterations):
    """Iterations that call `look` before each step, and `left` after one that does not end an iteration."""

    def __init__(
        self,
        look: Callable[[], None],
        left: Callable[[], None],
        count: Callable[[], None],
        optimizers: Sequence[Optimizer],
    ) -> None:
        super().__init__(count, optimizers, optimizers[0])
        self._look, self._left = look, left

    def before(self, optimizer: Optimizer) -> None:
        """To be called when an outermost step of `optimizer` is about to begin."""
        self._look()
        super().before(optimizer)

    def after(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """To be called when an outermost step of `optimizer` has ended."""
        super().after(optimizer, *args, **kwargs)
        if self.open:
            self._left()


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
        self.iterations = _Watched(self._look_back, self._remember, self.count, optimizers)
        self._module = module
        # Not kept alive: a run is over when the script has dropped its optimizers.
        self._leader = cast(Optimizer, LastSeen(optimizers[0]))
        self._leading = weakref.ref(optimizers[0])
        self._initial = weakref.WeakSet(optimizers)
        self._first = mark
        self._moved: _Moved | None = None
        self._discarded = 0
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
        chosen = tracker_options(options)
        self._every = int(chosen["every"])
        self.tracker = Tracker(module, folder, resume=taken, **chosen)
        if found is not None:
            self._load(found)
            if options["resume"] == "nearest":
                _log.warning(
                    "continues from step %d; %d steps of gap%s.",
                    self.tracker.steps,
                    found.gap,
                    "" if found.exact or found.gap else ", but with other weights",
                )
        elif taken:
            self.tracker.restart()
        self._continued = self.tracker.steps
        if self._states is not None:
            self._states.begin(self.tracker.time)

    def _load(self, found: Continuation) -> None:
        state = load_state(found.saved, dict(self.tracker._model.averaged()))
        if found.gap:
            # The next step stands for all that were made since: one update over the whole gap.
            state["pending"] = (found.gap + 1) * (self._options["samples_per_step"] or 1)
        self.tracker.load_state_dict(state)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` trains parameters of this model."""
        owned = {id(parameter) for parameter in self._module.parameters()}
        return any(id(parameter) in owned for parameter in parameters_of(optimizer))

    def add(self, optimizer: Optimizer) -> None:
        """Notice when the script asks this optimizer for its state, and when it loads one."""
        if optimizer in self._followed:
            return
        self._followed.add(optimizer)
        if self._states is not None:
            optimizer.register_state_dict_post_hook(self._on_state_dict)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        if optimizer not in self._initial and self._takes_over(optimizer):
            self._settle()
            self._note_move(replaced=True)
            self._leading = weakref.ref(optimizer)
            self._leader = cast(Optimizer, LastSeen(optimizer))

    def _takes_over(self, optimizer: Optimizer) -> bool:
        """Whether a later optimizer trains on what the first one has trained."""
        leader = self._leading()
        if leader is None:
            return True
        return {id(p) for p in parameters_of(leader)} <= {id(p) for p in parameters_of(optimizer)}

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
            self._remember()
            if tracker.time // self._every > before // self._every:
                self._save()
                self.report()
            if self._snapshot_wanted:
                self._snapshot()
            if tracker.num_snapshots != self._told or self.tracker.stopped:
                self.report()  # of what was stored beside the training, too
        finally:
            self._working = False

    def _remember(self) -> None:
        self._weights.remember(self._leader)

    def _settle(self) -> None:
        """Count the iteration that is open, unless the weights are not those that it left any more."""
        if self.iterations.open and not self._weights.unchanged():
            self.iterations.discard()
        else:
            self.iterations.settle()

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
            self._settle()
            if self._moved is not None and self._weights.same_values() is False:
                self._look_back()  # the state is to be that of the place that training was put back to
            if not self.tracker.stopped:
                self._states.save_for_checkpoint(self.tracker, mark_of(self._leader))
        finally:
            self._working = False

    # ---- training is put back

    def _before_loading(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """The script loads a state of its optimizer, after a search for a rate or a loss that exploded."""
        if self._ended or self.tracker.stopped or os.getpid() != self._process:
            return
        self._settle()
        self._note_move(replaced=False)

    def _note_move(self, replaced: bool) -> None:
        if self._moved is None:
            self._moved = _Moved(counter_of(self._leader), replaced)
        elif replaced:
            self._moved = self._moved._replace(replaced=True)

    def _look_back(self) -> None:
        """Before the first step after such a change: go on, go back with it, or stop."""
        moved, self._moved = self._moved, None
        if moved is None or self.tracker.stopped or not self.tracker.steps:
            return
        same = self._weights.same_values()
        now = mark_of(self._leader)
        if same and (moved.replaced or moved.counter == now.counter):
            return
        self._working = True
        try:
            self._follow(moved, now, same is True)
        finally:
            self._working = False
            self.report()

    def _follow(self, moved: _Moved, now: Mark, same: bool) -> None:
        if self._states is not None:
            self._states.flush()
        certain = now.fingerprint is not None or not (
            moved.replaced or moved.counter == now.counter
        )
        if certain and now == self._first and not self._continued:
            self._put_back(None)
            return
        saved = exact_state(self.tracker.folder, now) if certain else None
        if saved is not None and saved.time != self.tracker.time:
            self._put_back(Continuation(saved))
        elif not same:
            self._snapshot_averages()
            self.tracker._guarded(lambda: self._refuse(now))

    def _put_back(self, found: Continuation | None) -> None:
        """Go back to a saved state, or to the beginning: what came after it is discarded."""
        tracker, steps = self.tracker, self.tracker.steps
        time = found.saved.time if found else 0
        if tracker._ranks.writes:
            self._discarded += sum(t > time for t in tracker.store.times)
        if found is None:
            tracker.restart()
        else:
            self._load(found)
        if self._states is not None:
            self._states.begin(tracker.time)
        self._continued = min(self._continued, tracker.steps)
        _log.warning(
            "at step %d the script put its training back: tracking %s, what came after it is discarded.",
            steps,
            f"continues from step {tracker.steps}" if found else "starts again at the beginning",
        )

    def _refuse(self, now: Mark) -> None:
        states = saved_states(self.tracker.folder / STATE_FOLDER)
        where = (
            "an optimizer that counts no steps" if now.counter is None else f"step {now.counter}"
        )
        raise TrackingError(
            f"after {self.tracker.steps} tracked steps the script put its training back to {where}, with "
            f"weights that belong to no saved state (those are at {times_of(states)}). The averages up to "
            "there are stored; track what follows in a process of its own, with another --out."
        )

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
                self._settle()
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
            "snapshots": self._told - self._discarded,
            "sigma_rels": list(tracker.sigma_rels),
            "failure": tracker.failure,
            "ended": self._ended,
            "every": self._every,
            "remark": self._remark,
        }
        self._note("report", json.dumps(report))
