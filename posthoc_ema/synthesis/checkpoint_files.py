"""Raw checkpoints of other tools as named tensors that are read piece by piece.

safetensors (one file, or shards with an index), files of `torch.save` (.pt, .pth, .bin, .ckpt) and
folders of torch.distributed.checkpoint. None needs torch, and nothing that a file holds is executed:
pickles are read as data (`posthoc_ema.importers.restricted_pickle`).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from posthoc_ema.codecs import AnyArray, Float32Array, decode, storage_dtype
from posthoc_ema.errors import ConfigError, SnapshotFormatError
from posthoc_ema.importers.restricted_pickle import Global, Opaque
from posthoc_ema.importers.spans import OpenFile, Span
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.importers.torch_files import open_pickle, read_span
from posthoc_ema.synthesis.like import read_index
from posthoc_ema.synthesis.reading import Piece
from posthoc_ema.tensor_files import TensorFile, TensorInfo, read_header

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights")
"""Keys under which checkpoints keep the model's state_dict, in the order in which they are tried."""
_WRAPPERS = ("module.", "_orig_mod.")
_SINGLE = ("model", "diffusion_pytorch_model", "adapter_model")
_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"
DCP = ".metadata"
"""File that makes a folder a torch.distributed.checkpoint."""


class FlatTensor(Protocol):
    """A tensor of a file, read by ranges of its flattened elements."""

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        ...

    def read(self, start: int, stop: int) -> AnyArray:
        """Bits of elements `start` to `stop`, (stop - start,)."""
        ...


@dataclass
class Checkpoint:
    """An open checkpoint; as a `Source` of `combine` it gives tiles as float32.

    Attributes:
        path: the file or folder.
        tensors: name -> tensor.
        num_bytes: bytes of all tensors.
    """

    path: Path
    tensors: dict[str, FlatTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        distinct = {t.identity: t for t in self.tensors.values()}
        return sum(math.prod(t.shape) * storage_dtype(t.dtype).itemsize for t in distinct.values())

    def read(self, tile: Sequence[Piece], out: Float32Array) -> None:
        """Read a tile as float32 into `out`, shape (tile length,)."""
        for piece in tile:
            tensor = self.tensors[piece.name]
            span = slice(piece.position, piece.position + piece.stop - piece.start)
            with told(self.path, piece.name):
                decode(tensor.read(piece.start, piece.stop), tensor.dtype, out[span])

    def read_copy(self, name: str) -> AnyArray:
        """Bits of a whole tensor, in its shape."""
        tensor = self.tensors[name]
        with told(self.path, name):
            return tensor.read(0, math.prod(tensor.shape)).reshape(tensor.shape)


@contextlib.contextmanager
def told(path: Path, name: str) -> Iterator[None]:
    """Name file and tensor when its data turns out to be malformed."""
    try:
        yield
    except ValueError as error:
        raise SnapshotFormatError(
            f"{path}: tensor {name!r} cannot be read: {error}. Restore the checkpoint from a copy, or "
            "leave it out with --exclude."
        ) from error


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder is one checkpoint, judged by names alone."""
    if path.is_file():
        return path.suffix in (*PICKLES, ".safetensors")
    return path.is_dir() and (
        (path / DCP).is_file()
        or _index(path) is not None
        or _weights(path) is not None
        or bool(_rank_shards(path))
    )


def _rank_shards(folder: Path) -> list[Path]:
    """Files of HuggingFaceStorageWriter before they are consolidated: one or more per rank."""
    return sorted(p for p in folder.glob("shard-*.safetensors") if _RANK_SHARD.fullmatch(p.name))


def _index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    return found[0] if len(found) == 1 else None


def _weights(folder: Path) -> Path | None:
    """The one file of a model folder with weights."""
    for name in _SINGLE:
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    legacy = folder / "pytorch_model.bin"
    return legacy if legacy.is_file() else None


def open_checkpoint(path: Path, stack: contextlib.ExitStack, key: str | None = None) -> Checkpoint:
    """Open one checkpoint; its tensors can be read as long as `stack` is open.

    Args:
        path: file or folder.
        stack: closes the files.
        key: where the model's state_dict is, for example "ema.model"; found by itself if it has one
            of the usual names.

    Raises:
        SnapshotFormatError: it is damaged or of an unknown kind.
        ConfigError: it holds no state_dict, or none under `key`.
    """
    tensors: Mapping[str, FlatTensor]
    if path.is_dir() and (path / DCP).is_file():
        tensors = find_state_dict(_read_dcp(path, stack), path, key)
    elif path.is_dir():
        index, weights = _index(path), _weights(path)
        if index is not None:
            names = sorted(set(read_index(index)["weight_map"].values()))
            tensors = {k: v for n in names for k, v in _read_safetensors(path / n).items()}
        elif weights is not None:
            return Checkpoint(path, open_checkpoint(weights, stack, key).tensors)
        elif files := _rank_shards(path):
            tensors = _read_rank_shards(files)
        else:
            raise SnapshotFormatError(f"{path}: holds no weights that can be read.")
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    else:
        value = stack.enter_context(open_pickle(path))
        tensors = find_state_dict(value, path, key)
    if not tensors:
        raise ConfigError(f"{path} holds no tensors.")
    return Checkpoint(path, _unwrapped(tensors))


def _unwrapped(tensors: Mapping[str, FlatTensor]) -> dict[str, FlatTensor]:
    """Names without the wrappers that all of them share."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name[len(prefix) :]: value for name, value in tensors.items()})
    return dict(tensors)


# ---- safetensors


@dataclass(frozen=True)
class _SafeTensor:
    file: TensorFile
    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def identity(self) -> object:
        return id(self.file), self.info.name

    def read(self, start: int, stop: int) -> AnyArray:
        first = self.info.start
        raw = self.file.read_bytes(
            first + start * self.info.itemsize, first + stop * self.info.itemsize
        )
        return raw.view(storage_dtype(self.info.dtype))


class _LazyFile(TensorFile):
    """Opened for each read: a run may have thousands of shards, a process has fewer descriptors."""

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)

    def read_bytes(self, start: int, end: int) -> AnyArray:
        with TensorFile(self.path, self.header) as file:
            return file.read_bytes(start, end)


