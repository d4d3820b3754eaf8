"""What the ranks of a tracker tell each other: a gloo group of their own, apart from the training's."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch.distributed.replicas import default_store

_log = logging.getLogger("posthoc_ema")

MEETING_SECONDS = 300.0
"""How long ranks wait for each other at the first step."""
ANSWER_SECONDS = 3600.0
"""How long ranks wait for each other later: the first one may be busy with a large snapshot. A rank that
has ended is noticed at once, by its connection."""
PATIENCE_SECONDS = 30.0
"""How long a rank waits for the others at the beginning of a snapshot before it says so."""


class RankGroup:
    """A gloo group of the ranks that share a store, for short messages.

    It goes on working when the program destroys its process groups: the last snapshot may still be
    on its way then.
    """

    def __init__(
        self, group: Any, members: Sequence[int], store: Any = None, rank: int = 0
    ) -> None:
        self._group, self.members = group, members
        self._store, self._rank, self._count = store, rank, 0

    @classmethod
    def meet(cls, members: Sequence[int]) -> RankGroup:
        """Make the group; every member calls this.

        Raises:
            TrackingError: a rank did not come in time.
        """
        try:
            # Whoever has answered in the first group is there: the second may wait long.
            cls(_new_group(members, MEETING_SECONDS), members)._gather_bytes(b"")
            group = _new_group(members, ANSWER_SECONDS)
            return cls(group, members, _own_store(), torch.distributed.get_rank())
        except RuntimeError as error:
            raise TrackingError(
                f"the ranks {list(members)} did not all come to the first step of the tracker within "
                f"{MEETING_SECONDS:.0f} s ({_brief(error)}). Make the tracker on every rank, before the "
                "same step."
            ) from error

    def gather(self, value: Any, *, begins: bool = False) -> list[Any]:
        """Tell all ranks a value, JSON, and hear theirs, in the order of the members.

        Args:
            value: of this rank.
            begins: whether all ranks should come at about the same time, so that long waiting is said.

        Raises:
            TrackingError: a rank has ended or does not answer.
        """
        self._count += 1
        self._show()
        try:
            found = self._gather_bytes(json.dumps(value).encode(), begins)
        except RuntimeError as error:
            raise TrackingError(
                f"another rank has ended or does not answer ({self._absent()}: {_brief(error)}). Snapshots "
                "need all ranks: call `snapshot` on every rank; if one has died, start the run again from "
                "its last checkpoint."
            ) from error
        return [json.loads(data) for data in found]

    def _key(self, rank: int) -> str:
        return f"posthoc_ema/gathered/{self._group.group_name}/{rank}"

    def _show(self) -> None:
        """Let the others see that this rank has come to its next gathering."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the process that keeps it may be gone
                self._store.set(self._key(self._rank), str(self._count))

    def _absent(self) -> str:
        """For whom this rank waits, in words."""
        with contextlib.suppress(RuntimeError):
            ranks = [] if self._store is None else [r for r in self.members if self._is_absent(r)]
            if ranks:
                return f"waiting for ranks {ranks}"
        return "waiting for other ranks"

    def _is_absent(self, rank: int) -> bool:
        key = self._key(rank)
        return not self._store.check([key]) or int(self._store.get(key)) < self._count

    def _wait(self, work: Any) -> None:
        """Wait for all ranks, and say so when it takes long."""
        try:
            work.wait(datetime.timedelta(seconds=PATIENCE_SECONDS))
        except RuntimeError:
            if not work.is_completed():
                _log.warning(
                    "a snapshot is %s for %.0f s; `snapshot` is for all ranks: call it on every rank.",
                    self._absent(),
                    PATIENCE_SECONDS,
                )
            work.wait()  # raises once more what has gone wrong, if not only the time was up

    def _gather_bytes(self, data: bytes, begins: bool = False) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _no_bytes()
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in self.members]
        work = self._group.allgather([sizes], [torch.tensor([len(data)], device="cpu")])
        self._wait(work) if begins else work.wait()
        longest = max(int(size) for size in sizes)
        if not longest:
            return [b""] * len(self.members)
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        padded[: len(mine)] = mine
        found = [torch.zeros(longest, dtype=torch.uint8, device="cpu") for _ in self.members]
        self._group.allgather([found], [padded]).wait()
        return [bytes(row[: int(size)].numpy()) for row, size in zip(found, sizes, strict=True)]


def _no_bytes() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.uint8, device="cpu")


def _new_group(members: Sequence[int], seconds: float) -> Any:
    return torch.distributed.new_group(
        list(members),
        timeout=datetime.timedelta(seconds=seconds),
        backend="gloo",
        use_local_synchronization=True,  # other ranks may be at work on another model
    )


def _own_store() -> Any:
    """The key-value store of the process group, by a connection of its own; None if it gives none.

    One connection does one thing at a time: on that of the training, a thread would wait for what the
    training waits for, on every rank for the other.
    """
    try:
        store = default_store()
        return None if store is None else store.clone()
    except (RuntimeError, AttributeError):  # not in earlier versions of PyTorch
        return None


def _brief(error: Exception) -> str:
    """The first sentence of an error of gloo, without lines of its source."""
    text = re.sub(r"\[\S+\.(cc|h):[0-9]+\] ", "", str(error).strip() or type(error).__name__)
    return re.split(r"\. |\n", text)[0][:160]
