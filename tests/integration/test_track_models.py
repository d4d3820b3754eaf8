"""Which models `phema track` tracks where a script trains several, at once or one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from posthoc_ema import SnapshotStore

from .conftest import environment

HEAD = """
import gc, itertools, os, weakref
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self, inputs=6, outputs=6):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.layer(x).tanh()

class Encoder(Net):
    pass

class Decoder(Net):
    pass

def step(optimizer, model):
    x = torch.randn(8, 6)
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()

def train(model, steps=20):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        step(optimizer, model)
    return weakref.ref(optimizer)
"""
CHAIN = """
encoder, decoder = Encoder(), Decoder()
optimizer = torch.optim.Adam(itertools.chain(encoder.parameters(), decoder.parameters()), 1e-2)
for _ in range(20):
    step(optimizer, lambda x: decoder(encoder(x)))
"""
TWO_OF_A_KIND = """
first, second = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6), nn.ReLU())
optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (first, second)]
for i in range(20):
    step(optimizers[0], first)
    step(optimizers[1], second)
"""
FOLDS = """
seen = []
for fold in range(3):
    model = Net()
    seen.append((weakref.ref(model), train(model)))
    del model
print([(m() is None, o() is None) for m, o in seen])
"""


class Ran:
    """A script of which `phema track` has seen the end."""

    def __init__(self, folder, text, *options, out="snapshots", **more):
        (folder / "train.py").write_text(HEAD + textwrap.dedent(text), "utf-8")
        told = ["--every", "10", "--out", out, "--report", "report.json", *options]
        done = subprocess.run(
            [sys.executable, "-m", "phema", "track", *told, "--", sys.executable, "train.py"],
            cwd=folder,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.out = done.stdout
        assert "Traceback" not in done.stderr
        self.lines = [line.removeprefix("phema track: ") for line in done.stderr.splitlines()]
        self.report = json.loads((folder / "report.json").read_text("utf-8"))

    @property
    def steps(self):
        return {r["model"]: r["steps"] for r in self.report["tracked"]}


def times(folder):
    return SnapshotStore.open(folder).times


def test_an_optimizer_over_two_modules_tracks_the_first_and_names_the_other(tmp_path):
    ran = Ran(tmp_path, CHAIN)
    assert ran.steps == {"Encoder": 20}
    assert ran.lines[0].startswith("tracking Encoder; Decoder is trained too and not tracked")


def test_an_optimizer_over_two_modules_tracks_the_chosen_one(tmp_path):
    ran = Ran(tmp_path, CHAIN, "--model", "Dec")
    assert ran.steps == {"Decoder": 20}
    assert len(ran.lines) == 1


def test_an_optimizer_over_two_modules_tracks_each(tmp_path):
    ran = Ran(tmp_path, CHAIN, out="snapshots/{model}")
    assert ran.steps == {"Encoder": 20, "Decoder": 20}
    for name in ("Encoder", "Decoder"):
        assert times(tmp_path / "snapshots" / name) == [10, 20]


def test_two_models_of_one_class_have_numbered_names_and_folders(tmp_path):
    ran = Ran(tmp_path, TWO_OF_A_KIND, out="snapshots/{model}")
    assert ran.steps == {"Sequential": 20, "Sequential-2": 20}
    for name in ("Sequential", "Sequential-2"):
        assert times(tmp_path / "snapshots" / name) == [10, 20]


def test_an_error_of_one_model_leaves_the_other_tracked_to_its_end(tmp_path):
    """What is in the folder of the second one is damaged."""
    (tmp_path / "snapshots/Sequential-2").mkdir(parents=True)
    (tmp_path / "snapshots/Sequential-2/manifest.json").write_text("{", "utf-8")
    text = TWO_OF_A_KIND.replace("range(20)", "range(25)")
    ran = Ran(tmp_path, text, out="snapshots/{model}")
    assert ran.steps == {"Sequential": 25}
    assert times(tmp_path / "snapshots/Sequential") == [10, 20, 25]
    (problem,) = ran.report["problems"]
    assert problem.startswith("Sequential-2: ")
    assert problem in ran.lines[-1]
    assert ran.lines[-1].startswith("25 steps, 3 snapshots in ./snapshots/Sequential (")


def test_models_one_after_the_other_give_their_memory_back(tmp_path):
    ran = Ran(tmp_path, FOLDS)
    assert ran.out.splitlines()[-1] == "[(True, True), (True, True), (True, True)]"
    assert ran.steps == {"Net": 20}
    assert times(tmp_path / "snapshots") == [10, 20]
    assert len(ran.lines) == 2
    assert ran.lines[0].startswith("tracking Net; a second Net is trained too and not tracked")


def test_models_one_after_the_other_are_tracked_each(tmp_path):
    text = FOLDS.replace("train(model)", "train(model, 15)")
    ran = Ran(tmp_path, text, out="snapshots/{model}")
    assert ran.steps == {"Net": 15, "Net-2": 15, "Net-3": 15}
    assert ran.out.splitlines()[-1] == "[(True, True), (True, True), (False, True)]"
    for name in ran.steps:
        assert times(tmp_path / "snapshots" / name) == [10, 15]


def test_a_new_optimizer_of_the_same_model_goes_on(tmp_path):
    ran = Ran(tmp_path, "model = Net()\ntrain(model)\ngc.collect()\ntrain(model, 15)\n")
    assert ran.steps == {"Net": 35}
    assert len(ran.lines) == 1


@pytest.mark.parametrize("ranks", ["", "1", "2"])
def test_a_rank_is_a_replica_only_where_there_are_several(tmp_path, ranks):
    ran = Ran(tmp_path, "train(Net())", RANK="1", WORLD_SIZE=ranks)
    if ranks == "2":
        assert ran.steps == {}
        assert ran.lines[0].startswith("nothing was tracked here: rank 1 of 2: rank 0 tracks.")
    else:
        assert ran.steps == {"Net": 20}
