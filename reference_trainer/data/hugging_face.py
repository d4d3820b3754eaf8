"""Data sets that Hugging Face's `datasets` saved to disk (`save_to_disk`), read without a download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_ema import ConfigError
from reference_trainer.data.dataset import Indices, Kind, fingerprint, integers
from reference_trainer.data.items import check_label

_ONE, _SPLITS = "state.json", "dataset_dict.json"
_SPLIT = "train"
_LABEL_NAMES = ("label", "labels", "class", "fine_label")


class SavedItems:
    """Images of a saved `datasets.Dataset`; `EncodedItems`.

    Args:
        rows: the `datasets.Dataset`.
        path: where it was saved, for messages.
        name: what to call it in messages.

    Raises:
        ConfigError: it has no column of images or no rows, or the labels are wrong.
    """

    kind: Kind = "pixels"

    def __init__(self, rows: Any, path: Path, name: str) -> None:
        self.name, self._path = name, path
        self._column, label = columns(rows.features, path)
        if len(rows) == 0:
            raise ConfigError(f"data {path} holds no rows. Check the path.")
        self._rows = undecoded(rows, self._column)
        self._identity = str(rows._fingerprint)  # no public name; it is what is saved with the rows
        self.metadata: Mapping[str, Any] = {}
        self.labels: Indices | None = None
        self.label_dim = 0
        if label is not None:
            self._read_labels(rows, label)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the fingerprint that `datasets` gave it, and of the labels."""
        return fingerprint(self._identity.encode(), integers(self.labels))

    def where(self, index: int) -> str:
        """Folder, row and column of an image."""
        return f"{self._path}, row {index} ({self._column})"

    def read_files(self, indices: Indices) -> list[bytes]:
        """The encoded images of the rows at `indices`."""
        items = self._rows[indices.tolist()].column(self._column).to_pylist()
        return [self._encoded(item, int(i)) for item, i in zip(items, indices, strict=True)]

    def _read_labels(self, rows: Any, column: str) -> None:
        values = rows.with_format("arrow").select_columns([column])[:].column(column).to_pylist()
        for i, value in enumerate(values):
            check_label(value, f"{self._path}, row {i} ({column})")
        self.labels = np.array(values, np.int64)
        named = getattr(rows.features[column], "num_classes", 0) or 0
        self.label_dim = max(named, int(self.labels.max()) + 1)

    def _encoded(self, item: Mapping[str, Any] | None, index: int) -> bytes:
        if item is not None and item.get("bytes") is not None:
            return bytes(item["bytes"])
        try:
            return Path(str((item or {}).get("path"))).read_bytes()
        except OSError:
            raise ConfigError(
                f"{self.where(index)} holds no image, and the file that it names cannot be read. Save the "
                "data set again with its images in it."
            ) from None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / _SPLITS).is_file() or (path / _ONE).is_file()


def open_saved_rows(path: Path) -> Any:
    """The `datasets.Dataset` of a folder; of several splits "train", or the only one.

    Raises:
        ConfigError: `datasets` is not installed, the folder is damaged, or the split is not clear.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"data {path} was saved by Hugging Face's datasets, which is not installed. "
            "Run: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"data {path} cannot be read by datasets ({type(error).__name__}). Save it again with "
            "save_to_disk."
        ) from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    splits = list(loaded)
    if _SPLIT not in splits and len(splits) != 1:
        raise ConfigError(
            f"data {path} has the splits {', '.join(splits)}. Give the folder of one: {path / splits[0]}"
        )
    return loaded[_SPLIT if _SPLIT in splits else splits[0]]


def open_saved_items(path: Path, name: str) -> SavedItems:
    """The items of a folder of `save_to_disk`.

    Raises:
        ConfigError: see `open_saved_rows` and `SavedItems`.
    """
    return SavedItems(open_saved_rows(path), path, name)


def columns(features: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """Name of the column of images, and that of the labels if there is one.

    Raises:
        ConfigError: no column holds images.
    """
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ConfigError(
            f"data {path} has no column of images, only {', '.join(features)}. Cast one to datasets.Image "
            "and save it again."
        )
    labels = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [n for n in _LABEL_NAMES if _is_integer(features.get(n))]
    return images[0], labels[0] if labels else None


def undecoded(rows: Any, column: str) -> Any:
    """The rows with images as the bytes of their files, as Arrow tables."""
    import datasets

    narrow = rows.select_columns([column])
    return narrow.cast_column(column, datasets.Image(decode=False)).with_format("arrow")


def _is_integer(kind: Any) -> bool:
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint"))
