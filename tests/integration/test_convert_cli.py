"""`phema convert` as a user has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

CORPUS = Path(__file__).parents[1] / "corpus"
THEIRS = CORPUS / "pytorch_posthoc_ema"
TOLD = ("--sigma-rel", "0.10,0.25", "--update-every", 1)


@pytest.fixture
def edm2(tmp_path):
    """A folder of network snapshots, as a state of plain modules."""
    folder = tmp_path / "edm2"
    folder.mkdir()
    import pickle  # noqa: TID251  # writes what convert reads

    for time in (50_000, 100_000):
        network = torch.nn.Linear(3, 2).half()
        path = folder / f"network-snapshot-{time // 1000:07d}-0.050.pkl"
        path.write_bytes(pickle.dumps({"ema": network}))
    return folder


def test_convert_then_synthesize(phema):
    done = phema("convert", THEIRS, "--out", "store", *TOLD)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert "after 24 steps" in done.err
    assert "posthoc-ema     10  sigma_rel 0.1, sigma_rel 0.25  56 to 376  steps" in done.out
    assert "all good" in phema("verify", "store").succeeded()
    phema("synth", "--sigma-rel", "0.15", "--out", "out.safetensors", "store")
    shares = load_file("out.safetensors")["w"]
    assert np.sum(shares) == pytest.approx(1, abs=1e-4)


def test_convert_json(phema):
    done = phema("convert", THEIRS, "--out", "store", *TOLD, "--dtype", "float16", "--json")
    found = json.loads(done.out)
    assert found["from"] == "posthoc-ema"
    assert found["times"] == [56, 136, 216, 296, 376]
    assert found["profiles"] == ["sigma_rel-0.1", "sigma_rel-0.25"]
    assert "after 24 steps" in found["notes"][0]


def test_convert_edm2_with_exact_times(phema, edm2):
    phema("convert", edm2, "--out", "a", "--batch-size", 2000)
    listed = json.loads(phema("ls", "--json", "a").out)
    assert "100000" in json.dumps(listed)
    done = phema("convert", edm2, "--out", "c")
    assert "taken as multiples of 1024 images" in done.err
    assert "50176 to 100352" in done.out
    phema("convert", edm2, "--out", "d", "--batch-size", 1999).refused(
        "no multiple of 1999", "--time"
    )
    done = phema("convert", edm2, "--out", "b", "--time", "50300,100300", "--sigma-rel", "0.0501")
    assert (done.code, done.err) == (0, "")
    assert "sigma_rel 0.0501  50300 to 100300  images" in done.out


def test_convert_a_store_to_another_dtype(phema):
    phema("convert", THEIRS, "--out", "store", *TOLD)
    assert (
        "store     10" in phema("convert", "store", "--out", "b", "--dtype", "float16").succeeded()
    )
    phema("convert", "store", "--out", "c").refused("--dtype says how")
    phema("convert", "store", "--out", "c", "--dtype", "float16", *TOLD).refused("no other option")
    phema("convert", "store", "--out", "b", "--dtype", "float16").refused("b exists")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ((), ("Give --sigma-rel",)),
        (("--sigma-rel", "0.1,0.25"), ("Give --update-every",)),
        ((*TOLD, "--batch-size", 4), ("are for EDM2",)),
        ((*TOLD, "--from", "keras"), ("keras", "can be imported from")),
        ((*TOLD, "--dtype", "int4"), ("dtype", "int4")),
        ((*TOLD, "--time", "1,x"), ("'x' is not a whole number",)),
        ((*TOLD, "--time", "1,...,9"), ("a range needs two numbers",)),
        ((*TOLD, "--time", "5,1,...,9"), ("a range must rise",)),
        ((*TOLD, "--time", "0,1,...,99999999999"), ("larger steps",)),
        (("--sigma-rel", "0.1,0.5", "--update-every", 1), ("sigma_rel must lie in",)),
    ],
    ids=[
        "lengths", "interval", "batch", "tool", "dtype", "time", "range", "falling", "large", "length",
    ],
)  # fmt: skip
def test_convert_refuses_in_one_line_and_leaves_nothing(options, fragments, phema, tmp_path):
    phema("convert", THEIRS, "--out", "store", *options).refused(*fragments)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_convert_names_the_damaged_file(phema, tmp_path):
    shutil.copytree(THEIRS, tmp_path / "theirs")
    path = tmp_path / "theirs" / "1.240.pt"
    path.write_bytes(path.read_bytes()[:1000])
    phema("convert", "theirs", "--out", "store", *TOLD).refused("1.240.pt", "cannot be read")
    assert not (tmp_path / "store").exists()
    phema("convert", "missing", "--out", "store").refused("missing does not exist")


def test_convert_executes_nothing(phema, tmp_path):
    """Hostile pickles under the names of snapshots: refused or inert, and never run."""
    for path in sorted((CORPUS / "pickles").glob("hostile-*")):
        data = path.read_bytes().replace(b"/tmp/canary", b"./canary.xy")
        snapshot = tmp_path / "network-snapshot-0008388-0.050.pkl"
        snapshot.write_bytes(data)
        phema("convert", snapshot, "--out", "store").refused(snapshot.name)
    assert [p.name for p in tmp_path.iterdir()] == [snapshot.name]


def test_convert_says_what_is_wrong_with_a_file_limit(process, tmp_path):
    """A full disk: one line, and what is done so far is gone on with."""
    done = process("convert", THEIRS, "--out", "store", *TOLD, file_limit=1500)
    assert done.code == 1
    assert "could not be written" in done.err.splitlines()[-1]
    assert not (tmp_path / "store").exists()
    assert process("convert", THEIRS, "--out", "store", *TOLD).code == 0
    assert not (tmp_path / "store.partial").exists()
