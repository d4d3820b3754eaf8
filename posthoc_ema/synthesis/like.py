"""Layout of an output that takes the place of an existing model folder (`--like`).

Only the headers of the base's safetensors files are read: names, dtypes and shard borders of the
output are those of the base, its values come from the averages. The small files beside the weights
(configuration, tokenizer) are copied; no weights of the base are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_ema.codecs import FLOATING
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.snapshot import METADATA_KEY, TensorTable
from posthoc_ema.synthesis.layouts import (
    MODEL,
    FileLayout,
    Layout,
    OutputTensor,
    check_output_dtype,
    index_name,
    shard_name,
    sharded,
    with_variant,
)
from posthoc_ema.tensor_files import Header, no_duplicates, read_header

DIFFUSERS, PEFT = "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"
_KNOWN = (MODEL, DIFFUSERS, PEFT)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
_COPIED = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".yaml"}
_NOT_COPIED = re.compile(
    r".*\.index(\..+)?\.json|phema(\..+)?\.json|trainer_state\.json|requirements\.txt|\..*"
)
_LARGEST_INDEX = 100_000_000
_MOST_ADAPTERS = 64  # words that are tried as an adapter's name: each costs a pass over all names


@dataclass(frozen=True)
class Base:
    """The weights of the folder (or file) that an output shall be like.

    Attributes:
        path: the folder or file.
        name: name that its weights have when they are one file, without a variant.
        headers: headers of its files, in the order of their names.
        index: content of its index; None for a single file.
    """

    path: Path
    name: str
    headers: tuple[Header, ...]
    index: Mapping[str, Any] | None

    @property
    def library(self) -> str:
        """Who reads it: "transformers", "diffusers", "peft", or "" (unknown)."""
        if self.name == PEFT:
            return "peft"
        config = self.path / "config.json"
        if self.name == DIFFUSERS:
            return "diffusers"
        return "transformers" if self.name == MODEL and config.is_file() else ""


def like_layout(
    base: Path,
    table: TensorTable,
    *,
    dtype: str = "model",
    variant: str | None = None,
    shard_bytes: int | None = None,
) -> Layout:
    """Layout of an output that replaces `base`.

    Args:
        base: a model folder with safetensors weights (transformers, diffusers component, PEFT
            adapter), or one safetensors file.
        table: the tensors that are there to be written.
        dtype: "model" takes the base's dtypes; else one for all averaged tensors.
        variant: variant of the file names, for example "ema".
        shard_bytes: new shard borders instead of the base's.

    Raises:
        SnapshotNotFoundError: the base holds no safetensors weights.
        SnapshotFormatError: its files are damaged or its index contradicts them.
        SnapshotMismatchError: its names or shapes are not those of the tracked model.
        ConfigError: unknown dtype or malformed variant.
    """
    check_output_dtype(dtype)
    found = read_base(base)
    names = [name for header in found.headers for name in header.tensors]
    sources, left_out = map_names(names, table, found.path)
    files = []
    for number, header in enumerate(found.headers, start=1):
        rows = tuple(
            _output(header, name, sources[name], table, dtype, found.path)
            for name in header.tensors
        )
        many = len(found.headers)
        name = (
            shard_name(found.name, variant, number, many)
            if found.index is not None
            else with_variant(found.name, variant)
        )
        kept = {k: v for k, v in header.metadata.items() if k not in ("format", METADATA_KEY)}
        files.append(FileLayout(name, rows, kept))
    more: dict[str, Any] = {
        "copied": tuple(_configurations(found.path)),
        "library": found.library,
        "like": found.path,
        "left_out": left_out,
    }
    if shard_bytes is not None:
        tensors = [tensor for file in files for tensor in file.tensors]
        return sharded(found.name, tensors, shard_bytes, variant, **more)
    index_metadata = {} if found.index is None else found.index.get("metadata", {})
    return Layout(
        tuple(files),
        None if found.index is None else index_name(found.name, variant),
        index_metadata if isinstance(index_metadata, dict) else {},
        variant=variant,
        **more,
    )


# ---- reading the base


def read_base(path: Path) -> Base:
    """Find the weights of a model folder and read their headers.

    Raises:
        SnapshotNotFoundError: there are none in safetensors form; the message says what is there.
        SnapshotFormatError: the index or a file is damaged.
    """
    if path.is_file():
        return Base(path, path.name, (read_header(path),), None)
    if not path.is_dir():
        raise SnapshotNotFoundError(f"--like {path} does not exist. Check the path.")
    for name in _KNOWN:
        found = _weights(path, name)
        if found is not None:
            return found
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if len(files) == 1 and not _SHARD.search(files[0]):
        return Base(path, files[0], (read_header(path / files[0]),), None)
    raise SnapshotNotFoundError(_nothing_found(path, files))


def _weights(folder: Path, name: str) -> Base | None:
    """Weights called `name`: one file, shards, or (if there is nothing else) one variant of them."""
    stem = name.removesuffix(".safetensors")
    variants = [p.name for p in sorted(folder.glob(f"{stem}.*.safetensors"))]
    variants = [v for v in variants if not _SHARD.search(v)]
    indices = [p.name for p in sorted(folder.glob(f"{name}.index.*.json"))]
    if (folder / name).is_file():
        return Base(folder, name, (read_header(folder / name),), None)
    if (folder / f"{name}.index.json").is_file():
        return _shards(folder, name, f"{name}.index.json")
    if len(variants) == 1 and not indices:
        return Base(folder, name, (read_header(folder / variants[0]),), None)
    if len(indices) == 1 and not variants:
        return _shards(folder, name, indices[0])
    return None


def _shards(folder: Path, name: str, index: str) -> Base:
    content = read_index(folder / index)
    files = sorted(set(content["weight_map"].values()))
    headers = tuple(read_header(folder / file) for file in files)
    for header in headers:
        for tensor in header.tensors:
            if content["weight_map"].get(tensor) != header.path.name:
                raise SnapshotFormatError(
                    f"{folder / index}: says nothing of tensor {tensor!r} in {header.path.name}, or "
                    "puts it elsewhere. Save the model anew."
                )
    held = sum(len(header.tensors) for header in headers)
    if held != len(content["weight_map"]):
        raise SnapshotFormatError(
            f"{folder / index}: lists {len(content['weight_map'])} tensors, its files hold {held}. "
            "Save the model anew."
        )
    return Base(folder, name, headers, content)


def read_index(path: Path) -> dict[str, Any]:
    """Content of an index of shards; its file names are plain names in the same folder.

    Raises:
        SnapshotFormatError: it is no index, or it names files elsewhere.
    """
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large")
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=no_duplicates)
        names = content["weight_map"].values()
        if not all(isinstance(n, str) and Path(n).name == n and n not in ("", "..") for n in names):
            raise ValueError("it names files that are not beside it")
        if not names:
            raise ValueError("it is empty")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotFormatError(
            f"{path}: not a readable index of shards ({error}). Save the model anew."
        ) from None
    return dict(content)


def _nothing_found(folder: Path, files: list[str]) -> str:
    parts = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    if (folder / "model_index.json").is_file() and parts:
        return (
            f"--like {folder} is a whole pipeline; give the folder of the part that was trained, for "
            f"example {folder / parts[-1]} (it has {', '.join(parts)})."
        )
    if files:
        return (
            f"--like {folder} holds several weight files and no {MODEL}: {', '.join(files[:4])}. "
            "Give one of these files instead of the folder."
        )
    return (
        f"--like {folder} holds no safetensors weights. Give the folder that save_pretrained wrote "
        "(with safe_serialization=True in older versions)."
    )


def _configurations(base: Path) -> Iterator[Path]:
    """Small files that belong to the model and hold no weights."""
    if base.is_dir():
        for path in sorted(base.iterdir()):
            wanted = path.suffix in _COPIED and not _NOT_COPIED.fullmatch(path.name)
            if wanted and path.is_file():
                yield path


# ---- names


def map_names(
    wanted: Collection[str], table: TensorTable, base: Path
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which tensor of the table stands behind each name of the base.

    Names may differ by what saving changes: wrappers (`module.`, `_orig_mod.`), the name of a PEFT
    adapter, or a prefix that all of them share. One such rule has to explain all names.

    Args:
        wanted: the base's names.
        table: the tracked model's tensors.
        base: for the messages.

    Returns:
        name in the base -> name in the table's entries; and the averaged tensors of other parts of the
        model, if the base is one part of it.

    Raises:
        SnapshotMismatchError: no rule explains all names, or averaged tensors would be lost.
    """
    known = {**{name: name for name in table.entries}, **table.aliases}
    best: list[str] | None = None
    for rename in _renamings(wanted, known):
        renamed = {new: source for name, source in known.items() if (new := rename(name))}
        missing = [name for name in wanted if name not in renamed]
        if not missing:
            sources = {name: renamed[name] for name in wanted}
            return sources, _check_lost(sources, table, rename, base)
        if best is None or len(missing) < len(best):
            best = missing
    assert best
    few = ", ".join(map(repr, best[:3])) + (", ..." if len(best) > 3 else "")
    raise SnapshotMismatchError(
        f"--like {base} has {len(best)} tensors that the snapshots lack: {few}. The snapshots hold "
        f"{', '.join(map(repr, list(known)[:2]))}, ... Give the folder that was saved from the tracked "
        "model, or track the model that was saved."
    )


