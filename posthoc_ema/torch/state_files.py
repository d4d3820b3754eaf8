"""A tracker's own state in files, for runs whose checkpoints do not carry it.

One safetensors file for each rank that holds averages, complete or absent; a state counts once the files
of all ranks are there. A file says which boxes of which tensors it holds, so it is read back by any
number of ranks, and each reads the blocks that overlap what it holds. Float32 bits go in and come out.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posthoc_ema.codecs import Float32Array
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotWriteError,
)
from posthoc_ema.tensor_files import (
    Header,
    TensorFile,
    TensorFileWriter,
    brief,
    byte_view,
    checksum,
    fits_memory,
    is_temporary_name,
    read_header,
    strict_json,
)
from posthoc_ema.torch.distributed.sharding import (
    Layout,
    layout_of,
    local_part,
    own_rank,
    ranks_of,
    stacked,
    whole_from_part,
)

STATE_FILE_SCHEMA = 1
_KEY = "posthoc_ema_state"
_BLOCK = 1 << 18
"""Elements that share one checksum (1 MiB): what a reader that needs one element must read."""
_NAME = re.compile(
    r"(?P<time>[0-9]{12,19})(-(?P<session>[0-9a-z]{1,32}))?-(?P<rank>[0-9]{5})-of-(?P<world>[0-9]{5})"
    r"\.safetensors"
)
_REMEDY = "Remove the file to continue from an earlier state, or restore it from a copy."


@dataclass(frozen=True)
class SavedState:
    """A state of which the files of all ranks are there.

    Attributes:
        time: training time, in clock units.
        paths: its files, by rank.
        session: which start of the run wrote it; empty for one process.
    """

    time: int
    paths: tuple[Path, ...]
    session: str = ""

    @cached_property
    def extra(self) -> dict[str, Any]:
        """What the caller saved along with the state, from the file of the first rank.

        Raises:
            SnapshotFormatError: the file is damaged.
        """
        return _read_part(self.paths[0], self.time, 0, len(self.paths)).extra


def save_state(
    folder: Path, state: Mapping[str, Any], extra: Mapping[str, Any], *, session: str = ""
) -> None:
    """Write the state of a tracker; with sharded averages every rank calls this and writes its part.

    No rank waits for another. A part that several ranks hold is written by the first of them.

    Args:
        folder: where the files go; made if it is missing.
        state: from `Tracker.state_dict`, or a copy by `host_copy`.
        extra: JSON values to keep along, for example the optimizer's step counters.
        session: with sharded averages, a text of letters a-z and digits that all ranks share and that
            no other start of the run has: files of two starts never make up one state.

    Raises:
        SnapshotWriteError: the file could not be written; earlier states are untouched.
        ConfigError: `state` or `extra` holds what JSON cannot.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> state = {"time": 3, "run_id": "r", "averages": {"w": torch.ones(2, 5)}}
        >>> save_state(folder, state, {"steps": 3})
        >>> (saved,) = saved_states(folder)
        >>> saved.time, saved.extra
        (3, {'steps': 3})
        >>> load_state(saved, {"w": torch.empty(5)})["averages"]["w"].shape
        torch.Size([2, 5])
    """
    averages: dict[str, torch.Tensor] = dict(state["averages"])
    layouts = {name: layout_of(tensor, name) for name, tensor in averages.items()}
    rank, world = _place(layouts.values())
    path = folder / _file_name(state["time"], session, rank, world)
    if not _NAME.fullmatch(path.name):
        raise ConfigError(f"session must be letters a-z and digits, at most 32, got {session!r}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapshotWriteError(
            f"{folder}: could not be made: {error.strerror}. Check the folder and its permissions."
        ) from error
    _remove_unfinished(folder, rank, world)
    mine = [n for n, layout in layouts.items() if layout.is_first_copy and layout.size]
    blocks = {name: -(-math.prod(layouts[name].local_shape) // _BLOCK) for name in mine}
    scalars = {key: value for key, value in state.items() if key != "averages"}
    digests = {name: "0" * 16 * count for name, count in blocks.items()}
    own = {
        "schema": STATE_FILE_SCHEMA,
        "rank": rank,
        "world": world,
        "session": session,
        "state": scalars,
        "extra": dict(extra),
        "shapes": {name: list(layout.shape) for name, layout in layouts.items()},
        "offsets": {name: list(layouts[name].offsets) for name in mine},
        "xxh3": digests,
    }
    try:
        metadata = {_KEY: json.dumps(own, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a state is saved as JSON, which cannot hold it: {error}. Keep numbers, strings, lists and "
            "tables only."
        ) from None
    rows = [(name, "float32", layouts[name].local_shape) for name in mine]
    with TensorFileWriter(path, rows, metadata) as writer:
        for name in mine:
            digests[name] = _write(writer, name, averages[name])
        writer.set_metadata({_KEY: json.dumps(own, allow_nan=False)})


def _place(layouts: Iterable[Layout]) -> tuple[int, int]:
    """(number of this rank, number of ranks) of a state, which is that of one if nothing is sharded.

    Told by the meshes: the process group may be gone when the last state is written.
    """
    meshes = [layout.mesh for layout in layouts if layout.mesh is not None]
    ranks = sorted({rank for mesh in meshes for rank in ranks_of(mesh)})
    return (ranks.index(own_rank(meshes[0])), len(ranks)) if ranks else (0, 1)


def _file_name(time: int, session: str, rank: int, world: int) -> str:
    return f"{time:012d}{'-' + session if session else ''}-{rank:05d}-of-{world:05d}.safetensors"


def _remove_unfinished(folder: Path, rank: int, world: int) -> None:
    """Remove what this rank left when it was killed; other ranks may be writing theirs."""
    for path in folder.glob(f".tmp-*-{rank:05d}-of-{world:05d}.safetensors-*"):
        if is_temporary_name(path.name):
            path.unlink(missing_ok=True)


def _write(writer: TensorFileWriter, name: str, tensor: torch.Tensor) -> str:
    """Write this rank's part of a tensor; returns the checksums of its blocks."""
    values = local_part(tensor).to("cpu", torch.float32).contiguous().reshape(-1).numpy()
    digests = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        digests.append(checksum(byte_view(block)))
        writer.write(name, block, start)
    return "".join(digests)