def _read_safetensors(path: Path) -> dict[str, FlatTensor]:
    file = _LazyFile(path)
    return {name: _SafeTensor(file, info) for name, info in file.header.tensors.items()}


# ---- files of torch.save


@dataclass
class _PickledTensor:
    """A tensor of `torch.save`; one that is not contiguous is read whole and kept until the next."""

    tensor: PickledTensor
    _whole: AnyArray | None = field(default=None, repr=False)

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def identity(self) -> object:
        return self.tensor.view

    def read(self, start: int, stop: int) -> AnyArray:
        kind = storage_dtype(self.dtype)
        if self.tensor.strides == _contiguous(self.shape):
            first = (self.tensor.offset + start) * kind.itemsize
            raw = self.tensor.storage.span.read(first, first + (stop - start) * kind.itemsize)
            return np.frombuffer(raw, kind)
        if self._whole is None:
            self._whole = self.tensor.read().reshape(-1)
        values = self._whole[start:stop]
        if stop == len(self._whole):
            self._whole = None
        return values


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a C-contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def find_state_dict(value: Any, path: Path, key: str | None) -> dict[str, FlatTensor]:
    """The tensors of the model in the content of a checkpoint.

    Args:
        value: what the file holds, nested dicts with tensors in them.
        path: for the messages.
        key: dotted path to the state_dict; None looks for `MODEL_KEYS`.

    Raises:
        ConfigError: there is no state_dict; the message names the keys.
    """
    found = value
    for part in key.split(".") if key else ():
        found = _dict(found).get(part)
        if found is None:
            raise ConfigError(f"--key {key}: {path} has no {part!r}. Its keys are {_keys(value)}.")
    inner = [k for k in MODEL_KEYS if key is None and _tensors(_dict(_dict(value).get(k)))]
    if inner:
        found = _dict(value)[inner[0]]
    top = key is None and not inner
    # At the top, dicts of tensors are other things than the model: optimizers, other averages.
    kept = {k: v for k, v in _dict(found).items() if not (top and isinstance(v, Mapping))}
    tensors = _tensors(kept)
    if not tensors:
        raise ConfigError(
            f"{path} holds no state_dict under {key or ', '.join(MODEL_KEYS)}. Its keys are "
            f"{_keys(value)}; name the right one with --key."
        )
    return tensors


