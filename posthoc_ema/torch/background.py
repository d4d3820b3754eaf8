"""One job at a time beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs jobs in a thread of their own, one at a time: a new one waits for the last.

    The thread lives as long as its job, and Python waits for it at exit: what was begun is finished.

    Args:
        on_error: called in the thread with what a job raised.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Wait until the last job is done, then run this one beside the caller."""
        self.wait()

        def run() -> None:
            try:
                job()
            except Exception as error:
                self._on_error(error)

        thread = threading.Thread(target=run, name="posthoc-ema snapshot")
        try:
            thread.start()
        except RuntimeError:  # Python is shutting down, or there are no threads to be had
            run()
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait until no job is running; at once when called by a job."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None
