"""Folders of torch.distributed.checkpoint: tensors whose pieces several ranks saved."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posthoc_ema.codecs import AnyArray, storage_dtype
from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.restricted_pickle import Global, Opaque
from posthoc_ema.importers.spans import OpenFile, Span
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.importers.torch_files import open_pickle, read_span
from posthoc_ema.synthesis.foreign_tensors import (
    ChunkedTensor,
    FlatTensor,
    LazyFile,
    SafeTensor,
    SavedTensor,
    told,
)

DCP = ".metadata"
"""File that makes a folder a torch.distributed.checkpoint."""
_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"


@dataclass
class _Item:
    """One saved piece: a file of torch.save inside a file, opened when it is first read."""

    span: Span
    path: Path
    dtype: str
    shape: tuple[int, ...]
    _tensor: SavedTensor | None = field(default=None, repr=False)

    @property
    def identity(self) -> object:
        return id(self)

    def read(self, start: int, stop: int) -> AnyArray:
        if self._tensor is None:
            value = read_span(self.span, self.path)
            if not isinstance(value, PickledTensor):
                raise ValueError("its data is no tensor")
            if (value.dtype, value.shape) != (self.dtype, self.shape):
                raise ValueError("its data is not what the metadata says")
            self._tensor = SavedTensor(value)
        return self._tensor.read(start, stop)


def read_dcp(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Content of a DCP folder as nested dicts of tensors; values that are no tensors are left out."""
    with open_pickle(folder / DCP) as metadata:
        try:
            return _dcp_tensors(folder, _state(metadata), stack)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise SnapshotFormatError(
                f"{folder / DCP}: its content is not what torch.distributed.checkpoint writes "
                f"({type(error).__name__}: {error}). Convert it with "
                "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
            ) from None


def _state(value: Any) -> dict[str, Any]:
    if not isinstance(value, Opaque) or not isinstance(value.state, dict):
        raise TypeError("an entry has no fields")
    return value.state


def _dcp_tensors(folder: Path, metadata: dict[str, Any], stack: contextlib.ExitStack) -> Any:
    files: dict[str, OpenFile] = {}
    places: dict[tuple[str, tuple[int, ...]], Span] = {}
    for index, info in metadata["storage_data"].items():
        where, place = _state(index), _state(info)
        if where.get("offset") is None:
            continue  # not a tensor
        name = place["relative_path"]
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"the file name {name!r} leads elsewhere")
        if place.get("transform_descriptors"):
            raise ValueError("its files are compressed")
        if name not in files:
            files[name] = stack.enter_context(OpenFile(folder / name))
        start = place["offset"]
        span = Span.of(files[name]).part(start, start + place["length"])
        places[where["fqn"], _size(where["offset"])] = span
    paths = metadata.get("planner_data") or {}
    nested: dict[str, Any] = {}
    for name, described in metadata["state_dict_metadata"].items():
        if not isinstance(described, Opaque) or described.name != "TensorStorageMetadata":
            continue
        tensor = _state(described)
        dtype, shape = _dtype(tensor["properties"]), _size(tensor["size"])
        chunks: list[tuple[tuple[int, ...], FlatTensor]] = []
        for chunk in map(_state, tensor["chunks"]):
            offset = _size(chunk["offsets"])
            item = _Item(places[name, offset], folder, dtype, _size(chunk["sizes"]))
            chunks.append((offset, item))
        if sum(math.prod(t.shape) for _, t in chunks) != math.prod(shape):
            raise ValueError(f"the pieces of {name!r} do not make up the tensor")
        at = nested
        path = paths.get(name, (name,))
        for part in path[:-1]:
            at = at.setdefault(str(part), {})
        at[str(path[-1])] = ChunkedTensor(dtype, shape, chunks)
    return nested


def rank_shards(folder: Path) -> list[Path]:
    """Files of HuggingFaceStorageWriter before they are consolidated: one or more per rank."""
    return sorted(p for p in folder.glob("shard-*.safetensors") if _RANK_SHARD.fullmatch(p.name))


def read_rank_shards(files: Sequence[Path]) -> dict[str, FlatTensor]:
    """Tensors of which each rank wrote a piece; where it belongs stands in the file's metadata."""
    pieces: dict[str, list[tuple[tuple[int, ...], FlatTensor]]] = {}
    for path in files:
        file = LazyFile(path)
        with told(path, _SHARDING):
            try:
                where = json.loads(file.header.metadata[_SHARDING])
                for name, info in file.header.tensors.items():
                    offset = _size(where[name]["saved_offsets"])
                    if len(offset) != len(info.shape):
                        raise ValueError("the place of a piece is malformed")
                    pieces.setdefault(name, []).append((offset, SafeTensor(file, info)))
            except (KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"it does not say where its pieces belong ({error})") from None
    found: dict[str, FlatTensor] = {}
    for name, chunks in pieces.items():
        ends = [tuple(map(sum, zip(offset, t.shape, strict=True))) for offset, t in chunks]
        shape = tuple(max(axis) for axis in zip(*ends, strict=True))
        if sum(math.prod(t.shape) for _, t in chunks) != math.prod(shape):
            raise SnapshotFormatError(
                f"{files[0].parent}: the pieces of tensor {name!r} do not make up the tensor; files of "
                "some ranks are missing. Consolidate the checkpoint, or leave it out with --exclude."
            )
        found[name] = ChunkedTensor(chunks[0][1].dtype, shape, chunks)
    return found


def _size(value: Any) -> tuple[int, ...]:
    """A torch.Size."""
    if isinstance(value, Opaque):
        (value,) = value.args
    if not all(type(n) is int and n >= 0 for n in value):
        raise ValueError("a size is malformed")
    return tuple(value)


def _dtype(properties: Any) -> str:
    state = properties.state if isinstance(properties, Opaque) else None
    dtype = (
        state[0]
        if isinstance(state, tuple)
        else (state.get("dtype") if isinstance(state, dict) else None)
    )
    if not isinstance(dtype, Global) or dtype.module != "torch":
        raise ValueError("a dtype is malformed")
    storage_dtype(dtype.name)  # KeyError for those that are unknown here
    return dtype.name
