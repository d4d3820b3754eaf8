"""`phema track` with scripts that put their weights or their training back: real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import posthoc_ema as pe

from .conftest import environment

BEGINNING = """
import copy, os, signal, sys
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
history = []

def step():
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    history.append({name: p.detach().clone() for name, p in net.named_parameters()})
"""
BEST = """
for i in range(35):
    step()
    if i == 20:
        best = copy.deepcopy(net.state_dict())
for parameter, value in zip(net.parameters(), best.values()):
    parameter.data.copy_(value * 5)
torch.save(history, "history.pt")
"""
SEARCH = """
before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
for i in range(25):
    optimizer.param_groups[0]["lr"] = 1e-6 * 10 ** (i / 4)
    step()
net.load_state_dict(before[0])
optimizer.load_state_dict(before[1])
history.clear()
for _ in range(35):
    step()
torch.save(history, "history.pt")
"""
EXPLODED = """
while len(history) < 35:
    if len(history) == 13:
        checkpoint = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    step()
    if len(history) == 28 and "gone_back" not in globals():
        gone_back = True
        net.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        del history[13:]
torch.save(history, "history.pt")
"""
WEIGHTS_ALONE = """
done = 0
if os.path.exists("weights.pt"):
    net.load_state_dict(torch.load("weights.pt"))
    done = 12
for i in range(done, 35):
    step()
    if i == 11:
        torch.save(net.state_dict(), "weights.pt")
    if i == 22 and not done:
        os.kill(os.getpid(), signal.SIGKILL)
"""
LIGHTNING = """
import torch, lightning.pytorch as pl
from lightning.pytorch.tuner import Tuner

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.lr = torch.nn.Linear(8, 1), 1e-2
        self.history = []
    def training_step(self, batch, i):
        return (self.net(batch) - 1).square().mean()
    def on_train_batch_end(self, *args):
        self.history.append({n: p.detach().clone() for n, p in self.named_parameters()})
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)

torch.manual_seed(0)
data = torch.utils.data.DataLoader(torch.randn(560, 8), batch_size=16)
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
model = Model()
Tuner(trainer).lr_find(model, data, num_training=25)
model.history.clear()
trainer.fit(model, data)
torch.save(model.history, "history.pt")
"""


@pytest.fixture
def tracked(tmp_path):
    """Runs a script under `phema track`; gives the lines of its stderr that are ours."""

    def run(script, *options):
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, "-m", "phema", "track", "--every", "10", "--dtype", "float32"]
        command += ["--sigma-rel", "0.05,0.1", "--report", "report.json", *options, "--"]
        done = subprocess.run(
            [*command, sys.executable, "script.py"],
            cwd=tmp_path,
            env=environment(PYTHONWARNINGS="default"),
            capture_output=True,
            text=True,
            timeout=200,
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("phema track: ")]
        assert lines, done
        return lines

    return run


def check(folder, time):
    """The averages that are stored last are those of the weights that the script wrote down."""
    history = torch.load(folder / "history.pt", weights_only=True)
    store = pe.SnapshotStore.open(folder / "snapshots")
    assert store.times[-1] == len(history) == time
    for sigma_rel in (0.05, 0.1):
        for name, values in pe.synthesize(store, sigma_rel).items():
            series = np.stack([weights[name].double().numpy() for weights in history])
            gamma = float(pe.gamma_from_sigma_rel(sigma_rel))
            expected = pe.power_average(series, range(1, time + 1), gamma)
            np.testing.assert_allclose(values, expected, atol=3e-6, err_msg=name)


def test_the_best_weights_loaded_at_the_end_cost_the_raw_weights_alone(tracked, tmp_path):
    (line,) = tracked(BEGINNING + BEST)
    check(tmp_path, 35)
    reason = "the last snapshot has no raw weights, because the weights were changed after step 35"
    assert "35 steps, 4 snapshots" in line
    assert reason in line
    (report,) = json.loads((tmp_path / "report.json").read_text())["tracked"]
    assert report["remark"] == reason


@pytest.mark.parametrize("script", [BEGINNING + SEARCH, LIGHTNING], ids=["loop", "lightning"])
def test_a_search_for_a_learning_rate_leaves_no_trace(tracked, tmp_path, script):
    if script is LIGHTNING:
        pytest.importorskip("lightning")
    first, last = tracked(script)
    check(tmp_path, 35)
    assert "at step 25 the script put its training back: tracking starts again at the" in first
    assert "35 steps, 4 snapshots" in last


def test_going_back_after_a_loss_exploded_takes_the_averages_along(tracked, tmp_path):
    first, last = tracked(BEGINNING + EXPLODED)
    check(tmp_path, 35)
    assert "at step 28 the script put its training back: tracking continues from step 13" in first
    assert "35 steps, 4 snapshots" in last


def test_weights_without_their_optimizer_are_named_as_what_is_missing(tracked, tmp_path):
    assert "the process was ended by force" in tracked(BEGINNING + WEIGHTS_ALONE)[-1]
    for options in ((), ("--resume", "nearest")):
        said = tracked(BEGINNING + WEIGHTS_ALONE, *options)[-1]
        assert "the optimizer is new (no steps made), and the weights belong to no saved" in said
        assert "save that as well: optimizer.state_dict()" in said
    assert pe.SnapshotStore.open(tmp_path / "snapshots").times[-1] <= 20, "nothing is lost"
