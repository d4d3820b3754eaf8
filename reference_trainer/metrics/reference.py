"""Reference statistics: what the features of the real images look like, in one safetensors file.

A file holds an entry for each extractor: tensors `<extractor>.mean` and `<extractor>.covariance` (float64),
optionally `<extractor>.features` (float32), and one JSON record in the metadata that says of which images and
of which weights they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import MetricError
from posthoc_ema.tensor_files import TensorFile, strict_json, write_tensors
from reference_trainer.metrics.extractors import EXTRACTORS, Extractor
from reference_trainer.metrics.frechet import Moments

KEY = "reference_statistics"
SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The real side of a comparison, for one extractor.

    Attributes:
        extractor: its name.
        moments: mean and covariance of the features of all real images.
        features: single vectors of a random choice of them, float32 `[m, d]`; None if there are none.
        weights_hash: of the extractor's weights; "" if it is not known (imported statistics).
        source: where the images or the statistics come from, for people.
        fingerprint: of the images; "" if it is not known.
    """

    extractor: str
    moments: Moments
    features: npt.NDArray[np.float32] | None = None
    weights_hash: str = ""
    source: str = ""
    fingerprint: str = ""

    @property
    def feature_dim(self) -> int:
        """Length of a feature vector."""
        return len(self.moments.mean)


def check_fits(reference: Reference, extractor: Extractor, place: str) -> None:
    """Raise MetricError unless these statistics are of this extractor and its weights.

    Args:
        reference: the statistics.
        extractor: what generated images are measured with.
        place: of the statistics, for the message.
    """
    if reference.extractor != extractor.name or reference.feature_dim != extractor.feature_dim:
        raise MetricError(
            f"{place}: statistics of {reference.extractor} ({reference.feature_dim} features) do not go "
            f"with the extractor {extractor.name} ({extractor.feature_dim} features). Use the reference of "
            "the same extractor."
        )
    if reference.weights_hash and reference.weights_hash != extractor.weights_hash:
        raise MetricError(
            f"{place}: its {reference.extractor} features are of weights {reference.weights_hash[:12]}, "
            f"and the extractor has weights {extractor.weights_hash[:12]}. Use the same weights, or make "
            "the reference anew with `phema reference make`."
        )


def write_references(path: str | Path, references: Mapping[str, Reference]) -> None:
    """Write statistics; the file appears complete or not at all.

    Args:
        path: the file, .safetensors; an existing one is replaced.
        references: extractor name -> its statistics, at least one.

    Raises:
        SnapshotWriteError: writing failed.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}
    entries = {}
    for name, reference in references.items():
        tensors[f"{name}.mean"] = reference.moments.mean
        tensors[f"{name}.covariance"] = reference.moments.covariance
        if reference.features is not None:
            tensors[f"{name}.features"] = reference.features
        entries[name] = {
            "count": reference.moments.count,
            "weights_hash": reference.weights_hash,
            "source": reference.source,
            "fingerprint": reference.fingerprint,
        }
    record = {"schema": SCHEMA, "entries": entries}
    write_tensors(Path(path), tensors, {KEY: json.dumps(record)})


def read_references(path: str | Path) -> dict[str, Reference]:
    """Read the statistics of a file.

    Args:
        path: as `write_references` made it.

    Returns:
        Extractor name -> its statistics.

    Raises:
        SnapshotFormatError: the file is missing, or no readable safetensors file.
        MetricError: it holds no reference statistics, or impossible ones.
    """
    with TensorFile(path) as file:
        if KEY not in file.header.metadata:
            raise MetricError(
                f"{path}: holds no reference statistics. Make them with `phema reference make`, or take "
                "published ones with `phema reference import`."
            )
        entries = _entries(Path(path), file.header.metadata[KEY])
        return {name: _read_entry(Path(path), file, name, entry) for name, entry in entries.items()}


def _entries(path: Path, text: str) -> dict[str, dict[str, Any]]:
    try:
        record = strict_json(text)
        if record["schema"] > SCHEMA:
            raise MetricError(
                f"{path}: statistics of schema {record['schema']}, this version reads up to {SCHEMA}. "
                "Upgrade posthoc-ema."
            )
        entries = record["entries"]
        if not entries or not all(
            name in EXTRACTORS
            and type(entry["count"]) is int
            and all(
                isinstance(entry[key], str) for key in ("weights_hash", "source", "fingerprint")
            )
            for name, entry in entries.items()
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged(path, "its record is malformed") from None
    return dict(entries)


def _read_entry(path: Path, file: TensorFile, name: str, entry: Mapping[str, Any]) -> Reference:
    names = (f"{name}.mean", f"{name}.covariance")
    if not all(tensor in file.header.tensors for tensor in names):
        raise damaged(path, f"it has no mean and covariance of {name}")
    mean, covariance = (file.read(tensor) for tensor in names)
    features = None
    if f"{name}.features" in file.header.tensors:
        features = file.read(f"{name}.features")
        if features.shape[1:] != mean.shape or features.dtype != np.float32:
            raise damaged(path, f"the features of {name} have another size than their mean")
    moments = checked_moments(path, entry["count"], mean, covariance)
    return Reference(
        name, moments, features, entry["weights_hash"], entry["source"], entry["fingerprint"]
    )


def checked_moments(
    path: Path, count: int, mean: npt.NDArray[Any], covariance: npt.NDArray[Any]
) -> Moments:
    """Mean and covariance in float64, if they can be those of some features.

    Args:
        path: where they come from, for the messages.
        count: number of vectors; 0 if it is not known.
        mean: any real dtype, `[d]`.
        covariance: `[d, d]`.

    Raises:
        MetricError: shapes do not fit, a value is not finite, or the covariance is not one.
    """
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise damaged(
            path, f"mean {list(mean.shape)} and covariance {list(covariance.shape)} do not fit"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise damaged(path, f"its statistics are {mean.dtype} and {covariance.dtype}, not floats")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise damaged(path, "its statistics hold NaN or infinity")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * abs(covariance).max()):
        raise damaged(path, "its covariance is not symmetric")
    if covariance.diagonal().min() < 0:
        raise damaged(path, "its covariance has a negative variance")
    return Moments(count, mean, covariance)


def damaged(path: Path, what: str) -> MetricError:
    """The error for statistics that cannot be used."""
    return MetricError(
        f"{path}: no usable reference statistics: {what}. Make them again with `phema reference make`, or "
        "restore the file from a copy."
    )
