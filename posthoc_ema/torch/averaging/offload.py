"""Averages on the host for parameters on a device: the arithmetic runs beside the training.

An update copies the parameters into staging memory and returns; a thread does the rest. From a CUDA device
the copy runs on a stream of its own into page-locked memory: what the training enqueues next waits for it
by an event on the device, the host never does. Two sets of staging memory let one be filled while the other
is being averaged; a third update waits for the first.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from posthoc_ema.errors import TrackingError

SETS = 2
"""Sets of staging memory."""
_Job = Callable[[bool], None]


class StagingSet:
    """Host memory for one copy of all parameters, and the events after which it is complete.

    Args:
        number: of this set.
        check: raises if parameters cannot be averaged; called when they have changed.
    """

    def __init__(self, number: int, check: Callable[[Sequence[torch.Tensor]], None]) -> None:
        self.number = number
        self._check = check
        self.tensors: list[torch.Tensor] = []
        self._kinds: list[tuple[object, ...]] = []
        self._events: list[torch.cuda.Event] = []

    def fill(
        self, parameters: Sequence[torch.Tensor], streams: dict[torch.device, torch.cuda.Stream]
    ) -> None:
        """Copy the parameters here; those on CUDA devices without waiting for it.

        Args:
            parameters: the live tensors.
            streams: one for each CUDA device; made where missing.
        """
        kinds = [(p.shape, p.dtype, p.stride(), p.is_cuda) for p in parameters]
        if kinds != self._kinds:
            self._check(parameters)
            self.tensors = [_staging_like(p) for p in parameters]
            self._kinds = list(kinds)
        self._events = []
        on_device: dict[torch.device, list[int]] = {}
        for i, parameter in enumerate(parameters):
            if parameter.is_cuda:
                on_device.setdefault(parameter.device, []).append(i)
            else:
                self.tensors[i].copy_(parameter)
        for device, indices in on_device.items():
            if device not in streams:
                streams[device] = torch.cuda.Stream(device)
            self._copy_beside([parameters[i] for i in indices], indices, streams[device])

    def _copy_beside(
        self, parameters: list[torch.Tensor], indices: list[int], stream: torch.cuda.Stream
    ) -> None:
        training = torch.cuda.current_stream(stream.device)
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            for i, parameter in zip(indices, parameters, strict=True):
                self.tensors[i].copy_(parameter, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        training.wait_event(event)  # the next optimizer step must not overtake the copy
        self._events.append(event)

    def complete(self) -> None:
        """Wait until the copy has arrived; for the worker."""
        for event in self._events:
            event.synchronize()


def _staging_like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(
        parameter.detach(), device="cpu", pin_memory=parameter.is_cuda, requires_grad=False
    )


class _State:
    """What the thread tells the others; apart from `Offload`, so that the thread keeps nothing alive."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.pending = 0
        self.error: BaseException | None = None


class Offload:
    """Copies parameters and has a thread work on the copies, in order.

    Args:
        work: called in the thread with the copied tensors, the weights, the seed and the number of the
            staging set.
        check: raises if parameters cannot be averaged; called when they have changed.
    """

    def __init__(
        self,
        work: Callable[[Sequence[torch.Tensor], Sequence[float], int, int], None],
        check: Callable[[Sequence[torch.Tensor]], None],
    ) -> None:
        self._work = work
        self._sets: queue.SimpleQueue[StagingSet] = queue.SimpleQueue()
        for number in range(SETS):
            self._sets.put(StagingSet(number, check))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._state = _State()
        self._stop: Callable[[], object] | None = None
        self._process = os.getpid()

    def submit(
        self, parameters: Sequence[torch.Tensor], weights: Sequence[float], seed: int
    ) -> None:
        """Copy the parameters and return; waits only while both staging sets are in work.

        Raises:
            TrackingError: an earlier job has failed, or this is a fork of the process that began.
        """
        self._check()
        staging = self._sets.get()
        try:
            staging.fill(parameters, self._streams)
        except BaseException:
            self._sets.put(staging)
            raise

        work, sets = self._work, self._sets

        def job(skip: bool) -> None:
            try:
                if not skip:
                    staging.complete()
                    work(staging.tensors, weights, seed, staging.number)
            finally:
                sets.put(staging)

        self._start()
        with self._state.changed:
            self._state.pending += 1
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait until all jobs are done.

        Raises:
            TrackingError: a job has failed, or this is a fork of the process that began.
        """
        self._check()
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: not state.pending or state.error is not None)
        self._check()

    def close(self) -> None:
        """Finish the jobs and end the thread."""
        if self._stop is not None and os.getpid() == self._process:
            self._stop()
        self._stop = None

    def _start(self) -> None:
        if self._stop is None:
            thread = threading.Thread(
                target=_run,
                args=(self._jobs, self._state),
                name="posthoc_ema averages",
                daemon=True,
            )
            thread.start()
            # Also at the end of the program: a thread in PyTorch's code must not outlive it.
            self._stop = weakref.finalize(self, _end, self._jobs, thread)

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise TrackingError(
                "averages in the host's memory belong to the process that began them; this is a fork. "
                "Start the tracker in the process that trains."
            )
        error = self._state.error
        if error is not None:
            raise TrackingError(
                "the averages in the host's memory are not whole any more: an update failed in the "
                f"background ({type(error).__name__}: {error}). Resume from the last checkpoint."
            ) from error


def _run(jobs: queue.SimpleQueue[_Job | None], state: _State) -> None:
    """The thread: jobs in order; they are skipped after the first error."""
    while (job := jobs.get()) is not None:
        try:
            job(state.error is not None)
        except BaseException as error:
            state.error = error
        del job  # it holds the averages
        with state.changed:
            state.pending -= 1
            state.changed.notify_all()


def _end(jobs: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
