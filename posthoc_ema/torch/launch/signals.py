"""The end of a tracked process, and signals that ask for a snapshot."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from posthoc_ema.torch.stepping import running_steps

if TYPE_CHECKING:
    from posthoc_ema.torch.launch.run import TrackedRun

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Ending:
    """Stores the last averages when the process ends: by itself, or by SIGTERM; SIGUSR1 stores and goes on.

    A signal is taken only where the script has left it at its default. It is acted on at once, unless an
    optimizer is stepping or the tracker is at work: then when that is done.

    Args:
        runs: what is tracked.
        finish: stores the last averages of all of them.
    """

    def __init__(self, runs: Sequence[TrackedRun], finish: Callable[[], None]) -> None:
        self._runs = runs
        self._finish = finish
        self._process = os.getpid()
        self._installed = self._finished = False
        self.asked: list[int] = []  # signals that have come and are not acted on yet
        atexit.register(self._at_exit)
        # Processes that multiprocessing has forked end without atexit, but not without this.
        multiprocessing.util.Finalize(None, self._at_exit, exitpriority=10)

    def install(self) -> None:
        """Take the signals; to be called when there is something to store."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        self._installed = True
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which has nothing to store
            _die(number)
            return
        self.asked.append(number)
        if not running_steps(frame):
            self.act_if_asked()

    def act_if_asked(self) -> None:
        """Do what a signal has asked for, if one has, and nothing is in the way."""
        if not self.asked or any(run.busy for run in self._runs):
            return
        asked, self.asked = self.asked, []
        if signal.SIGTERM in asked:
            self._at_exit()
            _die(signal.SIGTERM)
        for run in self._runs:
            run.request_snapshot()

    def _at_exit(self) -> None:
        if self._finished or os.getpid() != self._process:
            return
        self._finished = True
        self._finish()


def _die(number: int) -> None:
    """End as the signal would have ended the process without us."""
    with contextlib.suppress(ValueError):  # not in the main thread: it cannot have been taken there
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
