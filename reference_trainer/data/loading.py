"""From a name or a path to a data set."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

from posthoc_ema.errors import ConfigError
from reference_trainer.config import DataConfig
from reference_trainer.data import digits, photos
from reference_trainer.data.dataset import ArrayDataset, Dataset
from reference_trainer.data.files import open_file_items
from reference_trainer.data.hugging_face import is_saved_dataset, open_saved_items
from reference_trainer.data.items import ArrayItems, EncodedDataset, EncodedItems


def _digits() -> ArrayDataset:
    images, labels = digits.load_arrays()
    return ArrayDataset(name="digits", images=images, labels=labels, label_dim=10)


def _photos(side: int) -> ArrayDataset:
    images, labels = photos.load_arrays(side)
    classes = len(photos.PHOTOGRAPHS)
    return ArrayDataset(name=f"photos-{side}", images=images, labels=labels, label_dim=classes)


_BUILT_IN: dict[str, Callable[[], ArrayDataset]] = {
    "digits": _digits,
    **{f"photos-{side}": functools.partial(_photos, side) for side in photos.STRIDES},
}


def load_built_in(name: str) -> ArrayDataset:
    """Load a built-in data set, which is in memory.

    Args:
        name: `"digits"`, scikit-learn's 1797 handwritten digits, 8x8 gray; `"photos-16"`, `"photos-32"`
            or `"photos-64"`, RGB patches of eight photographs. Nothing is downloaded.

    Raises:
        ConfigError: the name is unknown, or the package that carries the images is not installed.

    Example:
        >>> dataset = load_built_in("digits")
        >>> dataset.images.shape, dataset.label_dim
        ((1797, 1, 8, 8), 10)
    """
    if name not in _BUILT_IN:
        near = difflib.get_close_matches(name, _BUILT_IN, n=1, cutoff=0.0)[0]
        known = ", ".join(sorted(_BUILT_IN))
        raise ConfigError(
            f"data set must be one of: {known}; or a path that exists; got '{name}'. "
            f"Did you mean '{near}'?"
        )
    return _BUILT_IN[name]()


@overload
def load_dataset(
    source: Literal["digits", "photos-16", "photos-32", "photos-64"],
) -> ArrayDataset: ...
@overload
def load_dataset(source: DataConfig | str) -> Dataset: ...
def load_dataset(source: DataConfig | str) -> Dataset:
    """Load a data set by name, path or configuration.

    Args:
        source: name of a built-in data set (`load_built_in`), path of a folder, zip or Hugging Face data
            set on disk, or the configuration of a run, whose `path` counts if it has one.

    Raises:
        ConfigError: there is none of that name or path, or it cannot be used; names the file.

    Example:
        >>> len(load_dataset("digits"))
        1797
    """
    if isinstance(source, DataConfig):
        if source.path is None:
            return load_built_in(source.name)
        return open_path(Path(source.path), source.name)
    return open_path(Path(source)) if is_path(source) else load_built_in(source)


def is_path(source: str) -> bool:
    """Whether a text means a path: it is not the name of a built-in data set, and exists or looks like one.

    Example:
        >>> is_path("digits"), is_path("./digits"), is_path("data/img64.zip")
        (False, True, True)
    """
    looks = os.sep in source or source.endswith(".zip")
    return source not in _BUILT_IN and (looks or Path(source).exists())


def open_path(path: Path, name: str | None = None) -> EncodedDataset:
    """The data set at a path.

    Raises:
        ConfigError: it cannot be used; names the file.
    """
    return EncodedDataset(_path_items(path, name or path.stem, None))


def open_items(source: str, labels: Path | None = None) -> EncodedItems:
    """The encoded items of a data set: images of any size, for example, before they are converted.

    Args:
        source: name of a built-in data set, or path of a folder, zip or Hugging Face data set on disk.
        labels: file like `dataset.json` in place of the labels that are there.

    Raises:
        ConfigError: they cannot be used; names the file.
    """
    if is_path(source):
        return _path_items(Path(source), Path(source).stem, labels)
    if labels is not None:
        raise ConfigError(f"the built-in data set {source} has labels of its own, not of {labels}.")
    return ArrayItems(load_built_in(source))


def _path_items(path: Path, name: str, labels: Path | None) -> EncodedItems:
    if not is_saved_dataset(path):
        return open_file_items(path, name, labels)
    if labels is not None:
        raise ConfigError(
            f"data {path} carries its own labels: rows of a saved data set have no names that {labels} "
            "could list."
        )
    return open_saved_items(path, name)
