"""Sharded training under `phema track` and under torchrun, as users start it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, synthesize
from posthoc_ema.torch import track

from .conftest import environment

BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md"
SCRIPT = """
import atexit, os, sys
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))

def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

if __name__ == "__main__":
    dist.init_process_group("gloo")
    model = build()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = 0
    if os.path.exists("checkpoint"):
        found, state = get_state_dict(model, optimizer)
        value = {"model": found, "optimizer": state, "step": 0}
        dcp.load(value, checkpoint_id="checkpoint")
        set_state_dict(
            model, optimizer, model_state_dict=value["model"], optim_state_dict=value["optimizer"]
        )
        first = value["step"]
    train(model, optimizer, first, int(sys.argv[1]))
    found, state = get_state_dict(model, optimizer)
    value = {"model": found, "optimizer": state, "step": int(sys.argv[1])}
    dcp.save(value, checkpoint_id="checkpoint")
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # what the end of Python does; but a thread of gloo that ends late
    os._exit(0)  # would abort it then, with or without a tracker
"""


def torchrun(ranks, folder, *command, prefix=()):
    start = [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*map(str, (*prefix, *start, *command))],
        cwd=folder,
        env=environment(PYTHONWARNINGS="ignore"),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Thirteen steps on two ranks, and the next twelve on one."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.py").write_text(SCRIPT)
    prefix = (BIN / "phema", "track", "--out", "snapshots", "--every", "5", "--")
    done = []
    for ranks, steps in ((2, 13), (1, 25)):
        done.append(torchrun(ranks, folder, "train.py", steps, prefix=prefix))
        assert done[-1].returncode == 0, done[-1].stderr
    return folder, done


def test_phema_track_resumes_sharded_training_on_another_number_of_ranks(run, tmp_path):
    """The averages are those of one undisturbed process, though optimizers were stepped to load into."""
    folder, (first, second) = run
    assert "13 steps, 2 snapshots" in first.stderr, first.stderr
    assert "25 steps, continued at 13" in second.stderr, second.stderr
    store = SnapshotStore.open(folder / "snapshots")
    assert store.times == [5, 10, 15, 20, 25]
    assert list(store.verify()) == []
    names = {"__name__": "script"}
    exec(SCRIPT, names)
    model = names["build"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with track(optimizer, model, tmp_path / "one", every=5, on_error="raise"):
        names["train"](model, optimizer, 0, 25)
    expected = synthesize(tmp_path / "one", 0.1)
    for name, values in synthesize(store, 0.1).items():
        np.testing.assert_array_equal(values, expected[name])


def test_the_how_to_runs_under_torchrun(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = torchrun(2, tmp_path, "page.py")
    assert done.returncode == 0, done.stderr
    assert SnapshotStore.open(tmp_path / "snapshots").times == [20, 40, 60, 80, 100]
    assert SnapshotStore.open(tmp_path / "snapshots-of-replicas").times == [20]
