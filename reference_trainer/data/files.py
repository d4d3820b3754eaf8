"""Items of a data set as files: images, or latents, in a folder or a zip, with labels.

The layout is EDM2's: `NNNNN/imgNNNNNNNN.png` or `NNNNN/img-mean-std-NNNNNNNN.npy`, and `dataset.json` with
`{"labels": [[name, class], ...]}`. Any other names do as well; without `dataset.json` the top-level folders
are the classes. Items are in the order of their sorted names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_ema import ConfigError
from posthoc_ema.tensor_files import strict_json
from reference_trainer.data.archive import Files, open_files
from reference_trainer.data.dataset import Indices, Kind, fingerprint, integers
from reference_trainer.data.images import IMAGE_SUFFIXES, LATENT_SUFFIX
from reference_trainer.data.items import check_label

LABELS_FILE = "dataset.json"
_NUMBERED = re.compile(r"(\d{5})/img(?:-mean-std-)?\1\d{3}\.\w+")


class FileItems:
    """Images or latents of files; `EncodedItems`.

    Args:
        files: the files.
        name: what to call them in messages.
        table: labels by name, in place of those of `dataset.json`.

    Attributes:
        names: name of each item's file.

    Raises:
        ConfigError: there are no items, or the labels are wrong; names the file.
    """

    def __init__(self, files: Files, name: str, table: Mapping[str, Any] | None = None) -> None:
        self.name, self._files = name, files
        self.names, self.kind = item_names(files)
        stored, self.metadata = read_labels_file(files)
        labels = item_labels(files, self.names, stored if table is None else table)
        self.label_dim = 0 if labels is None else max(labels) + 1
        self.labels: Indices | None = None if labels is None else np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, sizes and labels; the same for a folder and a zip of the same files."""
        sizes = np.array([self._files.sizes[name] for name in self.names])
        return fingerprint("\n".join(self.names).encode(), integers(sizes), integers(self.labels))

    def where(self, index: int) -> str:
        """Path of an item's file."""
        return f"{self._files.path}/{self.names[index]}"

    def read_files(self, indices: Indices) -> list[bytes]:
        """Content of the files at `indices`."""
        return [self._files.read(self.names[i]) for i in indices]


def open_file_items(path: Path, name: str, labels: Path | None = None) -> FileItems:
    """The items of a folder or a zip.

    Args:
        path: the folder or zip.
        name: what to call it in messages.
        labels: file like `dataset.json` in place of the one in it.

    Raises:
        ConfigError: see `FileItems`.
    """
    if labels is None:
        return FileItems(open_files(path), name)
    try:
        data = labels.read_bytes()
    except OSError as error:
        raise ConfigError(f"{labels}: cannot be read: {error.strerror}. Check the path.") from None
    table, _ = parse_labels(data, str(labels))
    return FileItems(open_files(path), name, table or {})


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
    return parse_labels(files.read(LABELS_FILE), f"{files.path}/{LABELS_FILE}")


def parse_labels(data: bytes, where: str) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Labels by name, and the other keys, of the bytes of a `dataset.json`.

    Raises:
        ConfigError: it is malformed.

    Example:
        >>> parse_labels(b'{"labels": [["00000/img00000000.png", 3]]}', "dataset.json")[0]
        {'00000/img00000000.png': 3}
    """
    try:
        value = strict_json(data)
        if not isinstance(value, dict):
            raise ValueError("it is no table")
        rows = value.pop("labels", None)
        table = None if rows is None else {_slashes(name): label for name, label in rows}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{where} must be {{"labels": [[name, class], ...]}} or {{"labels": null}}: {error}.'
        ) from None
    return table, value


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def item_labels(
    files: Files, names: Sequence[str], table: Mapping[str, Any] | None
) -> list[int] | None:
    """Label of each item; None without labels.

    Raises:
        ConfigError: an item has no label, or one that is no class number.
    """
    if table is None:
        return None if LABELS_FILE in files.sizes else labels_of_folders(names)
    for name in names:
        if name not in table:
            raise ConfigError(
                f"{files.path}: {LABELS_FILE} has no label for {name}. Add it, or write "
                '{"labels": null} for data without labels.'
            )
        check_label(table[name], f"{files.path}: {LABELS_FILE}, {name}")
    return [table[name] for name in names]


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
