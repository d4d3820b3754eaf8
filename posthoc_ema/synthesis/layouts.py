"""What a synthesis writes: which files, and which tensor in which of them, before anything is written.

File names follow what transformers, diffusers and the hub look for: `model.safetensors`, or shards
`model-00001-of-00003.safetensors` beside `model.safetensors.index.json`; a variant stands before the
shard's number or the last suffix (`model.ema.safetensors`, `model.safetensors.index.ema.json`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posthoc_ema.codecs import FLOATING, storage_dtype
from posthoc_ema.errors import ConfigError
from posthoc_ema.snapshot import TensorTable

MODEL = "model.safetensors"
"""Weights file of transformers and of the hub's mixin."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.I)
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file.

    Attributes:
        name: its name there.
        source: its name in the table of what is combined.
        dtype: how it is written.
        shape: its shape.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class FileLayout:
    """One output file.

    Attributes:
        name: its name in the output folder.
        tensors: what it holds.
        metadata: string map that is carried over into its header.
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """All files of one output.

    Attributes:
        files: the weights.
        index: name of the index that says which tensor is in which file; None for a single file.
        index_metadata: further entries of the index's `metadata`.
        copied: files beside the weights that are copied as they are (configurations, tokenizers).
        library: who reads the folder: "transformers", "diffusers", "peft" or "" (unknown).
        variant: variant that is part of the names, for example "ema".
        like: the base that the layout was taken from.
        left_out: averaged tensors of other parts of the model, which the base does not hold.
    """

    files: tuple[FileLayout, ...]
    index: str | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    copied: tuple[Path, ...] = ()
    library: str = ""
    variant: str | None = None
    like: Path | None = None
    left_out: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for file in self.files for tensor in file.tensors)

    def index_json(self) -> dict[str, Any]:
        """Content of the index."""
        weight_map = {t.name: file.name for file in self.files for t in file.tensors}
        return {
            "metadata": {**self.index_metadata, "total_size": self.num_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }


def check_output_dtype(dtype: str) -> None:
    """Refuse what averages cannot be written in.

    Raises:
        ConfigError: it is neither "model" nor a floating dtype.
    """
    if dtype != "model" and dtype not in FLOATING:
        raise ConfigError(f"dtype must be model, float32, float16 or bfloat16, got {dtype!r}.")


def table_tensors(table: TensorTable, dtype: str = "model") -> tuple[OutputTensor, ...]:
    """All tensors of a model under all their names, as `load_state_dict` wants them.

    Args:
        table: the model's tensors.
        dtype: "model" (each tensor's own) or one for all averaged tensors; copied ones keep theirs.

    Raises:
        ConfigError: unknown dtype.
    """
    check_output_dtype(dtype)
    names_of = {name: [name] for name in table.entries}
    for alias, name in table.aliases.items():
        names_of[name].append(alias)
    return tuple(
        OutputTensor(name, main, e.dtype if dtype == "model" or not e.averaged else dtype, e.shape)
        for main, e in table.entries.items()
        for name in names_of[main]
    )


def single_file(
    name: str,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str] | None = None,
    **more: Any,
) -> Layout:
    """One file with everything in it."""
    return Layout((FileLayout(name, tuple(tensors), metadata or {}),), **more)


def sharded(
    name: str,
    tensors: Sequence[OutputTensor],
    shard_bytes: int,
    variant: str | None = None,
    **more: Any,
) -> Layout:
    """Files of at most `shard_bytes` of tensors each, and an index; one plain file if all fits in one.

    Args:
        name: the name that a single file would have, for example "model.safetensors".
        tensors: what is written, in this order.
        shard_bytes: upper limit; a tensor that is larger has a file of its own.
        variant: variant of the names, for example "ema".
        **more: further fields of the layout.
    """
    shards: list[list[OutputTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    if len(shards) == 1:
        return single_file(with_variant(name, variant), tensors, variant=variant, **more)
    files = tuple(
        FileLayout(shard_name(name, variant, i, len(shards)), tuple(shard))
        for i, shard in enumerate(shards, start=1)
    )
    return Layout(files, index_name(name, variant), variant=variant, **more)


def with_variant(name: str, variant: str | None) -> str:
    """model.safetensors -> model.ema.safetensors."""
    if variant is None:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{_check_variant(variant)}{dot}{suffix}"


def shard_name(name: str, variant: str | None, number: int, count: int) -> str:
    """Name of shard `number` (from 1) of `count`: model.ema-00001-of-00003.safetensors."""
    stem, dot, suffix = with_variant(name, variant).rpartition(".")
    return f"{stem}-{number:05d}-of-{count:05d}{dot}{suffix}"


def index_name(name: str, variant: str | None) -> str:
    """model.safetensors -> model.safetensors.index.ema.json."""
    middle = f".{_check_variant(variant)}" if variant is not None else ""
    return f"{name}.index{middle}.json"


def _check_variant(variant: str) -> str:
    if not _VARIANT.fullmatch(variant):
        raise ConfigError(
            f"--variant must be one word of letters, digits and underscores, got {variant!r}. "
            "It becomes part of the file names, as in model.ema.safetensors."
        )
    return variant


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: 5GB, 500MB, 2GiB, 1000000.

    Raises:
        ConfigError: it is no size, or below one byte.

    Example:
        >>> parse_size("5GB"), parse_size("1.5 GiB")
        (5000000000, 1610612736)
    """
    match = _SIZE.fullmatch(text.strip())
    number = 0
    if match:
        digits, unit, binary = match.groups()
        base = 1024 if binary else 1000
        number = int(float(digits) * base ** (" kmgt".index(unit.lower()) if unit else 0))
    if number < 1:
        raise ConfigError(f"a size is written as 5GB, 500MB or 2GiB, got {text!r}.")
    return number
