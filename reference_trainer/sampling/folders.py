"""A folder of generated images: one PNG per seed, labels as in a data set, resumable.

`sampling.json` says how the images were made; a folder takes no images that were made otherwise.
`dataset.json` holds the labels in the layout that training reads, so the folder is a data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from posthoc_ema.tensor_files import is_temporary_name, write_json
from reference_trainer.sampling.images import ImageBatch
from reference_trainer.sampling.pictures import image_grid, save_png

SETTINGS = "sampling.json"
LABELS = "dataset.json"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_WRITERS = 4


def image_name(seed: int) -> str:
    """File name of a seed's image."""
    return f"{seed:08d}.png"


def prepare_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Make a folder ready for images: new, or one whose images were made in the same way.

    Args:
        folder: the folder; made if needed.
        settings: how the images are made, as JSON values.
        overwrite: remove the images that are there.

    Raises:
        ConfigError: the folder holds something else, or images that were made otherwise.
        SnapshotWriteError: it cannot be written.
    """
    wanted = json.loads(json.dumps(settings))
    path = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        stored = _read(path)
        if overwrite:
            for image in existing_images(folder, complete=False).values():
                image.unlink()
            (folder / LABELS).unlink(missing_ok=True)
        elif stored != wanted:
            raise ConfigError(
                f"{folder} holds images that were made otherwise ({_difference(stored, wanted)}). "
                "Choose another folder, or --overwrite to replace them."
            )
    elif any(not is_temporary_name(entry.name) for entry in folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files that are not of `phema sample`. Choose a new or empty folder."
        )
    for leftover in folder.glob(".*"):
        if is_temporary_name(leftover.name):
            leftover.unlink()
    write_json(path, wanted)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is damaged: it is no JSON. Remove its folder.") from None


def _difference(stored: Any, wanted: Any) -> str:
    there, here = _flat(stored), _flat(wanted)
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return "; ".join(
        f"{name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here" for name in names
    )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested JSON values, under names such as `sampler.churn`."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(str(i), part) for i, part in enumerate(value, 1)]  # type: ignore[assignment]
    else:
        return {name: json.dumps(value)}
    return {
        key: leaf
        for inner, part in parts
        for key, leaf in _flat(part, f"{name}.{inner}".lstrip(".")).items()
    }


def existing_images(folder: Path, *, complete: bool = True) -> dict[int, Path]:
    """The images of a folder by seed.

    Args:
        folder: the folder.
        complete: leave those out that a crash of the machine has cut off.
    """
    found = {}
    for path in sorted(folder.glob("*.png")):
        named = path.stem.isdecimal() and path.name == image_name(int(path.stem))
        if named and (not complete or _is_complete(path)):
            found[int(path.stem)] = path
    return found


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(_PNG_END)))
        return file.read() == _PNG_END


class ImageWriter:
    """Writes batches of images into a folder, in the background; a context.

    Args:
        folder: a prepared folder.
        seeds: the seeds whose images are wanted; others of a batch are not written.
    """

    def __init__(self, folder: Path, seeds: Iterable[int]) -> None:
        self.folder, self.seeds = folder, frozenset(seeds)
        self.labels: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="png")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, batch: ImageBatch) -> None:
        """Take a batch; waits until the one before is written.

        Raises:
            SnapshotWriteError: an image of the batch before could not be written.
        """
        self._wait()
        for i, seed in enumerate(batch.seeds):
            if batch.labels is not None:
                self.labels[seed] = int(batch.labels[i])
            if seed in self.seeds:
                self._pending.append(self._pool.submit(self._save, seed, batch.images[i]))

    def _save(self, seed: int, image: npt.NDArray[np.uint8]) -> None:
        picture = image_grid(image[None], columns=1)
        save_png(self.folder / image_name(seed), picture, durable=False)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


def write_labels(folder: Path, labels: Mapping[int, int] | None) -> None:
    """Write `dataset.json`: the label of every image of the folder; null without classes.

    Args:
        folder: the folder.
        labels: class of each image by seed.
    """
    entries = None
    if labels is not None:
        entries = [[image_name(seed), labels[seed]] for seed in existing_images(folder)]
    write_json(folder / LABELS, {"labels": entries})


def stored_labels(folder: Path) -> dict[int, int]:
    """Labels that `dataset.json` holds, by seed; empty if there is none."""
    path = folder / LABELS
    if not path.exists():
        return {}
    entries: Sequence[tuple[str, int]] = _read(path).get("labels") or ()
    return {int(Path(name).stem): int(label) for name, label in entries}
