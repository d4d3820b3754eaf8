"""Published reference statistics: pickles of EDM2 and `.npz` files of earlier FID tools.

A pickle holds {num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}; it is read as data and nothing in it is
executed. An `.npz` holds mu and sigma of the FID.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import MetricError
from posthoc_ema.importers.constructors import NumpyArray
from posthoc_ema.importers.pickle_values import Opaque
from posthoc_ema.importers.tensors import LazyTensor
from posthoc_ema.importers.torch_files import open_pickle
from reference_trainer.metrics.reference import Reference, checked_moments, damaged

_KEYS = {"fid": "inception", "fd_dinov2": "dinov2"}


def import_references(path: str | Path) -> dict[str, Reference]:
    """Read published statistics.

    Args:
        path: `.pkl` or `.npz`.

    Returns:
        Extractor name -> statistics; of unknown weights, since the files do not say.

    Raises:
        SnapshotFormatError: the file is missing or damaged.
        MetricError: it is of another kind, or its statistics cannot be used.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        return _of_pickle(path)
    if path.suffix == ".npz":
        return _of_npz(path)
    raise MetricError(
        f"{path}: published statistics are .pkl or .npz files. For images use `phema reference make`."
    )


def _of_pickle(path: Path) -> dict[str, Reference]:
    with open_pickle(path) as value:
        table = _table(path, value, "it")
        count = table.get("num_images", 0)
        if type(count) is not int or count < 0:
            raise damaged(path, "its num_images is no number of images")
        found = {}
        for key, extractor in _KEYS.items():
            if key not in table:
                continue
            entry = _table(path, table[key], f"its '{key}'")
            mean, covariance = (_array(path, entry.get(n), f"{key}.{n}") for n in ("mu", "sigma"))
            moments = checked_moments(path, count, mean, covariance)
            found[extractor] = Reference(extractor, moments, source=path.name)
    if not found:
        raise damaged(path, f"it holds neither {' nor '.join(_KEYS)}")
    return found


def _table(path: Path, value: Any, what: str) -> dict[Any, Any]:
    if isinstance(value, Opaque):
        if not value.items:
            raise damaged(
                path,
                f"{what} would be made by calling {value.module}.{value.name}, which is not done",
            )
        value = value.items  # a subclass of dict
    if not isinstance(value, dict):
        raise damaged(path, f"{what} is no table")
    return value


def _array(path: Path, value: Any, what: str) -> npt.NDArray[Any]:
    if isinstance(value, Opaque):
        raise damaged(
            path, f"{what} would be made by calling {value.module}.{value.name}, which is not done"
        )
    if isinstance(value, NumpyArray):
        value = value.tensor
    if not isinstance(value, LazyTensor):
        raise damaged(path, f"{what} is no array")
    return value.read()


def _of_npz(path: Path) -> dict[str, Reference]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            mean, covariance = file["mu"], file["sigma"]
    except FileNotFoundError:
        raise MetricError(f"{path}: the file is missing. Check the path.") from None
    except KeyError as error:
        raise damaged(path, str(error).strip("\"'")) from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error).splitlines()[0][:200]) from None
    moments = checked_moments(path, 0, mean, covariance)
    return {"inception": Reference("inception", moments, source=path.name)}
