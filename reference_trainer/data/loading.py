"""From a name or a path to a data set."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

from posthoc_ema.errors import ConfigError
from reference_trainer.config import DataConfig
from reference_trainer.data import digits
from reference_trainer.data.dataset import ArrayDataset, Dataset
from reference_trainer.data.files import open_dataset


def _digits() -> ArrayDataset:
    images, labels = digits.load_arrays()
    return ArrayDataset(name="digits", images=images, labels=labels, label_dim=10)


_BUILT_IN: dict[str, Callable[[], ArrayDataset]] = {"digits": _digits}


def load_built_in(name: str) -> ArrayDataset:
    """Load a built-in data set, which is in memory.

    Args:
        name: `"digits"`, scikit-learn's 1797 handwritten digits, 8x8 gray (no download).

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
        raise ConfigError(f"data set must be one of: {known}; got '{name}'. Did you mean '{near}'?")
    return _BUILT_IN[name]()


@overload
def load_dataset(source: Literal["digits"]) -> ArrayDataset: ...
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
        return open_dataset(Path(source.path), source.name)
    if source not in _BUILT_IN and Path(source).exists():
        return open_dataset(Path(source))
    return load_built_in(source)
