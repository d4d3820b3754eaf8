"""Snapshots of a tracker: what is taken at one time, and how it goes into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from posthoc_ema.codecs import AnyArray
from posthoc_ema.snapshot import SnapshotRecord, StoredProfile
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.parameters import to_numpy


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are asked for: not all of them need to be in memory at once.

    Args:
        names: their names.
        read: name -> tensor.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], torch.Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class TakenSnapshot:
    """The averages of one time, on their way into a store.

    Attributes:
        time: training time.
        averages: profile -> name -> tensor; raw weights under a `PointProfile`, in their own dtype.
        copied: name -> tensor that is stored as it is.
    """

    time: int
    averages: Mapping[StoredProfile, Mapping[str, torch.Tensor]]
    copied: Mapping[str, torch.Tensor]

    def on_host(self) -> TakenSnapshot:
        """A copy in host memory, so that training can go on."""
        return replace(
            self,
            averages={profile: _host(tensors) for profile, tensors in self.averages.items()},
            copied=_host(self.copied),
        )

    def first_not_finite(self) -> str | None:
        """Name of the first averaged tensor with a value that is not finite; None if there is none."""
        any_average = next(iter(self.averages.values()))  # a NaN enters them all
        return next(
            (n for n, tensor in any_average.items() if not bool(tensor.isfinite().all())), None
        )

    def add_to(
        self, store: SnapshotStore, dtype: str, *, replace_raw: bool = True
    ) -> list[SnapshotRecord]:
        """Store it, see `SnapshotStore.add`."""
        new = [
            NewAverage(profile, dtype, _Reading(tensors, self.copied))
            for profile, tensors in self.averages.items()
        ]
        return store.add(self.time, new, replace_raw=replace_raw)


def _host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


@dataclass(frozen=True)
class _Reading:
    averaged: Mapping[str, torch.Tensor]
    copied: Mapping[str, torch.Tensor]

    def __call__(self, name: str) -> AnyArray:
        tensor = self.averaged.get(name)
        return to_numpy(self.copied[name]) if tensor is None else to_numpy(tensor.float())
