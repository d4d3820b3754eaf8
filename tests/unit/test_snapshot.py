from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import PointProfile, PowerProfile, SnapshotRecord, TensorTable
from posthoc_ema.classical_profiles import ExponentialProfile, TabulatedProfile, UniformProfile
from posthoc_ema.profiles import GammaProfile
from posthoc_ema.snapshot import (
    SnapshotMetadata,
    file_name,
    is_snapshot_file_name,
    profile_from_json,
    profile_to_json,
    revision_of,
)

from .stores import TABLE

PROFILES = [
    PowerProfile(7, 0.1),
    PowerProfile(7, 1e-5),
    PowerProfile(7, 0.1 + 2e-17),
    PointProfile(7),
    GammaProfile(7, -0.82),
    UniformProfile(4, 7),
    ExponentialProfile(7, 1e20),
    ExponentialProfile(7, 3.0, 2.0, warmup=True),
    TabulatedProfile((0.0, 3.0, 7.0), (1.0, 0.25, 0.0)),
]
NAMES = [
    "tenth",
    "short",
    "digits",
    "raw",
    "gamma",
    "uniform",
    "exponential",
    "warmup",
    "tabulated",
]


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_profile_survives_json_and_has_a_file_name(profile):
    assert profile_from_json(profile_to_json(profile), 7) == profile
    assert is_snapshot_file_name(file_name(7, profile))
    assert is_snapshot_file_name(file_name(7, profile, revision=3))
    record = SnapshotRecord(file_name(7, profile, 3), 7, profile, "float16", 9, "ab")
    assert revision_of(record) == 3
    assert len({file_name(7, p) for p in PROFILES}) == len(PROFILES)


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "gamma", "gamma": -1},
        {"kind": "gamma"},
        {"kind": "uniform", "length": 9},
        {"kind": "uniform", "length": "x"},
        {"kind": "exponential", "half_life": 0, "interval": 1, "warmup": False},
        {"kind": "exponential", "half_life": 1, "interval": 1, "warmup": 1},
        {"kind": "tabulated", "times": [0, 3], "tails": [1, 0]},
        {"kind": "tabulated", "times": [0, 7], "tails": [1, None]},
        {"kind": "tabulated", "times": 7, "tails": [1, 0]},
        {"kind": "tabulated", "times": [7, 0], "tails": [1, 0]},
        {"kind": "linear"},
        None,
    ],
    ids=str,
)
def test_bad_profiles_are_refused(value):
    with pytest.raises(ValueError, match=r"."):
        profile_from_json(value, 7)


def test_file_names_are_unique_sortable_and_free_of_numpy():
    assert (
        file_name(5, PowerProfile(5, np.float64(0.1))) == "000000000005-sigma_rel-0.1.safetensors"
    )
    assert file_name(5, PowerProfile(5, 0.0504)) != file_name(5, PowerProfile(5, 0.0496))
    assert file_name(99, PointProfile(99)) < file_name(100, PointProfile(100))
    assert is_snapshot_file_name(file_name(10**15, PointProfile(1)))


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "raw.safetensors", "../000000000005-raw.safetensors", "x.safetensors", ""],
)
def test_other_files_are_not_taken_for_snapshots(name):
    assert not is_snapshot_file_name(name)


def test_record_survives_json():
    record = SnapshotRecord(file_name(7, PROFILES[0]), 7, PROFILES[0], "float16", 99, "ab")
    assert SnapshotRecord.from_json(record.to_json()) == record
    assert record.sigma_rel == 0.1


def test_tensor_table_survives_json():
    again = TensorTable.from_json(TABLE.to_json())
    assert again == TABLE
    assert list(again.entries) == list(TABLE.entries)


def test_length_of_the_metadata_does_not_depend_on_the_checksums():
    def metadata(digit):
        sums = dict.fromkeys(TABLE.entries, digit * 16)
        return SnapshotMetadata("r", "steps", 7, PROFILES[0], "float16", TABLE, (), sums, {})

    a, b = (metadata(d).to_metadata()["posthoc_ema"] for d in "0f")
    assert len(a) == len(b)
    assert a != b


def test_widened_tensors_are_laid_out_in_float32():
    sums = dict.fromkeys(TABLE.entries, "0" * 16)
    metadata = SnapshotMetadata("r", "steps", 7, PROFILES[0], "float16", TABLE, ("gain",), sums, {})
    dtypes = {name: dtype for name, dtype, _ in metadata.layout()}
    assert (dtypes["gain"], dtypes["conv.weight"], dtypes["steps"]) == (
        "float32",
        "float16",
        "int64",
    )
