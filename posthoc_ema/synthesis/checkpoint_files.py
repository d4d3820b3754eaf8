"""Raw checkpoints of other tools as named tensors that are read piece by piece.

safetensors (one file, or shards with an index), files of `torch.save` (.pt, .pth, .bin, .ckpt) and
folders of torch.distributed.checkpoint. None needs torch, and nothing that a file holds is executed:
pickles are read as data (`posthoc_ema.importers.restricted_pickle`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_ema.codecs import AnyArray, Float32Array, decode, storage_dtype
from posthoc_ema.errors import ConfigError, SnapshotFormatError
from posthoc_ema.importers.restricted_pickle import Opaque
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.importers.torch_files import open_pickle
from posthoc_ema.synthesis.distributed_checkpoints import (
    DCP,
    rank_shards,
    read_dcp,
    read_rank_shards,
)
from posthoc_ema.synthesis.foreign_tensors import (
    ChunkedTensor,
    FlatTensor,
    SavedTensor,
    read_safetensors,
    told,
)
from posthoc_ema.synthesis.like import read_index
from posthoc_ema.synthesis.reading import Piece

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights")
"""Keys under which checkpoints keep the model's state_dict, in the order in which they are tried."""
_WRAPPERS = ("module.", "_orig_mod.")
_SINGLE = ("model", "diffusion_pytorch_model", "adapter_model")


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


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder is one checkpoint, judged by names alone."""
    if path.is_file():
        return path.suffix in (*PICKLES, ".safetensors")
    return path.is_dir() and (
        (path / DCP).is_file()
        or _index(path) is not None
        or _weights(path) is not None
        or bool(rank_shards(path))
    )


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
        tensors = find_state_dict(read_dcp(path, stack), path, key)
    elif path.is_dir():
        index, weights = _index(path), _weights(path)
        if index is not None:
            names = sorted(set(read_index(index)["weight_map"].values()))
            tensors = {k: v for n in names for k, v in read_safetensors(path / n).items()}
        elif weights is not None:
            return Checkpoint(path, open_checkpoint(weights, stack, key).tensors)
        elif files := rank_shards(path):
            tensors = read_rank_shards(files)
        else:
            raise SnapshotFormatError(f"{path}: holds no weights that can be read.")
    elif path.suffix == ".safetensors":
        tensors = read_safetensors(path)
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
            found[str(name)] = SavedTensor(item)
        elif isinstance(item, ChunkedTensor):
            found[str(name)] = item
        elif isinstance(item, Mapping):
            found.update({f"{name}.{k}": v for k, v in _tensors(item).items()})
    return found
