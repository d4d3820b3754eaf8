"""Data sets of files: images, or latents, in a folder or a zip, with labels.

The layout is EDM2's: `NNNNN/imgNNNNNNNN.png` or `NNNNN/img-mean-std-NNNNNNNN.npy`, and `dataset.json` with
`{"labels": [[name, class], ...]}`. Any other names do as well; without `dataset.json` the top-level folders
are the classes. Items are in the order of their sorted names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from posthoc_ema import ConfigError
from posthoc_ema.tensor_files import brief, strict_json
from reference_trainer.data.archive import Files, open_files
from reference_trainer.data.dataset import Indices, Kind, Values, fingerprint
from reference_trainer.data.images import (
    IMAGE_SUFFIXES,
    LATENT_SUFFIX,
    MEAN_STD_PREFIX,
    decode_latent,
    decode_pixels,
)

LABELS_FILE = "dataset.json"
MAX_LABEL = 2**20
_NUMBERED = re.compile(r"(\d{5})/img(?:-mean-std-)?\1\d{3}\.\w+")


class FileDataset:
    """Images or latents of files; a `Dataset`. Made by `load_dataset`.

    Args:
        files: the files.
        name: what to call it in messages.

    Attributes:
        names: name of each item's file.
        metadata: what `dataset.json` holds besides the labels.

    Raises:
        ConfigError: there are no items, the first cannot be read, or the labels are wrong; names the file.
    """

    def __init__(self, files: Files, name: str) -> None:
        self.name, self._files = name, files
        self.names, self.kind = item_names(files)
        table, self.metadata = read_labels_file(files)
        labels = item_labels(files, self.names, table)
        self.label_dim = 0 if labels is None else max(labels) + 1
        self.labels: Indices = np.array(labels or [0] * len(self.names), np.int64)
        first = self._decode(self.names[0], None)
        self.resolution = int(first.shape[-1])
        self._stored_channels = int(first.shape[0])
        self.channels = self._stored_channels // (2 if self._has_std() else 1)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and labels; the same for a folder and a zip of the same files."""
        sizes = [self._files.sizes[name] for name in self.names]
        parts = ("\n".join(self.names).encode(), np.array(sizes, np.int64).data, self.labels.data)
        return fingerprint(*parts)

    def read(self, indices: Indices) -> tuple[Values, Indices]:
        """The items at `indices`; see `Dataset.read`."""
        values = [self._checked(self.names[i]) for i in indices]
        shape = (0, self._stored_channels, self.resolution, self.resolution)
        stacked = np.stack(values) if values else np.empty(shape, self._dtype)
        return stacked, self.labels[indices]

    def read_file(self, index: int) -> bytes:
        """The bytes of an item's file."""
        return self._files.read(self.names[index])

    @property
    def _dtype(self) -> type[np.generic]:
        return np.uint8 if self.kind == "pixels" else np.float32

    def _has_std(self) -> bool:
        if self.kind == "pixels":
            return False
        stored = [PurePosixPath(name).name.startswith(MEAN_STD_PREFIX) for name in self.names]
        where = self._where(self.names[0])
        if any(stored) != all(stored):
            raise ConfigError(
                f"{where}: some files are named {MEAN_STD_PREFIX}... and some are not. Keep latents with and "
                "without standard deviations apart."
            )
        if stored[0] and self._stored_channels % 2:
            raise ConfigError(
                f"{where} must hold means and as many standard deviations, got {self._stored_channels} "
                "channels. Make it again with `phema dataset encode`."
            )
        return stored[0]

    def where(self, index: int) -> str:
        """What to call an item in messages."""
        return self._where(self.names[index])

    def _where(self, name: str) -> str:
        return f"{self._files.path}/{name}"

    def _decode(self, name: str, side: int | None) -> Values:
        decode = decode_pixels if self.kind == "pixels" else decode_latent
        return decode(self._files.read(name), self._where(name), side)

    def _checked(self, name: str) -> Values:
        values = self._decode(name, self.resolution)
        if len(values) != self._stored_channels:
            raise ConfigError(
                f"{self._where(name)} has {len(values)} channels, the first item has "
                f"{self._stored_channels}. `phema dataset convert` makes all images RGB."
            )
        return values


def open_dataset(path: Path, name: str | None = None) -> FileDataset:
    """The data set of a folder or a zip.

    Raises:
        ConfigError: see `FileDataset`.
    """
    return FileDataset(open_files(path), name or path.stem)


def item_names(files: Files) -> tuple[Sequence[str], Kind]:
    """Names of the items, sorted, and what they are.

    Raises:
        ConfigError: there are none, or images and latents stand side by side.
    """
    images = [name for name in files.sizes if name.lower().endswith(IMAGE_SUFFIXES)]
    latents = [name for name in files.sizes if name.endswith(LATENT_SUFFIX)]
    if images and latents:
        raise ConfigError(
            f"data {files.path} holds images and latents ({images[0]}, {latents[0]}). Keep them apart."
        )
    if not images and not latents:
        raise ConfigError(
            f"data {files.path} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no latents "
            f"({LATENT_SUFFIX}). Check the path."
        )
    return (images, "pixels") if images else (latents, "latents")


def read_labels_file(files: Files) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Labels by name from `dataset.json` (None: it has none, or there is no such file), and its other keys.

    Raises:
        ConfigError: it is malformed.
    """
    if LABELS_FILE not in files.sizes:
        return None, {}
    where = f"{files.path}/{LABELS_FILE}"
    try:
        value = strict_json(files.read(LABELS_FILE))
        if not isinstance(value, dict):
            raise ValueError("it is no table")
        rows = value.pop("labels", None)
        if rows is None:
            return None, {**value, "labels": None}
        table = {str(name).replace("\\", "/"): label for name, label in rows}
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f'{where} must be {{"labels": [[name, class], ...]}} or {{"labels": null}}: {error}.'
        ) from None
    return table, value


def item_labels(
    files: Files, names: Sequence[str], table: Mapping[str, Any] | None
) -> list[int] | None:
    """Label of each item; None without labels.

    Raises:
        ConfigError: an item has no label, or one that is no class number.
    """
    if table is None:
        return None if LABELS_FILE in files.sizes else labels_of_folders(names)
    labels = []
    for name in names:
        if name not in table:
            raise ConfigError(
                f"{files.path}/{LABELS_FILE} has no label for {name}. Add it, or write "
                '{"labels": null} for data without labels.'
            )
        check_label(table[name], f"{files.path}/{LABELS_FILE}, {name}")
        labels.append(table[name])
    return labels


def check_label(label: object, where: str) -> None:
    """Check the number of a class.

    Raises:
        ConfigError: it is no integer, negative or absurdly large.
    """
    if type(label) is not int or not 0 <= label < MAX_LABEL:
        raise ConfigError(
            f"{where}: a label must be an integer in 0..{MAX_LABEL - 1}, got {brief(label)}. "
            "Number the classes from 0."
        )


def labels_of_folders(names: Sequence[str]) -> list[int] | None:
    """Classes by top-level folder, numbered in sorted order.

    None if there are none: an item lies beside the folders, or the folders only count the items, as in
    `00000/img00000000.png`.

    Example:
        >>> labels_of_folders(["cat/1.png", "dog/1.png", "dog/2.png"])
        [0, 1, 1]
    """
    if any("/" not in name for name in names):
        return None
    if all(_NUMBERED.fullmatch(name) for name in names):
        return None
    tops = [name.partition("/")[0] for name in names]
    number = {top: i for i, top in enumerate(sorted(set(tops)))}
    return [number[top] for top in tops]
