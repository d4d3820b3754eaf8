"""The processes of one job: started by torchrun, or a single one.

Everything that several processes share goes through a `DistributedContext`: which part of the work this
one does, sums over all, one value for all. Alone it does nothing at all, so the same code serves both.

When a process ends, the others cannot go on. `started` turns what they meet then (a broken connection, the
launcher's signal) into one sentence that says what happened and what to do.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, rendezvous  # type: ignore[attr-defined]

from posthoc_ema import ConfigError, PhemaError

T = TypeVar("T")

_LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket|timed? ?out|gloo|nccl", re.I
)
"""What errors of a collective say when another process is gone."""


_latest: collections.deque[Any] = collections.deque(maxlen=16)
"""The latest sums. A thread of gloo that lets go of a sum last needs Python's lock for its tensors, and
waits for ever if the process group is being ended meanwhile under that lock; so it is never the last."""

QUIET_SECONDS = 0.05
"""How long the threads of a process group get, before it ends, to let go of everything else."""


class RankError(PhemaError):
    """Another process of the job has ended, so this one cannot go on."""


class OtherRankError(RankError):
    """Another process has failed and says why; this one only ends with it."""


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """This process among those of its job. Made by `started`.

    Attributes:
        rank: number of this process, 0..world_size - 1.
        world_size: number of processes.
        device: the device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes what is written once."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place; returns it.

        Args:
            tensor: of the same shape and dtype everywhere, on the CPU or on `device`.
        """
        if self.world_size > 1:
            work = dist.all_reduce(tensor, async_op=True)
            _latest.append(work)
            work.wait()
        return tensor

    def gather(self, value: T) -> list[T] | None:
        """The values of all processes in the order of their ranks, on the first one; None elsewhere.

        Args:
            value: anything that can be pickled, for example an array or a list. It travels through the
                host's memory, so this is for results, not for every step.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: T) -> T:
        """The first process's value, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            self.sum_(torch.zeros(1))  # on the CPU: a GPU's barrier would not hold up the host

    def agree(self, action: Callable[[], T], *, main_only: bool = False) -> T | None:
        """Do something on each process (or the first alone); if it fails on one, all of them raise.

        Args:
            action: what to do.
            main_only: only on the first process; the others wait for it.

        Returns:
            What `action` returned; None where it was not called.

        Raises:
            PhemaError: `action` raised it here, and on no process before this one.
            OtherRankError: it raised on another process, which says why.
        """
        failure: PhemaError | None = None
        value = None
        if self.is_main or not main_only:
            try:
                value = action()
            except PhemaError as error:
                failure = error
        failed = torch.full((self.world_size,), 0.0)
        failed[self.rank] = float(failure is not None)
        self.sum_(failed)
        if not failed.any():
            return value
        first = int(failed.argmax())
        if first == self.rank and failure is not None:
            raise failure
        raise OtherRankError(f"process {first} of {self.world_size} has failed and says why.")


def context(device: str = "auto") -> DistributedContext:
    """This process as torchrun's environment describes it; alone without torchrun.

    Args:
        device: "auto" (CUDA if there is one), "cpu", "cuda" (with several processes each takes one), or
            "cuda:N" for a single process.

    Raises:
        ConfigError: the device does not exist, or does not suffice for all processes of this machine.

    Example:
        >>> context("cpu")
        DistributedContext(rank=0, world_size=1, device=device(type='cpu'))
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        return DistributedContext(0, 1, resolve_device(device))
    target, local = resolve_device(device), int(os.environ.get("LOCAL_RANK", "0"))
    if target.type == "cuda":
        if target.index is not None:
            raise ConfigError(
                f"device {device!r} is one GPU, and there are {world_size} processes. Give cuda, and each "
                "process takes one; CUDA_VISIBLE_DEVICES chooses which."
            )
        target = resolve_device(f"cuda:{local}")
    return DistributedContext(int(os.environ["RANK"]), world_size, target)


@contextlib.contextmanager
def started(
    device: str = "auto", *, remedy: str = "Run the same command again."
) -> Iterator[DistributedContext]:
    """Join the processes that torchrun has started, for the time of a block.

    A single process is given as it is: nothing is initialised. CPU tensors travel by gloo, those of GPUs
    by NCCL. If a process group is up already, it is used and left.

    Args:
        device: see `context`.
        remedy: last sentence of the error when another process has ended.

    Raises:
        ConfigError: see `context`.
        RankError: another process has ended.

    Example:
        >>> with started("cpu") as ranks:
        ...     ranks.world_size, float(ranks.sum_(torch.ones(())))
        (1, 1.0)
    """
    ranks = context(device)
    if ranks.device.type == "cuda" and ranks.world_size > 1:
        torch.cuda.set_device(ranks.device)
    if ranks.world_size == 1 or dist.is_initialized():
        yield ranks
        return
    with _lost_ranks(ranks, remedy):
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        store = PrefixStore(f"phema/{next(_starts)}", _rendezvous())
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
        try:
            yield ranks
        finally:
            time.sleep(QUIET_SECONDS)
            with contextlib.suppress(RuntimeError):  # another process may be gone
                dist.destroy_process_group()
            _latest.clear()


_starts = itertools.count()
"""Numbers the process groups of this process: under one name, a second one would find the addresses of the
first, which the launcher's store keeps."""


@functools.cache
def _rendezvous() -> Any:
    """The key-value store that the launcher's environment describes."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store


def resolve_device(device: str) -> torch.device:
    """The device of a name.

    Args:
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: the name is unknown, or CUDA is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise ConfigError(
            f"device {device!r} does not exist: this machine has {count} CUDA devices that torch can "
            "use. Choose cpu or auto."
        )
    return resolved


@contextlib.contextmanager
def _lost_ranks(ranks: DistributedContext, remedy: str) -> Iterator[None]:
    """Say in one sentence that another process has ended, whichever way this one learns of it."""

    def lost(how: str) -> RankError:
        return RankError(
            f"another process of this job has ended, so process {ranks.rank} of {ranks.world_size} stops "
            f"too ({how}). {remedy}"
        )

    def on_signal(number: int, frame: object) -> None:
        raise lost("the launcher ends the job")

    in_main_thread = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, on_signal) if in_main_thread else None
    try:
        yield
    except RankError:
        raise
    except PhemaError as error:  # the library's ranks notice it too
        if "another rank has ended" not in str(error):
            raise
        raise lost("its connection is gone") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise lost(brief(error)) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, earlier)


def brief(error: BaseException) -> str:
    """The first line of an error of torch without its places in the source, at most 120 characters."""
    text = re.sub(r"\[[^\]]*\.(cc|h|cpp):\d+\] ", "", str(error).strip() or type(error).__name__)
    return text.splitlines()[0].split(". ")[0][:120]
