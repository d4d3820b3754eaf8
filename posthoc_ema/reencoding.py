"""The same store in another dtype: a new folder, the old one untouched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from posthoc_ema.codecs import AnyArray, check_codec
from posthoc_ema.errors import SnapshotMismatchError, SnapshotWriteError
from posthoc_ema.snapshot_files import AverageReader
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.measuring import measure
from posthoc_ema.tensor_files import fsync_directory


def reencode(
    store: SnapshotStore,
    folder: str | os.PathLike[str],
    dtype: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SnapshotStore:
    """Write a store anew with its averages in another dtype or codec.

    The run goes on in the new folder as it would in the old one: run id, times, raw weights and metadata
    are the same. What storage lost adds up, and the records say so.

    Args:
        store: the store to read.
        folder: where the new one goes; must not exist. It appears complete or not at all.
        dtype: "float32", "float16", "bfloat16", "delta-float16" or "delta-int8".
        progress: called with (averages done, averages in all).

    Returns:
        The new store, open for reading.

    Raises:
        ConfigError: unknown dtype.
        SnapshotMismatchError: `folder` exists.
        SnapshotFormatError: a file of the store is damaged.
        SnapshotWriteError: the new store cannot be written; nothing is left behind.

    Example:
        >>> smaller = reencode(SnapshotStore.open("snapshots"), "smaller", "delta-int8")  # doctest: +SKIP
    """
    codec, folder = check_codec(dtype), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotMismatchError(
            f"{folder} exists and is not empty; choose a new folder. A store is never converted in place."
        )
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    try:
        _copy(store, temporary, codec, progress)
        temporary.replace(folder)
        fsync_directory(folder.parent)
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder}: could not be written: {error.strerror}. Check the folder and its permissions."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SnapshotStore.open(folder)


def _copy(
    store: SnapshotStore,
    folder: Path,
    codec: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    done, noise = 0, _noise(store)
    with SnapshotStore.create(
        folder, clock=store.clock, table=store.table, run_id=store.run_id, metadata=store.metadata
    ) as new:
        for time in sorted({record.time for record in store.records}):
            with contextlib.ExitStack() as stack:
                averages: list[tuple[NewAverage, AverageReader]] = []
                for record in (r for r in store.records if r.time == time):
                    reader = stack.enter_context(store.read(record))
                    carried = NewAverage(record.profile, codec, _unused, noise[record.file])
                    averages.append((carried, reader))
                new.add_sources(time, averages)
                done += len(averages)
            if progress is not None:
                progress(done, len(store.records))


def _unused(name: str) -> AnyArray:
    raise AssertionError(name)  # the values come from a reader


def _noise(store: SnapshotStore) -> dict[str, float]:
    """Storage error of each average; what files of schema 1 do not say is told from their bits."""
    if all(record.noise is not None for record in store.records):
        return {record.file: record.noise or 0.0 for record in store.records}
    measured = measure(store, store.records).noise.tolist()
    return {record.file: noise for record, noise in zip(store.records, measured, strict=True)}
