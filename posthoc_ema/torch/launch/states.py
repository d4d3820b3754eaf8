"""Which saved states a tracked run keeps, and when they are written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posthoc_ema.torch.background import Background
from posthoc_ema.torch.launch.resume import Mark, extra_of
from posthoc_ema.torch.state_files import host_copy, remove_state, save_state, saved_states
from posthoc_ema.torch.tracker import Tracker

_log = logging.getLogger("posthoc_ema")
_CHECKPOINTS = 2
"""States kept for checkpoints of the script's: it may be killed while it writes the newest."""


class KeptStates:
    """The states of a run in files: that of the last snapshot, and those of the last checkpoints.

    A script asks its optimizer for its state when it makes a checkpoint. What belongs to it is on the disk
    before the checkpoint can be; what belongs to a snapshot is written while training goes on.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs = Background(self._failed)
        self._checkpoints: list[int] = []
        self._snapshots: list[int] = []
        self._lost: set[Path] = set()  # files of a future that is lost, or of a part of the ranks
        self._last = 0

    def begin(self, time: int) -> None:
        """The run goes on from `time`: earlier states may be those of checkpoints that are there.

        Later ones go when the first new one is there; other ranks may be looking at them now.
        """
        earlier = [state for state in saved_states(self._folder) if 0 < state.time <= time]
        self._checkpoints = sorted({state.time for state in earlier})[-_CHECKPOINTS - 1 :]
        known = {path for state in earlier for path in state.paths}
        self._lost = set(self._folder.glob("*.safetensors")) - known
        self._last = time if time in self._checkpoints else 0

    def save_for_checkpoint(self, tracker: Tracker, mark: Mark) -> None:
        """Save the state of now, and return when it is on the disk."""
        self._jobs.wait()
        self._checkpoints = [t for t in self._checkpoints if t != tracker.time] + [tracker.time]
        if self._is_new(tracker):
            # A snapshot in flight is of the past that the script will resume from: were it lost in a kill
            # after this, nothing would make it again.
            tracker.flush()
            self._guarded_write(tracker._state(), mark, tracker.session)

    def save_for_snapshot(self, tracker: Tracker, mark: Mark) -> None:
        """Save the state of now, while training goes on."""
        self._jobs.wait()
        self._snapshots = [*self._snapshots, tracker.time][-_CHECKPOINTS:]
        if self._is_new(tracker):
            state, session = host_copy(tracker._state()), tracker.session
            self._jobs.start(lambda: self._write(state, mark, session))

    def flush(self) -> None:
        """Wait until all is written."""
        self._jobs.wait()

    def _is_new(self, tracker: Tracker) -> bool:
        if tracker.time in (0, self._last):
            return False
        self._last = tracker.time
        return True

    def _guarded_write(self, state: Mapping[str, Any], mark: Mark, session: str) -> None:
        try:
            self._write(state, mark, session)
        except Exception as error:
            self._failed(error)

    def _write(self, state: Mapping[str, Any], mark: Mark, session: str) -> None:
        save_state(self._folder, state, extra_of(mark), session=session)
        for path in self._lost:
            path.unlink(missing_ok=True)
        self._lost = set()
        # Only those of which all ranks' files are there are listed, and count.
        states = saved_states(self._folder)
        there = {saved.time for saved in states}
        kept = {
            *[time for time in self._checkpoints if time in there][-_CHECKPOINTS:],
            *[time for time in self._snapshots if time in there][-1:],
        }
        for saved in states:
            if saved.time not in kept and saved.time < max(there):
                remove_state(saved)

    def _failed(self, error: Exception) -> None:
        self._last = 0
        _log.error(
            "the state for resuming was not saved, tracking goes on: %s", error, exc_info=error
        )