def host_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state in the host's memory, for `save_state` in a thread while training goes on."""
    averages = {
        name: whole_from_part(
            local_part(tensor).to("cpu", torch.float32, copy=True), layout_of(tensor, name)
        )
        for name, tensor in state["averages"].items()
    }
    return {**state, "averages": averages}


def saved_states(folder: Path) -> list[SavedState]:
    """All states of which no file is missing, the earliest first.

    Of one time the one whose files were written last comes last.
    """
    groups: dict[tuple[int, str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            key = (int(match["time"]), match["session"] or "", int(match["world"]))
            groups.setdefault(key, {})[int(match["rank"])] = path
    complete = [
        SavedState(time, tuple(files[rank] for rank in range(world)), session)
        for (time, session, world), files in groups.items()
        if files.keys() == set(range(world)) and world
    ]
    return sorted(complete, key=lambda s: (s.time, max(map(_written_at, s.paths))))


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # another rank has removed it just now
        return 0


def remove_state(saved: SavedState) -> None:
    """Remove the files of a state. One rank does it; a kill on the way leaves no state that counts."""
    for path in saved.paths:
        path.unlink(missing_ok=True)


# ---- reading


@dataclass(frozen=True)
class _Part:
    """One file, checked."""

    path: Path
    header: Header
    state: dict[str, Any]
    extra: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    offsets: dict[str, tuple[int, ...]]
    digests: dict[str, str]


def _bad(path: Path, what: str) -> SnapshotFormatError:
    return SnapshotFormatError(f"{path}: not the state of a tracker: {what}. {_REMEDY}")


def _read_part(path: Path, time: int, rank: int, world: int) -> _Part:
    """Read the header of one file; everything in it is checked before it is used."""
    header = read_header(path)
    try:
        own = strict_json(header.metadata[_KEY])
        if own["schema"] != STATE_FILE_SCHEMA:
            raise _bad(path, f"it has schema {brief(own['schema'])}, this version reads 1")
        state, extra = own["state"], own["extra"]
        if not isinstance(state, dict) or not isinstance(extra, dict):
            raise ValueError("its values are no tables")
        if (state["time"], own["rank"], own["world"]) != (time, rank, world):
            raise ValueError("its name says another time or rank than the file")
        shapes = {name: _numbers(value) for name, value in own["shapes"].items()}
        offsets = {name: _numbers(value) for name, value in own["offsets"].items()}
        if not (offsets.keys() == header.tensors.keys() == own["xxh3"].keys() <= shapes.keys()):
            raise ValueError("its tables do not name its tensors")
        for name, info in header.tensors.items():
            _check_box(name, info.shape, offsets[name], shapes[name])
            count = -(-info.size // _BLOCK)
            if info.dtype != "float32" or len(own["xxh3"][name]) != 16 * count:
                raise ValueError(f"tensor {brief(name)} has another dtype or number of checksums")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _bad(path, str(error) or type(error).__name__) from None
    return _Part(path, header, state, extra, shapes, offsets, own["xxh3"])


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("a shape is malformed")
    if not fits_memory(value, 4):
        raise ValueError("a shape cannot be")
    return tuple(value)


def _check_box(name: str, local: Sequence[int], offsets: Sequence[int], shape: Any) -> None:
    inside = len(local) == len(offsets) == len(shape) and all(
        offset + length <= whole
        for offset, length, whole in zip(offsets, local, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"the part of tensor {brief(name)} lies outside the tensor")


def load_state(saved: SavedState, targets: Mapping[str, torch.Tensor | Layout]) -> dict[str, Any]:
    """Read a state back, on this or any other number of ranks; fit for `Tracker.load_state_dict`.

    Args:
        saved: from `saved_states`.
        targets: name -> parameter whose averages are wanted (its shape and sharding count, not its
            values), or its layout.

    Returns:
        The state; its averages lie in the host's memory, cut as the targets are.

    Raises:
        SnapshotFormatError: a file is damaged, or parts are missing.
        SnapshotMismatchError: the state is of another model.
    """
    world = len(saved.paths)
    parts = [_read_part(path, saved.time, i, world) for i, path in enumerate(saved.paths)]
    shapes = parts[0].shapes
    if any(part.shapes != shapes or part.state != parts[0].state for part in parts):
        other = next(p for p in parts if (p.shapes, p.state) != (shapes, parts[0].state))
        raise _bad(other.path, "it belongs to another state than the file of the first rank")
    layouts = {
        name: target if isinstance(target, Layout) else layout_of(target, name)
        for name, target in targets.items()
    }
    _check_model(saved, shapes, {name: layout.shape for name, layout in layouts.items()})
    averages = {}
    for name, shape in shapes.items():
        layout = stacked(layouts[name], shape[0])
        averages[name] = whole_from_part(torch.from_numpy(_read(parts, name, layout)), layout)
    return {**parts[0].state, "averages": averages}


def _check_model(
    saved: SavedState, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    found = {name: shape[1:] if shape else None for name, shape in shapes.items()}
    if not shapes or found == wanted:
        return
    name = next(n for n in (*wanted, *found) if wanted.get(n) != found.get(n))
    raise SnapshotMismatchError(
        f"{saved.paths[0]}: average {name!r} has shape {found.get(name)}, the model needs "
        f"{wanted.get(name)}. The state belongs to another model; choose a new folder for this one."
    )


def _read(parts: Sequence[_Part], name: str, wanted: Layout) -> Float32Array:
    """What this rank holds of one average, put together from all parts that overlap it."""
    out = np.empty(wanted.local_shape, dtype=np.float32)
    filled = np.zeros(wanted.local_shape[1:], dtype=bool)
    done: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for part in parts:
        info = part.header.tensors.get(name)
        if info is None or (part.offsets[name], info.shape) in done:
            continue  # ranks that hold copies may both have written them
        done.add((part.offsets[name], info.shape))
        common = _overlap(part.offsets[name], info.shape, wanted)
        if common is None:
            continue
        target = tuple(
            slice(a - o, b - o) for (a, b), o in zip(common, wanted.offsets, strict=True)
        )
        if info.shape[0] != wanted.shape[0] or filled[target[1:]].any():
            raise _bad(part.path, f"parts of average {brief(name)} overlap")
        filled[target[1:]] = True
        source = [(a - o, b - o) for (a, b), o in zip(common, part.offsets[name], strict=True)]
        _read_box(part, name, source, out[target])
    if not filled.all():
        raise _bad(parts[0].path, f"parts of average {brief(name)} are in no file")
    return out


def _overlap(
    offsets: Sequence[int], shape: Sequence[int], wanted: Layout
) -> list[tuple[int, int]] | None:
    """(start, stop) of what two boxes share, in each dimension of the whole tensor; None for nothing."""
    common = [
        (max(a, b), min(a + n, b + m))
        for a, n, b, m in zip(offsets, shape, wanted.offsets, wanted.local_shape, strict=True)
    ]
    return common if all(start < stop for start, stop in common) else None


def _read_box(part: _Part, name: str, box: Sequence[tuple[int, int]], out: Float32Array) -> None:
    """Read a box of one tensor of a file into `out`, one profile after the other."""
    info = part.header.tensors[name]
    strides = [math.prod(info.shape[i + 1 :]) for i in range(len(info.shape))]
    with TensorFile(part.path, part.header) as file:
        for row, index in enumerate(range(*box[0])):
            first = index * strides[0] + sum(
                a * s for (a, _), s in zip(box[1:], strides[1:], strict=True)
            )
            last = first + sum(
                (b - a - 1) * s for (a, b), s in zip(box[1:], strides[1:], strict=True)
            )
            span = _read_span(part, file, name, first, last + 1)
            out[row, ...] = np.lib.stride_tricks.as_strided(
                span, out.shape[1:], [4 * s for s in strides[1:]], writeable=False
            )


def _read_span(part: _Part, file: TensorFile, name: str, start: int, stop: int) -> Float32Array:
    """Elements `start` to `stop` of a tensor of a file; the blocks that they lie in are checked."""
    info, digests = part.header.tensors[name], part.digests[name]
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    begin = first * _BLOCK
    data = file.read_bytes(info.start + 4 * begin, min(info.start + 4 * last * _BLOCK, info.end))
    for block, at in zip(range(first, last), itertools.count(0, 4 * _BLOCK), strict=False):
        if checksum(data[at : at + 4 * _BLOCK].data) != digests[16 * block : 16 * block + 16]:
            raise _bad(part.path, f"the data of average {brief(name)} is damaged (checksum)")
    return data.view(np.float32)[start - begin : stop - begin]
