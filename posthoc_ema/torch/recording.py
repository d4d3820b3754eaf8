"""Where the snapshots of a tracker go: its store, written beside the training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posthoc_ema.errors import SnapshotError, SnapshotMismatchError, TrackingError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.profiles import PowerProfile
from posthoc_ema.snapshot import SnapshotRecord, TensorTable
from posthoc_ema.store import SnapshotStore
from posthoc_ema.torch.background import Background
from posthoc_ema.torch.distributed.ranks import Ranks
from posthoc_ema.torch.retaining import thin_out
from posthoc_ema.torch.settings import Settings
from posthoc_ema.torch.snapshots import TakenSnapshot

_log = logging.getLogger("posthoc_ema")


class Recorder:
    """The store of a tracker, on the rank that writes it; on the others, their parts of it.

    Args:
        folder: of the store.
        settings: of the tracker.
        table: the model's tensors.
        ranks: of a distributed run.
        run_id: of a new run; random if it is None.
        metadata: string map that goes into every file.
        resume: whether the folder may hold a store.
        failed: called with what went wrong in the background.

    Raises:
        SnapshotMismatchError: the folder holds a store, and `resume` is False.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        table: TensorTable,
        ranks: Ranks,
        *,
        run_id: str | None,
        metadata: Mapping[str, str],
        resume: bool,
        failed: Callable[[Exception], None],
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        self.begun_at = 0
        """Time of the last snapshot that was begun."""
        self.stored_at = 0
        """Time of the last that is stored; some of it may have been dropped since."""
        self.written: list[SnapshotRecord] = []
        """Records of the last snapshot."""
        self.num_snapshots = 0
        self._settings = settings
        self._table = table
        self._ranks = ranks
        self._metadata = dict(metadata)
        self._store: SnapshotStore | None = None
        self._jobs = Background(failed) if settings.background else None
        self._thinning_failed = self._has_diverged = False
        self.is_taken = ranks.writes and (folder / MANIFEST).exists()
        """Whether the folder holds a store that has not been decided about."""
        if self.is_taken and not resume:
            held = SnapshotStore.open(folder)
            raise SnapshotMismatchError(
                f"{folder} already holds run {held.run_id} up to time "
                f"{max(held.times, default=0)}. To continue that run pass resume=True and load the "
                "tracker's state; for a new run choose a new folder."
            )

    # ---- the store

    @property
    def is_open(self) -> bool:
        """Whether the store is open for writing."""
        return self._store is not None

    def open(self) -> SnapshotStore:
        """The store, made when it is first needed; on ranks that do not write it, open for reading."""
        if not self._ranks.writes:
            return SnapshotStore.open(self.folder)
        if self._store is None:
            self._store = SnapshotStore.create(
                self.folder,
                clock=self._settings.clock,
                table=self._table,
                run_id=self.run_id,
                metadata=self._metadata,
            )
            self.run_id = self._store.run_id
        return self._store

    def resume(self, run_id: str, time: int) -> None:
        """Go on with run `run_id` from `time`: later snapshots go."""
        if self._ranks.writes and (self.folder / MANIFEST).exists():
            self._take_over(run_id, time)
        self.run_id = run_id
        if self._ranks.writes and self._store is None:
            if time:
                _log.warning(
                    "%s holds no snapshots of run %s: averages are synthesized from those that are "
                    "stored from time %d on.",
                    self.folder,
                    run_id,
                    time,
                )
            self.open()
        self._forget()

    def restart(self) -> None:
        """Discard what the folder holds, and begin at time 0 under the same run id."""
        if self._ranks.writes and (self.folder / MANIFEST).exists():
            held = SnapshotStore.open(self.folder)
            self._take_over(held.run_id, 0)
            self.run_id = held.run_id
        self._forget()

    def _forget(self) -> None:
        self.is_taken = self._thinning_failed = self._has_diverged = False
        self.stored_at = self.begun_at = 0

    def _take_over(self, run_id: str, time: int) -> None:
        if self._store is not None:
            self._store.close()
        self._store = SnapshotStore.resume(
            self.folder,
            run_id=run_id,
            clock=self._settings.clock,
            table=self._table,
            time=time,
        )

    def begin(self, agreed: Mapping[str, Any], check: Callable[[], None]) -> None:
        """What the first step needs: the store, and the other ranks of a sharded run.

        Args:
            agreed: what must be the same on all ranks; "time" among them.
            check: raises if the store must not be begun; called where it is written.
        """
        if self._ranks.sharded:
            self._meet(agreed, check)
        elif self._ranks.writes:
            check()
            self.open()

    def _meet(self, agreed: Mapping[str, Any], check: Callable[[], None]) -> None:
        """Agree with the other ranks, see `Ranks.meet`."""
        from posthoc_ema.torch.distributed.snapshots import remove_left_parts

        self._ranks.arrive()
        problem: Exception | None = None
        first: dict[str, Any] = {}
        try:
            if self._ranks.writes:
                check()
                store = self.open()
                time = agreed["time"]
                first = {"run_id": store.run_id, "stored_at": time if self._has_found(time) else 0}
                remove_left_parts(self.folder)
        except Exception as error:
            problem = error  # the others hear of it when they meet
        try:
            told = self._ranks.meet(agreed, first, None if problem is None else str(problem))
        except TrackingError as error:
            raise problem or error from None
        self.run_id, self.stored_at = told["run_id"], told["stored_at"]

    def has(self, time: int) -> bool:
        """Whether the averages of `time` are stored; all ranks of a sharded run say the same."""
        return self.stored_at == time or (not self._ranks.sharded and self._has_found(time))

    def _has_found(self, time: int) -> bool:
        store, lengths = self._store, self._settings.sigma_rels
        return (
            store is not None
            and time > 0
            and all(store.find(time, PowerProfile(time, s)) for s in lengths)
        )

    # ---- snapshots

    def record(self, taken: TakenSnapshot) -> None:
        """Store a snapshot, or have it stored: then from a copy, after the one before is done."""
        self.begun_at = taken.time
        store = self.open() if self._ranks.writes else None
        if self._jobs is None:
            self._write(store, taken)
        else:
            copy = taken.on_host()
            self._jobs.start(lambda: self._write(store, copy))

    def wait(self) -> None:
        """Wait until what was begun is stored."""
        if self._jobs is not None:
            self._jobs.wait()

    def _write(self, store: SnapshotStore | None, taken: TakenSnapshot) -> None:
        self._check_finite(taken)
        dtype, replace_raw = self._settings.dtype, self._settings.raw == "last"
        if self._ranks.sharded:
            from posthoc_ema.torch.distributed.snapshots import store_parts

            records = store_parts(
                self._ranks, self.folder, store, taken, dtype, replace_raw=replace_raw
            )
        else:
            assert store is not None  # one process writes what it takes
            records = taken.add_to(store, dtype, replace_raw=replace_raw)
        self.stored_at = taken.time
        self.num_snapshots += 1
        if store is not None:
            self._thin_out(store)
            records = [r for r in records if store.find(r.time, r.profile)]
        self.written = records

    def _check_finite(self, taken: TakenSnapshot) -> None:
        """Say once that the averages have diverged: nothing else would, they never recover."""
        name = None if self._has_diverged else taken.first_not_finite()
        if name is not None:
            self._has_diverged = True
            _log.warning(
                "the averages at time %d are not finite (first in %r): the weights had NaN or infinite "
                "values since the last snapshot, and an average keeps them for ever. Continue from a "
                "checkpoint before that.",
                taken.time,
                name,
            )

    def _thin_out(self, store: SnapshotStore) -> None:
        """Keep the budget; a damaged old file stops neither training nor storing."""
        if self._settings.keep is None:
            return
        try:
            thin_out(store, self._settings.keep, self._settings.keep_range)
        except SnapshotError as error:
            if not self._thinning_failed:
                _log.error(
                    "the store is not thinned any more, snapshots go on: %s After the run: `phema verify "
                    "--drop`, then `phema prune`.",
                    error,
                )
            self._thinning_failed = True

    def give_notice(self, reason: str) -> None:
        """Tell the ranks that wait for this one's part of a snapshot that there will be none."""
        if not self._ranks.awaited:
            return
        from posthoc_ema.torch.distributed.snapshots import give_notice

        notice = functools.partial(give_notice, self._ranks, reason)
        if self._jobs is None:
            notice()
        else:
            self._jobs.start(notice)

    def close(self) -> None:
        """Give the folder free."""
        if self._store is not None:
            self._store.close()
