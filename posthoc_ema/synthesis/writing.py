"""Writing the files of a synthesis: weights first, then what belongs to them, the index last.

A file appears under its name complete and synced, or not at all, and carries the digest of everything
that determines its content. An interrupted output is therefore never mistaken for a complete one, and
running the same command again makes only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posthoc_ema.codecs import FLOATING, AnyArray, Float32Array, decode, encode
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotWriteError,
    SynthesisError,
)
from posthoc_ema.snapshot import METADATA_KEY
from posthoc_ema.synthesis.cards import card, card_name, is_card, record_name
from posthoc_ema.synthesis.layouts import FileLayout, Layout, OutputTensor
from posthoc_ema.synthesis.recipes import Recipe
from posthoc_ema.tensor_files import (
    TensorFileWriter,
    atomic_write,
    is_temporary_name,
    read_header,
    write_json,
)

_MODEL_HASH, _LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """Where one target goes.

    Attributes:
        folder: the folder; it must exist when the output is written.
        layout: what goes there. The layouts of all targets differ in file names only.
        alone: True for a weights file without companions, which carries its whole provenance itself.
    """

    folder: Path
    layout: Layout
    alone: bool = False

    @property
    def paths(self) -> list[Path]:
        """The files with weights."""
        return [self.folder / file.name for file in self.layout.files]

    @property
    def record(self) -> Path:
        """phema.json: written last but the index, so its presence means complete weights."""
        return self.folder / record_name(self.layout.variant)


def digest(recipe: Recipe, target: int, file: FileLayout) -> str:
    """sha256 of everything that determines a file: inputs and coefficients, layout, metadata."""
    content = [
        recipe.provenance[target],
        [[t.name, t.source, t.dtype, t.shape] for t in file.tensors],
        dict(file.metadata),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_finished(path: Path, wanted: str) -> bool:
    """Whether a file is there that was made from the same inputs by the same request."""
    try:
        own = json.loads(read_header(path).metadata[METADATA_KEY])
        return bool(own["digest"] == wanted)
    except (SnapshotFormatError, KeyError, ValueError, TypeError, RecursionError):
        return False


def unfinished(recipe: Recipe, target: int, output: Output) -> set[Path]:
    """Weight files of an output that are still to be written."""
    return {
        path
        for file, path in zip(output.layout.files, output.paths, strict=True)
        if not is_finished(path, digest(recipe, target, file))
    }


def check_free(recipe: Recipe, outputs: Sequence[Output]) -> None:
    """Refuse to replace files that are not the ones that would be written.

    Raises:
        ConfigError: such a file exists.
    """
    for target, output in enumerate(outputs):
        for path in sorted(unfinished(recipe, target, output)):
            if path.exists():
                raise _taken(path)
        for source in output.layout.copied:
            path = output.folder / source.name
            if path.exists() and path.read_bytes() != source.read_bytes():
                raise _taken(path)
        readme = output.folder / card_name(output.layout.variant)
        if not output.alone and readme.exists() and not is_card(readme.read_bytes()):
            raise _taken(readme)


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists already; choose another --out or --overwrite.")


def write_outputs(
    recipe: Recipe,
    outputs: Sequence[Output],
    *,
    resume: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> bool:
    """Write all targets, a file of each at a time, in one pass over the inputs.

    Args:
        recipe: what is written.
        outputs: where each target goes, (num_targets).
        resume: keep files that are finished already (same inputs, same request).
        part: (i, n): write only every n-th file from the i-th on. Other processes write the others;
            the one that finds all of them finished writes what belongs to them. Needs `resume`.
        progress: called with (elements done, elements in all).

    Raises:
        SnapshotFormatError: an input is damaged.
        SnapshotWriteError: an output cannot be written. Files that were finished before stay.
        SynthesisError: a value overflows float16.

    Returns:
        Whether all files are there, those of other processes too.
    """
    assert len(outputs) == len(recipe.labels)
    mine, total_parts = part
    assert resume or total_parts == 1
    parts = list(zip(*(output.layout.files for output in outputs), strict=True))
    missing = [
        set(output.paths) if not resume else unfinished(recipe, i, output)
        for i, output in enumerate(outputs)
    ]
    for output, some in zip(outputs, missing, strict=True):
        if resume:
            _remove_temporaries(output, output.paths[mine::total_parts])
        if some:
            _invalidate(output)
    waiting = [
        [i for i, output in enumerate(outputs) if output.paths[k] in missing[i]]
        for k in range(mine, len(parts), total_parts)
    ]
    parts = parts[mine::total_parts]
    total = sum(_averaged_elements(recipe, files[0]) for files in parts)
    done = 0
    for files, targets in zip(parts, waiting, strict=True):
        if targets:
            for step in _write_files(recipe, outputs, files, targets):
                done += step
                if progress is not None:
                    progress(done, total)
        else:
            done += _averaged_elements(recipe, files[0])
    complete = True
    for i, output in enumerate(outputs):
        if total_parts > 1 and unfinished(recipe, i, output):
            complete = False
        elif not output.alone:
            _write_companions(recipe, i, output)
    return complete


def _averaged_elements(recipe: Recipe, file: FileLayout) -> int:
    sources = {t.source: t for t in file.tensors if recipe.table.entries[t.source].averaged}
    return sum(int(np.prod(t.shape, dtype=np.int64)) for t in sources.values())


def _remove_temporaries(output: Output, paths: Sequence[Path]) -> None:
    """Remove what a killed call left half written under these names."""
    for path in output.folder.glob(".tmp-*"):
        if is_temporary_name(path.name) and path.name[5:-9] in {p.name for p in paths}:
            path.unlink(missing_ok=True)


def _invalidate(output: Output) -> None:
    """Take away what says that an output is complete, and the weights of an output that it replaces."""
    if output.alone:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        old = json.loads(output.record.read_text("utf-8"))["files"]
        keep = {file.name for file in output.layout.files}
        for name in old:
            if Path(name).name == name and name.endswith(".safetensors") and name not in keep:
                (output.folder / name).unlink(missing_ok=True)
    names = [output.record] + ([output.folder / output.layout.index] if output.layout.index else [])
    for path in names:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise SnapshotWriteError(
                f"{path}: cannot be replaced: {error.strerror}. Choose another --out."
            ) from error


def _write_files(
    recipe: Recipe, outputs: Sequence[Output], files: Sequence[FileLayout], targets: Sequence[int]
) -> Iterator[int]:
    """Write one file of each of the given targets; yields elements as they are done."""
    first = files[targets[0]]
    entries = recipe.table.entries
    tensors: dict[str, list[OutputTensor]] = {}
    for tensor in first.tensors:
        tensors.setdefault(tensor.source, []).append(tensor)
    layout = [(t.name, t.dtype, t.shape) for t in first.tensors]
    with contextlib.ExitStack() as stack:
        metadata = [_metadata(recipe, i, outputs[i], files[i]) for i in targets]
        writers = [
            stack.enter_context(TensorFileWriter(outputs[i].folder / files[i].name, layout, meta))
            for i, meta in zip(targets, metadata, strict=True)
        ]
        averaged = [name for name in tensors if entries[name].averaged]
        if averaged:
            for block in recipe.blocks(averaged, targets):
                for writer, values in zip(writers, block.values, strict=True):
                    _write_block(writer, tensors[block.name], block.start, values)
                yield block.values.shape[1]
        for name, copies in tensors.items():
            if not entries[name].averaged:
                bits = recipe.copy(name)
                for tensor in copies:
                    stored = _converted(bits, entries[name].dtype, tensor.dtype)
                    for writer in writers:
                        writer.write(tensor.name, stored)
        for writer, meta in zip(writers, metadata, strict=True):
            if _MODEL_HASH in meta:
                writer.set_metadata({**meta, _MODEL_HASH: writer.data_sha256()})


def _write_block(
    writer: TensorFileWriter, tensors: Sequence[OutputTensor], start: int, values: Float32Array
) -> None:
    for tensor in tensors:
        stored = encode(values, tensor.dtype)
        if tensor.dtype == "float16" and not np.isfinite(stored).all():
            _refuse_overflow(tensor.name, values)
        writer.write(tensor.name, stored, start)


def _converted(bits: AnyArray, have: str, wanted: str) -> AnyArray:
    """Bits of a copied tensor in another floating dtype."""
    if have == wanted:
        return bits
    assert {have, wanted} <= FLOATING, (have, wanted)
    return encode(decode(bits, have), wanted)


def _refuse_overflow(name: str, values: Float32Array) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and np.abs(finite).max() > np.finfo(np.float16).max:
        raise SynthesisError(
            f"tensor {name!r} holds {np.abs(finite).max():.3g}, float16 ends at 65504. "
            "Write it with --dtype float32 or --dtype bfloat16."
        )


def _metadata(recipe: Recipe, target: int, output: Output, file: FileLayout) -> dict[str, str]:
    """String map of a file: ours under one key, beside what is carried over."""
    full = recipe.provenance[target]
    # Of a folder, phema.json holds the inputs; repeating them in every shard would only cost room.
    own = full if output.alone else {k: v for k, v in full.items() if k != "inputs"}
    own = {**own, "digest": digest(recipe, target, file)}
    carried = dict(file.metadata)
    carried.pop(_LEGACY_HASH, None)  # of bytes at a fixed place of kohya's own file: cannot be ours
    if _MODEL_HASH in carried:
        carried[_MODEL_HASH] = "0" * 64  # filled in when the data is there
    ours = {METADATA_KEY: json.dumps(own)}
    return {**ours, **(recipe.metadata if output.alone else {}), **carried}


def _write_companions(recipe: Recipe, target: int, output: Output) -> None:
    """What makes weights a model folder; the index, without which shards are nothing, comes last."""
    layout = output.layout
    for source in layout.copied:
        _write_bytes(output.folder / source.name, source.read_bytes())
    record = {
        **recipe.provenance[target],
        "like": None if layout.like is None else str(layout.like),
        "variant": layout.variant,
        "files": {path.name: path.stat().st_size for path in output.paths},
        "digests": {f.name: digest(recipe, target, f) for f in layout.files},
    }
    readme = output.folder / card_name(layout.variant)
    _write_bytes(readme, card(record, layout).encode())
    write_json(output.record, record)
    if layout.index is not None:
        text = json.dumps(layout.index_json(), indent=2) + "\n"
        _write_bytes(output.folder / layout.index, text.encode())


def _write_bytes(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    with atomic_write(path) as descriptor:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