Rename = Callable[[str], str | None]


def _renamings(wanted: Collection[str], known: Iterable[str]) -> Iterator[Rename]:
    """Rules from names of the table to names of the base, plain ones first."""
    known = list(known)
    parts = {part for name in wanted for part in name.split(".")}
    others = {part for name in known for part in name.split(".")[1:] if not part.isdigit()} - parts
    plain: list[Rename] = [lambda name: name, _unwrapped]
    plain += [_adapter(part) for part in sorted(others)[:_MOST_ADAPTERS]]
    yield from plain
    first = next(iter(wanted), "")
    for rule in plain:
        renamed = [new for name in known if (new := rule(name))]
        for prefix in sorted({n[: -len(first)] for n in renamed if n.endswith(f".{first}")}):
            yield functools.partial(_strip, rule, prefix)
        for name in sorted(renamed):
            if first.endswith(f".{name}"):
                prefix = first[: -len(name)]
                yield functools.partial(_add, rule, prefix)


def _unwrapped(name: str) -> str:
    return ".".join(p for p in name.split(".") if p not in ("module", "_orig_mod"))


def _adapter(adapter: str) -> Rename:
    """What PEFT's save_pretrained makes of the names of one adapter."""

    def rename(name: str) -> str | None:
        first, *rest = name.split(".")
        parts = [first, *(p for p in rest if p != adapter)]
        saved = ".".join(p for p in parts if p != "modules_to_save")
        return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", saved)

    return rename


