"""LoRA files of kohya's sd-scripts and of musubi-tuner: raw weights of several times, with metadata.

The files are safetensors: `NAME-000004.safetensors` (after an epoch), `NAME-step00000500.safetensors`,
and `NAME.safetensors` (the last). They are weights, not averages; the store holds them as such.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from posthoc_ema.codecs import AnyArray
from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.importers.plans import (
    Contents,
    ImportOptions,
    ImportPlan,
    SourceFile,
    contents,
    plan_files,
)
from posthoc_ema.profiles import PointProfile
from posthoc_ema.snapshot import METADATA_KEY
from posthoc_ema.tensor_files import Header, TensorFile, byte_view, checksum, read_header

_NAME = re.compile(r"(?P<run>.+?)(-step(?P<step>\d{1,15})|-(?P<epoch>\d{6}))?\.safetensors")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of one file: wrong for every other
_CONSTANT = ".alpha"


class _StoredTensor:
    """A tensor of an open safetensors file."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self._file = file
        self._name = name
        info = file.header.tensors[name]
        self.dtype = info.dtype
        self.shape = info.shape

    def read(self) -> AnyArray:
        return self._file.read(self._name)


def plan_lora(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of a folder of LoRA files of one run.

    Raises:
        SnapshotNotFoundError: there are none.
        SnapshotMismatchError: they are of several runs.
        ConfigError: a time cannot be told, or an option does not apply.
        SnapshotFormatError: a file is damaged.
    """
    if options.sigma_rels or options.update_every or options.batch_size:
        raise ConfigError(
            "--sigma-rel, --update-every and --batch-size are for averages; these files are raw weights. "
            "Leave them out."
        )
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    named = [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]
    if not named:
        raise SnapshotNotFoundError(f"{source} holds no .safetensors files.")
    runs = sorted({match["run"] for _, match in named})
    if len(runs) > 1:
        raise SnapshotMismatchError(
            f"{source} holds files of {len(runs)} runs, {runs[0]} and {runs[1]}. Keep those of one run "
            "in a folder."
        )
    headers = {path: read_header(path) for path, _ in named}
    times, notes = _times(source, named, headers, options.times)
    _check_constants(headers)
    files = [
        SourceFile(
            path, times[path], PointProfile(times[path]), functools.partial(_open, headers[path])
        )
        for path, _ in named
    ]
    notes.append(
        "these are raw weights: `phema synth` averages what was saved, and what lies between is lost."
    )
    last = headers[max(times, key=lambda path: times[path])].metadata
    kept = {k: v for k, v in last.items() if k not in (*_HASHES, "format", METADATA_KEY)}
    if any(name in last for name in _HASHES):
        notes.append(
            "the metadata of the last file is carried over without its sshs hashes, which describe that "
            "file alone; nothing recomputes them."
        )
    return plan_files("kohya", "steps", files, {**kept, "imported_from": "kohya"}, notes)


def _times(
    source: Path,
    named: list[tuple[Path, re.Match[str]]],
    headers: dict[Path, Header],
    told: tuple[int, ...],
) -> tuple[dict[Path, int], list[str]]:
    """Time of each file: told, or steps in the metadata or the name, or epochs."""
    if told:
        # numbered files by their number, then the one without: the last
        numbers = {path: int(match["step"] or match["epoch"] or 10**18) for path, match in named}
        order = sorted(numbers, key=lambda path: numbers[path])
        if len(told) != len(order):
            raise ConfigError(
                f"--time names {len(told)} times for {len(order)} files. Give one for each."
            )
        return dict(zip(order, told, strict=True)), []
    steps = {p: _number(headers[p], "ss_steps") or int(match["step"] or 0) for p, match in named}
    if all(steps.values()):
        return steps, []
    epochs = {p: int(match["epoch"] or 0) or _number(headers[p], "ss_epoch") for p, match in named}
    if all(epochs.values()):
        return epochs, ["the files tell epochs only: one step of the store's clock is one epoch."]
    raise ConfigError(
        f"the files of {source} do not all say their step or epoch, in ss_steps, ss_epoch or the "
        "name. Give --time, one for each file in the order of their numbers, the unnumbered one last."
    )


def _number(header: Header, key: str) -> int:
    """A whole number of the metadata; 0 if there is none."""
    text = header.metadata.get(key, "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0


def _check_constants(headers: dict[Path, Header]) -> None:
    """Refuse files whose `.alpha` differ: they scale the other tensors, which then do not compare."""
    first: tuple[Path, dict[str, str]] | None = None
    for path, header in headers.items():
        with TensorFile(path, header) as file:
            alphas = {
                name: checksum(byte_view(file.read(name)))
                for name, info in header.tensors.items()
                if name.endswith(_CONSTANT) and info.size <= 64
            }
        if first is None:
            first = (path, alphas)
        different = [n for n, value in alphas.items() if first[1].get(n, value) != value]
        if different:
            raise SnapshotMismatchError(
                f"{path}: {different[0]!r} differs from {first[0].name}: files of several runs. Keep "
                "those of one run in a folder."
            )


@contextlib.contextmanager
def _open(header: Header) -> Iterator[Contents]:
    with TensorFile(header.path, header) as file:
        if not header.tensors:
            raise SnapshotFormatError(f"{header.path}: holds no tensors.")
        named = {name: _StoredTensor(file, name) for name in header.tensors}
        constant = tuple(name for name in named if name.endswith(_CONSTANT))
        yield contents(header.path, named, constant)
