"""A synthesis divided over processes: each writes its shards, the last one the index."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from posthoc_ema import (
    NewAverage,
    PowerProfile,
    SnapshotStore,
    TensorEntry,
    TensorTable,
    synthesize,
)

PHEMA = [sys.executable, "-m", "phema"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "s"
    table = TensorTable(
        {f"w{i}": TensorEntry(f"w{i}", (100, 10), "float32", True) for i in range(7)}, {}
    )
    rng = np.random.default_rng(0)
    with SnapshotStore.create(folder, clock="steps", table=table) as store:
        for time in (10, 20, 30):
            for sigma_rel in (0.04, 0.15):
                values = {n: rng.normal(size=(100, 10)).astype("f4") for n in table.entries}
                profile = PowerProfile(time, sigma_rel)
                store.add(time, [NewAverage(profile, "float32", values.__getitem__)])
    return folder


def phema(*arguments, **environment):
    return subprocess.run(
        [*PHEMA, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def load(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {
        name: load_file(folder / file)[name] for name, file in index["weight_map"].items()
    }, set(index["weight_map"].values())


def test_parts_together_are_the_whole(folder, tmp_path):
    common = ["synth", folder, "--sigma-rel", "0.1", "--shard-size", "8kB", "--dtype", "float32"]
    whole = phema(*common, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for i in (2, 3, 1):
        run = phema(*common, "--out", tmp_path / "parts", "--part", f"{i}/3")
        assert run.returncode == 0, run.stderr
        done = (tmp_path / "parts" / "model.safetensors.index.json").exists()
        assert done == (i == 1)
        assert ("still to come" in run.stderr) == (not done)
    tensors, files = load(tmp_path / "parts")
    expected, _ = load(tmp_path / "whole")
    assert len(files) == 4
    direct = synthesize(folder, 0.1)
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values)
        np.testing.assert_allclose(values, direct[name], atol=1e-6)


def test_all_parts_at_once_with_the_variables_of_torchrun(folder, tmp_path):
    common = [*PHEMA, "synth", folder, "--sigma-rel", "0.1", "--shard-size", "8kB"]
    common += ["--out", tmp_path / "out", "--part", "torchrun"]
    runs = [
        subprocess.Popen(
            list(map(str, common)), env={**os.environ, "RANK": str(i), "WORLD_SIZE": "3"}
        )
        for i in range(3)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert len(load(tmp_path / "out")[1]) == 4
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".tmp-")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "0/3"], "I from 1 to N"),
        (["--part", "4/3"], "I from 1 to N"),
        (["--part", "x"], "I from 1 to N"),
        (["--part", "torchrun"], "torchrun --no-python"),
        (["--part", "1/2", "--overwrite"], "remove the old output"),
    ],
    ids=["zero", "beyond", "text", "no torchrun", "overwrite"],
)
def test_bad_parts_are_refused(folder, tmp_path, options, message):
    arguments = ["synth", folder, "--sigma-rel", "0.1", "--shard-size", "8kB"]
    run = phema(*arguments, "--out", tmp_path / "out", *options)
    assert run.returncode == 1
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


def test_one_file_cannot_be_divided(folder, tmp_path):
    run = phema("synth", folder, "--sigma-rel", "0.1", "--out", tmp_path / "o", "--part", "1/2")
    assert run.returncode == 1
    assert "--shard-size" in run.stderr
