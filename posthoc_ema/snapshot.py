"""The record of one stored average: what it is, in which file, and how that is written down.

Identity lives in metadata, exactly: the time as an integer, sigma_rel at full precision, the run's id.
File names repeat it for people. docs/reference/store-format.md is the normative description.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posthoc_ema.classical_profiles import ExponentialProfile, TabulatedProfile, UniformProfile
from posthoc_ema.codecs import (
    BLOCK,
    DTYPE_CODES,
    FILE_CODECS,
    FLOATING,
    SCALES,
    element_dtype,
    is_delta,
)
from posthoc_ema.errors import InvalidProfileError
from posthoc_ema.profiles import GammaProfile, PointProfile, PowerProfile
from posthoc_ema.tensor_files import brief, checksum, data_order, fits_memory

SCHEMA = 2
METADATA_KEY = "posthoc_ema"
CLOCKS = ("steps", "images")
_FILE_NAME = re.compile(
    r"[0-9]{12,}-(raw|(sigma_rel|gamma|uniform|exponential|tabulated)-[0-9a-z.+-]+)(-v[0-9]{1,9})?\.safetensors"
)
_REVISION = re.compile(r"-v([0-9]+)(?=\.safetensors$)")
MAX_COEFFICIENT = 1e6
"""Coefficients of bases that a reader takes for undamaged. What is written stays below 32000: the noise of
1e-9 t in the fit that predicts an average keeps their squares below 1e9 (`chains`)."""

StoredProfile = (
    PowerProfile
    | PointProfile
    | GammaProfile
    | UniformProfile
    | ExponentialProfile
    | TabulatedProfile
)
"""Trackers of this package store power profiles and raw weights; the others come from other tools."""


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table: what a name stands for in the model.

    Attributes:
        name: as in the model's `state_dict`, without wrapper prefixes.
        shape: its shape.
        dtype: the model's own dtype, for example "bfloat16".
        averaged: True for averaged parameters; False for buffers and frozen parameters, which are
            copied from the live model bit by bit and never averaged or combined.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    averaged: bool


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a model, in its own order, tied names listed once.

    Attributes:
        entries: name -> entry.
        aliases: further names of tied tensors, alias -> name in `entries`.
    """

    entries: dict[str, TensorEntry]
    aliases: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """JSON form, as in the manifest."""
        tensors = {
            e.name: {
                "shape": list(e.shape),
                "dtype": e.dtype,
                "kind": "average" if e.averaged else "copy",
            }
            for e in self.entries.values()
        }
        return {"tensors": tensors, "aliases": dict(self.aliases)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TensorTable:
        """Inverse of `to_json`; raises ValueError with a reason for anything malformed."""
        entries: dict[str, TensorEntry] = {}
        for name, row in _table(value, "tensors").items():
            shape: Any = row.get("shape")
            dtype, kind = row.get("dtype"), row.get("kind")
            good_shape = isinstance(shape, list) and all(type(n) is int for n in shape)
            if not isinstance(dtype, str) or dtype not in DTYPE_CODES:
                raise ValueError(f"tensor {brief(name)} has no dtype that is known")
            if not good_shape or kind not in ("average", "copy"):
                raise ValueError(f"the row of tensor {brief(name)} is malformed")
            if not fits_memory(shape, 8):
                raise ValueError(
                    f"the row of tensor {brief(name)} is malformed: its shape cannot be"
                )
            if kind == "average" and dtype not in FLOATING:
                raise ValueError(f"tensor {brief(name)} of dtype {dtype} cannot be an average")
            entries[name] = TensorEntry(name, tuple(shape), dtype, kind == "average")
        aliases = value.get("aliases", {})
        if not isinstance(aliases, dict) or any(
            not isinstance(v, str) or v not in entries or k in entries for k, v in aliases.items()
        ):
            raise ValueError("its aliases do not name tensors of the table")
        table = TensorTable(entries, dict(aliases))
        table.check_names()
        return table

    def check_names(self) -> None:
        """Raise ValueError if a name means something else in a snapshot file."""
        for name in self.entries:
            scaled = name.removesuffix(SCALES)
            if name == "__metadata__" or (scaled != name and scaled in self.entries):
                raise ValueError(f"the tensor name {brief(name)} is taken: rename that tensor")


def _table(value: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    table = value.get(key)
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise ValueError(f"{key!r} is not a table")
    return table


@dataclass(frozen=True)
class SnapshotRecord:
    """One stored average, as the manifest lists it.

    Attributes:
        file: name of its file inside the store's folder.
        time: training time, exact, in the store's clock.
        profile: which average; `PointProfile` is the raw weights.
        dtype: codec of the averaged tensors, one of `codecs.FILE_CODECS`.
        file_bytes: size of the file.
        header_checksum: xxh3_64 of the file's header, which holds the checksums of the tensors.
        bases: (file, coefficient) of the averages whose sum is taken off before storing; empty if the
            average stands by itself.
        noise: mean square storage error of an averaged element; None if it was not measured (schema 1).
    """

    file: str
    time: int
    profile: StoredProfile
    dtype: str
    file_bytes: int
    header_checksum: str
    bases: tuple[tuple[str, float], ...] = ()
    noise: float | None = None

    @property
    def sigma_rel(self) -> float | None:
        """sigma_rel of the average; None for the raw weights and profiles that are not of the family."""
        return self.profile.sigma_rel if isinstance(self.profile, PowerProfile) else None

    def to_json(self) -> dict[str, Any]:
        """JSON form, as in the manifest."""
        return {
            "file": self.file,
            "time": self.time,
            "profile": profile_to_json(self.profile),
            "dtype": self.dtype,
            "bytes": self.file_bytes,
            "header_xxh3": self.header_checksum,
            **({"bases": [list(pair) for pair in self.bases]} if self.bases else {}),
            **({"noise": self.noise} if self.noise is not None else {}),
        }

    @staticmethod
    def from_json(value: Any) -> SnapshotRecord:
        """Inverse of `to_json`; raises ValueError with a reason for anything malformed."""
        if not isinstance(value, dict):
            raise ValueError("a snapshot row is not a table")
        file, time = value.get("file"), value.get("time")
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ValueError(
                f"the file name {brief(file)} is not one that a store uses (no folders, no other files)"
            )
        if type(time) is not int or not 0 < time < 2**63:
            raise ValueError(f"{file}: the time {brief(time)} is not a positive integer")
        dtype, size, digest = value.get("dtype"), value.get("bytes"), value.get("header_xxh3")
        if dtype not in FILE_CODECS:
            raise ValueError(
                f"{file}: the dtype {brief(dtype)} is not one that averages are stored in"
            )
        bases, noise = _pairs(value.get("bases", []), str), value.get("noise")
        if bases is None or is_delta(dtype) != bool(bases):
            raise ValueError(f"{file}: its bases do not fit its dtype {dtype}")
        if noise is not None and not (type(noise) in (int, float) and 0 <= noise < 2**1000):
            raise ValueError(f"{file}: its noise {brief(noise)} is not a variance")
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise ValueError(f"{file}: its size or checksum is malformed")
        profile = profile_from_json(value.get("profile"), time)
        return SnapshotRecord(
            file, time, profile, dtype, size, digest, bases, None if noise is None else float(noise)
        )


def _pairs(value: Any, kind: type) -> tuple[tuple[Any, float], ...] | None:
    """[[key, coefficient], ...] as pairs; None if it is malformed."""
    good = isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and type(pair[0]) is kind
        and type(pair[1]) in (int, float)
        and -MAX_COEFFICIENT <= pair[1] <= MAX_COEFFICIENT  # nan is not
        for pair in value
    )
    return tuple((key, float(x)) for key, x in value) if good else None


def kind_of(profile: StoredProfile) -> str:
    """The profile without its time: what averages of one run that are the same length share."""
    return json.dumps(profile_to_json(profile), sort_keys=True)


def place_of(time: int, profile: StoredProfile) -> tuple[int, float, str]:
    """Place in the order of a store: by time, then shorter averages first.

    So bases come before what stands on them. Raw weights and what is not of the power family come
    first; they stand on their own kind only.
    """
    if isinstance(profile, PowerProfile):
        return time, profile.sigma_rel, ""
    return time, 0.0, kind_of(profile)


def order_of(record: SnapshotRecord) -> tuple[int, float, str]:
    """Sorting key of the records of a store, see `place_of`."""
    return place_of(record.time, record.profile)


def profile_to_json(profile: StoredProfile) -> dict[str, Any]:
    """JSON form of a profile; its end is the snapshot's time and not repeated."""
    match profile:
        case PointProfile():
            return {"kind": "point"}
        case PowerProfile():
            return {"kind": "power", "sigma_rel": float(profile.sigma_rel)}
        case GammaProfile():
            return {"kind": "gamma", "gamma": float(profile.gamma)}
        case UniformProfile():
            return {"kind": "uniform", "length": float(profile.end - profile.start)}
        case ExponentialProfile():
            return {
                "kind": "exponential",
                "half_life": float(profile.half_life),
                "interval": float(profile.interval),
                "warmup": profile.warmup,
            }
        case TabulatedProfile():
            return {
                "kind": "tabulated",
                "times": [float(v) for v in profile.times],
                "tails": [float(v) for v in profile.tails],
            }


def profile_from_json(value: Any, time: int) -> StoredProfile:
    """Inverse of `profile_to_json`; raises ValueError with a reason for anything malformed."""
    kind = value.get("kind") if isinstance(value, dict) else None

    def number(key: str) -> float:
        found = value.get(key)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise ValueError(f"{key} {brief(found)} is not a number")
        return float(found)

    def numbers(key: str) -> tuple[float, ...]:
        found = value.get(key)
        if not isinstance(found, list) or not all(type(v) in (int, float) for v in found):
            raise ValueError(f"{key} is not a list of numbers")
        values = tuple(float(v) for v in found)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{key} holds an infinite number")
        return values

    try:
        match kind:
            case "point":
                return PointProfile(time)
            case "power":
                return PowerProfile(time, number("sigma_rel"))
            case "gamma":
                return GammaProfile(time, number("gamma"))
            case "uniform":
                return UniformProfile(time - number("length"), time)
            case "exponential":
                warmup = value.get("warmup")
                if not isinstance(warmup, bool):
                    raise ValueError(f"warmup {brief(warmup)} is not true or false")
                return ExponentialProfile(time, number("half_life"), number("interval"), warmup)
            case "tabulated":
                profile = TabulatedProfile(numbers("times"), numbers("tails"))
                if profile.t != time:
                    raise ValueError(f"a tabulated profile ends at {profile.t:g}, not at {time}")
                return profile
    except (InvalidProfileError, OverflowError) as error:
        raise ValueError(str(error)) from None
    raise ValueError(f"the profile {brief(value)} is not of a kind that this version knows")


def label_of(profile: StoredProfile) -> str:
    """Short name of a profile without its time, for file names and tables: "sigma_rel-0.05", "raw"."""
    value = profile_to_json(profile)  # float(): the repr of a NumPy scalar is no number
    match profile:
        case PointProfile():
            return "raw"
        case TabulatedProfile():
            return f"tabulated-{checksum(json.dumps(value).encode())}"
        case ExponentialProfile():
            warmup = "-warmup" if profile.warmup else ""
            return f"exponential-{value['half_life']!r}-{value['interval']!r}{warmup}"
    (number,) = (v for k, v in value.items() if k != "kind")
    name = {"power": "sigma_rel"}.get(value["kind"], value["kind"])
    return f"{name}-{number!r}"


def file_name(time: int, profile: StoredProfile, revision: int = 0) -> str:
    """Name of the file of an average: unique, because repr of a float is exact.

    Args:
        time: training time.
        profile: which average.
        revision: counts the files that have held this average: a listed file is never replaced.
    """
    suffix = f"-v{revision}" if revision else ""
    return f"{time:012d}-{label_of(profile)}{suffix}.safetensors"


def revision_of(record: SnapshotRecord) -> int | None:
    """Revision in the name of a record's file; None if name and record do not agree."""
    found = _REVISION.search(record.file)
    revision = int(found[1]) if found else 0
    return revision if record.file == file_name(record.time, record.profile, revision) else None


def unrevised(file: str) -> str:
    """The name of a file without its revision: which average it holds."""
    return _REVISION.sub("", file)


def is_snapshot_file_name(name: str) -> bool:
    """Whether a store could have written a file of this name."""
    return _FILE_NAME.fullmatch(name) is not None


def described_bases(own: Mapping[str, Any]) -> tuple[tuple[int, StoredProfile, float], ...]:
    """Bases of an average, as its file describes them; raises ValueError if they are malformed."""
    found = own.get("bases", [])
    if not isinstance(found, list):
        raise ValueError("its bases are malformed")
    bases = []
    for row in found:
        good = (
            isinstance(row, list) and len(row) == 3 and type(row[0]) is int and 0 < row[0] < 2**63
        )
        pairs = _pairs([["", row[2]]], str) if good else None
        if pairs is None:
            raise ValueError("its bases are malformed")
        bases.append((row[0], profile_from_json(row[1], row[0]), pairs[0][1]))
    return tuple(bases)


def noise_text(noise: float) -> str:
    """A variance as text of constant length, so that it can be filled in when a file is complete."""
    return f"{min(max(noise, 1e-99), 9e99) if noise else 0.0:.8e}"


@dataclass(frozen=True)
class SnapshotMetadata:
    """What a snapshot file says about itself, under one key of its safetensors metadata.

    Attributes:
        run_id: id of the training run.
        clock: unit of `time`, "steps" or "images".
        time: training time, exact.
        profile: which average.
        dtype: how averaged tensors are stored.
        table: the model's tensors.
        widened: averaged tensors kept in float32 because they would overflow `dtype`.
        checksums: tensor name -> xxh3_64 of its stored bytes, 16 hex digits.
        user: the run's own string map.
        bases: (time, profile, coefficient) of the averages whose sum is taken off before storing.
        noise: mean square storage error of an averaged element.
    """

    run_id: str
    clock: str
    time: int
    profile: StoredProfile
    dtype: str
    table: TensorTable
    widened: tuple[str, ...]
    checksums: dict[str, str]
    user: dict[str, str]
    bases: tuple[tuple[int, StoredProfile, float], ...] = ()
    noise: float = 0.0

    def stored_dtype(self, entry: TensorEntry) -> str:
        """Name of the dtype in which the file holds `entry`."""
        if not entry.averaged:
            return entry.dtype
        return "float32" if entry.name in self.widened else element_dtype(self.dtype)

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, stored dtype, shape) of every tensor of the file, scales included."""
        return [row for e in self.table.entries.values() for row in self._rows(e)]

    def _bases(self) -> list[list[Any]]:
        return [[time, profile_to_json(profile), x] for time, profile, x in self.bases]

    def _rows(self, entry: TensorEntry) -> list[tuple[str, str, tuple[int, ...]]]:
        dtype = self.stored_dtype(entry)
        rows = [(entry.name, dtype, entry.shape)]
        if entry.averaged and dtype == "int8":
            blocks = -(-math.prod(entry.shape) // BLOCK)
            rows.append((entry.name + SCALES, "bfloat16", (blocks,)))
        return rows

    def to_metadata(self) -> dict[str, str]:
        """Metadata of the safetensors file; its length does not depend on checksums and noise."""
        value = {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "clock": self.clock,
            "time": self.time,
            "profile": profile_to_json(self.profile),
            "dtype": self.dtype,
            **({"bases": self._bases()} if self.bases else {}),
            "noise": noise_text(self.noise),
            "widened": list(self.widened),
            "copied": [e.name for e in self.table.entries.values() if not e.averaged],
            "model_dtypes": {e.name: e.dtype for e in self.table.entries.values() if e.averaged},
            "aliases": self.table.aliases,
            "xxh3": "".join(self.checksums[name] for name, _, _ in data_order(self.layout())),
        }
        return {METADATA_KEY: json.dumps(value, separators=(",", ":")), **self.user}
