"""Finding raw checkpoints and the training times at which they were saved."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from posthoc_ema.errors import ConfigError, SnapshotFormatError, SnapshotNotFoundError
from posthoc_ema.manifest import MANIFEST
from posthoc_ema.snapshot import METADATA_KEY
from posthoc_ema.synthesis.checkpoint_files import is_checkpoint
from posthoc_ema.tensor_files import read_header

_DTYPES = re.compile(r"(?<![a-z])(?:fp|bf|f|float|bfloat|int)\d+", re.I)
_NUMBER = re.compile(r"\d+")
_DECIMALS = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class TimedCheckpoint:
    """Where a checkpoint is, and its training time."""

    time: int
    path: Path


def find_checkpoints(
    paths: Sequence[Path], times: Sequence[int] | None = None
) -> list[TimedCheckpoint]:
    """Checkpoints behind the arguments of a command, by time.

    Args:
        paths: checkpoints (files or folders), folders of checkpoints, or one listing: a .txt file of
            lines `time path`, paths relative to it.
        times: their times, in the order of `paths`; else the last number in each name
            (checkpoint-1000, step_000123.safetensors, or the folder above).

    Returns:
        The checkpoints, by rising time. One at time 0 holds no training and is left out.

    Raises:
        SnapshotNotFoundError: a path does not exist, or holds no checkpoints.
        ConfigError: a time cannot be told, or two checkpoints have the same.
    """
    if len(paths) == 1 and paths[0].suffix == ".txt":
        found = _listing(paths[0])
    else:
        files = [file for path in paths for file in _inside(path)]
        if times is not None and len(times) != len(files):
            raise ConfigError(
                f"--times has {len(times)} values for {len(files)} checkpoints "
                f"({', '.join(f.name for f in files[:4])}, ...). Give one for each, in this order."
            )
        given = times if times is not None else [time_of(file) for file in files]
        found = [TimedCheckpoint(t, file) for t, file in zip(given, files, strict=True)]
    ordered = sorted((c for c in found if c.time > 0), key=lambda c: c.time)
    if not ordered:
        raise SnapshotNotFoundError(
            f"{paths[0]} holds no checkpoint of a time above 0. Give checkpoints with --times, or name "
            "them by their step as in checkpoint-1000."
        )
    for one, other in itertools.pairwise(ordered):
        if one.time == other.time:
            raise ConfigError(
                f"{one.path} and {other.path} are both of time {one.time}. Give one of them only, or the "
                "right times with --times."
            )
    return ordered


def _inside(path: Path) -> list[Path]:
    """A checkpoint itself, or the checkpoints in a folder, in natural order of their names."""
    if not path.exists():
        raise SnapshotNotFoundError(f"{path} does not exist. Check the path.")
    if (path / MANIFEST).exists():
        raise ConfigError(
            f"{path} holds tracked averages, which are better; leave out --from-checkpoints."
        )
    if is_checkpoint(path):
        if _own_kind(path) == "snapshot":
            raise ConfigError(
                f"{path} is a stored average of posthoc-ema, not a checkpoint: averaging it again would "
                "blur it. Give its folder without --from-checkpoints."
            )
        return [path]
    found = [p for p in path.iterdir() if is_checkpoint(p)] if path.is_dir() else []
    kinds = {p: _own_kind(p) for p in found}
    if "snapshot" in kinds.values():
        raise ConfigError(
            f"{path} holds stored averages of posthoc-ema, not checkpoints. If its {MANIFEST} is lost: "
            "`phema verify --rebuild`."
        )
    found = [p for p in found if kinds[p] is None]  # what was synthesized from them is none of them
    if not found:
        raise SnapshotNotFoundError(
            f"{path} holds no checkpoints (.safetensors, .pt, .pth, .bin, .ckpt, or folders of "
            "transformers, diffusers or torch.distributed.checkpoint). Give the files themselves."
        )
    return sorted(found, key=lambda p: [int(n) for n in _NUMBER.findall(p.name)])


def _own_kind(path: Path) -> str | None:
    """What a file of ours is, "snapshot" or "synthesized"; None for those of others."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        own = json.loads(read_header(path).metadata[METADATA_KEY])
        return str(own.get("kind", "snapshot"))
    except (SnapshotFormatError, KeyError, ValueError, AttributeError, RecursionError):
        return None


def is_made(path: Path) -> bool:
    """Whether a file is the result of a synthesis."""
    return _own_kind(path) == "synthesized"


def time_of(path: Path) -> int:
    """Training time of a checkpoint by the last number in its name, or in that of a folder above it.

    Raises:
        ConfigError: there is none.

    Example:
        >>> time_of(Path("run/checkpoint-1000/unet")), time_of(Path("epoch=3-step=1200.fp16.ckpt"))
        (1000, 1200)
    """
    for name in (path.stem if path.is_file() or path.suffix else path.name, *_parents(path)):
        numbers = _NUMBER.findall(_DECIMALS.sub("", _DTYPES.sub("", name)))
        if numbers:
            return int(numbers[-1])
    raise ConfigError(
        f"{path}: no number in its name says at which step it was saved. Give the times with --times "
        "100,200,300 or a listing (a .txt file of lines `time path`)."
    )


def _parents(path: Path) -> list[str]:
    return [parent.name for parent in path.parents][:2]


def _listing(path: Path) -> list[TimedCheckpoint]:
    found = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SnapshotFormatError(f"{path}: cannot be read as a listing: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        time, _, name = line.strip().partition(" ")
        if not time.isascii() or not time.isdigit() or not name.strip():
            raise SnapshotFormatError(
                f"{path}: line {number} is not `time path`, for example `1000 checkpoint-1000`."
            )
        file = path.parent / name.strip()
        if not file.exists():
            raise SnapshotNotFoundError(f"{path}: line {number}: {file} does not exist.")
        found.append(TimedCheckpoint(int(time), file))
    return found


def choose_times(
    checkpoints: Sequence[TimedCheckpoint],
    *,
    at: int | None,
    include: Collection[int] | None,
    exclude: Collection[int],
) -> list[TimedCheckpoint]:
    """The checkpoints that may be used.

    Raises:
        SnapshotNotFoundError: `at`, or a time that is included or excluded, is no checkpoint's; or
            none is left.
    """
    times = {c.time for c in checkpoints}
    strange = sorted({*(include or ()), *exclude, *(() if at is None else (at,))} - times)
    if strange:
        near = sorted(sorted(times, key=lambda t: abs(t - strange[0]))[:3])
        raise SnapshotNotFoundError(
            f"no checkpoint is of time {strange[0]}; the nearest are {', '.join(map(str, near))}."
        )
    left = [
        c
        for c in checkpoints
        if (at is None or c.time <= at)
        and c.time not in exclude
        and (include is None or c.time in include or c.time == at)
    ]
    if not left or (at is not None and left[-1].time != at):
        raise SnapshotNotFoundError(
            "the checkpoint at which the average ends is excluded; exclude others, or choose an "
            "earlier --at."
        )
    return left