def _strip(rule: Rename, prefix: str, name: str) -> str | None:
    new = rule(name)
    return new[len(prefix) :] if new is not None and new.startswith(prefix) else None


def _add(rule: Rename, prefix: str, name: str) -> str | None:
    new = rule(name)
    return None if new is None else prefix + new


def _check_lost(
    sources: Mapping[str, str], table: TensorTable, rename: Rename, base: Path
) -> tuple[str, ...]:
    """Averaged tensors that are not written: fine for other parts of a model, else an error."""
    used = set(sources.values())
    lost = [e.name for e in table.entries.values() if e.averaged and e.name not in used]
    inside = [name for name in lost if rename(name) is not None]
    if inside:
        few = ", ".join(map(repr, inside[:3])) + (", ..." if len(inside) > 3 else "")
        raise SnapshotMismatchError(
            f"--like {base} lacks {len(inside)} tensors that were tracked and would be lost: {few}. "
            "Give the folder that was saved from the tracked model, or write without --like."
        )
    return tuple(lost)


def _output(
    header: Header, name: str, source: str, table: TensorTable, dtype: str, base: Path
) -> OutputTensor:
    info, entry = header.tensors[name], table.entries[source]
    if info.shape != entry.shape:
        raise SnapshotMismatchError(
            f"--like {base}: tensor {name!r} has shape {info.shape}, the tracked one {entry.shape}. "
            "Give the folder that was saved from the tracked model."
        )
    wanted = dtype if dtype != "model" and entry.averaged else info.dtype
    if wanted != entry.dtype and not {wanted, entry.dtype} <= FLOATING:
        if entry.averaged and dtype == "model":
            raise ConfigError(
                f"--like {base}: tensor {name!r} is {info.dtype}, in which averages cannot be "
                "written. Choose one with --dtype bfloat16."
            )
        raise SnapshotMismatchError(
            f"--like {base}: tensor {name!r} is {info.dtype}, the stored one {entry.dtype}. Give the "
            "folder that was saved from the tracked model."
        )
    return OutputTensor(name, source, wanted, info.shape)
