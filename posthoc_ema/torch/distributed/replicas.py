"""Whether the ranks that track a plain model track the same one.

Of replicas the first rank alone has averages. Where no DistributedDataParallel says that the ranks' models
are replicas, they may be the stages of a pipeline, all but the first of which would be lost. So every rank
counts the table of its tensors in the key-value store of the process group, and the first rank looks at the
counts. Nobody waits: a tracker may be on the first rank alone.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from posthoc_ema.errors import TrackingError

_PREFIX = "posthoc_ema/tables/"
_counted: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""Store of a process group -> tables that this process tracks."""


def default_store() -> Any:
    """The key-value store of the default process group; None if that is gone or has none."""
    from torch.distributed import distributed_c10d

    if not torch.distributed.is_initialized():
        return None
    return distributed_c10d._get_default_store()


def table_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """A word for the names, shapes and dtypes of tensors, in any order."""
    rows = sorted((name, list(t.shape), str(t.dtype)) for name, t in tensors.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


class TableCheck:
    """Counts the table of this rank's model at once; the first rank compares later.

    Args:
        tensors: name -> tensor that is stored.
        rank: of this process in the default group.
        world_size: of that group.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> None:
        self._table, self._others = table_hash(tensors), world_size - 1
        self._is_done = rank > 0
        try:
            store = default_store()
            if store is None:
                self._is_done = True
                return
            mine = _counted.setdefault(store, set())
            if self._table not in mine and rank:
                store.add(_PREFIX + self._table, 1)
                store.add(_PREFIX + "all", 1)  # after the other, see `look`
            mine.add(self._table)
        except RuntimeError:  # the store cannot be reached: then nothing can be compared
            self._is_done = True

    def look(self) -> None:
        """On the first rank, compare with what the others have counted so far; at once on others.

        Raises:
            TrackingError: a rank tracks tensors that this one does not.
        """
        if self._is_done:
            return
        try:
            store = default_store()
            if store is None:
                return
            # The sum first: what is counted meanwhile can only make the rest larger.
            total = store.add(_PREFIX + "all", 0)
            counts = {table: store.add(_PREFIX + table, 0) for table in _counted[store]}
        except (RuntimeError, KeyError):
            return
        self._is_done = counts[self._table] == self._others
        if not self._is_done and total > sum(counts.values()):
            raise other_model("another rank tracks a model of other tensors than the first rank")


def other_model(what: str) -> TrackingError:
    """The error for ranks whose models differ.

    Args:
        what: in which way.
    """
    return TrackingError(
        f"{what}. All ranks of a tracker hold one model; for stages of a pipeline average saved "
        "checkpoints instead: `phema synth --from-checkpoints`."
    )