def _dict(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Opaque):  # a subclass of dict: what would have been set as its items
        value = value.items
    return value if isinstance(value, Mapping) else {}


def _keys(value: Any) -> str:
    names = [str(k) for k in _dict(value)]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _tensors(value: Mapping[Any, Any]) -> dict[str, FlatTensor]:
    """Tensors of a dict and of dicts in it, under dotted names."""
    found: dict[str, FlatTensor] = {}
    for name, item in value.items():
        if isinstance(item, PickledTensor):
            found[str(name)] = _PickledTensor(item)
        elif isinstance(item, _Chunked):
            found[str(name)] = item
        elif isinstance(item, Mapping):
            found.update({f"{name}.{k}": v for k, v in _tensors(item).items()})
    return found


# ---- torch.distributed.checkpoint


@dataclass
class _Chunked:
    """A tensor in pieces, each saved by one rank.

    Attributes:
        chunks: (first index per axis, tensor) of each piece.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], FlatTensor]]
    _whole: AnyArray | None = field(default=None, repr=False)

    @property
    def identity(self) -> object:
        return id(self)

    def read(self, start: int, stop: int) -> AnyArray:
        out = np.empty(stop - start, storage_dtype(self.dtype))
        if not all(_is_rows(offset, t.shape, self.shape) for offset, t in self.chunks):
            if self._whole is None:
                self._whole = self._assembled()
            out[:] = self._whole[start:stop]
            if stop == len(self._whole):
                self._whole = None
            return out
        row = math.prod(self.shape[1:])
        for offset, tensor in self.chunks:
            first = offset[0] * row if offset else 0
            begin, end = max(start, first), min(stop, first + math.prod(tensor.shape))
            if begin < end:
                out[begin - start : end - start] = tensor.read(begin - first, end - first)
        return out

    def _assembled(self) -> AnyArray:
        whole = np.empty(self.shape, storage_dtype(self.dtype))
        for offset, tensor in self.chunks:
            place = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            whole[place] = tensor.read(0, math.prod(tensor.shape)).reshape(tensor.shape)
        return whole.reshape(-1)


def _is_rows(offset: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a piece is a run of whole rows, which is a run of flattened elements."""
    return not any(offset[1:]) and tuple(sizes[1:]) == tuple(shape[1:])


@dataclass
class _Item:
    """One saved piece: a file of torch.save inside a file, opened when it is first read."""

    span: Span
    path: Path
    dtype: str
    shape: tuple[int, ...]
    _tensor: _PickledTensor | None = field(default=None, repr=False)

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
            self._tensor = _PickledTensor(value)
        return self._tensor.read(start, stop)


def _read_dcp(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
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
        at[str(path[-1])] = _Chunked(dtype, shape, chunks)
    return nested


def _read_rank_shards(files: Sequence[Path]) -> dict[str, FlatTensor]:
    """Tensors of which each rank wrote a piece; where it belongs stands in the file's metadata."""
    pieces: dict[str, list[tuple[tuple[int, ...], FlatTensor]]] = {}
    for path in files:
        file = _LazyFile(path)
        with told(path, _SHARDING):
            try:
                where = json.loads(file.header.metadata[_SHARDING])
                for name, info in file.header.tensors.items():
                    offset = _size(where[name]["saved_offsets"])
                    if len(offset) != len(info.shape):
                        raise ValueError("the place of a piece is malformed")
                    pieces.setdefault(name, []).append((offset, _SafeTensor(file, info)))
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
        found[name] = _Chunked(chunks[0][1].dtype, shape, chunks)
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
    dtype = state[0] if isinstance(state, tuple) else _dict(state).get("dtype")
    if not isinstance(dtype, Global) or dtype.module != "torch":
        raise ValueError("a dtype is malformed")
    storage_dtype(dtype.name)  # KeyError for those that are unknown here
    return dtype.name
