"""The promise, end to end: a synthesized average is the one that direct tracking would have given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_ema import SnapshotStore, plan_synthesis, synthesize, synthesize_to_files
from posthoc_ema.torch import Tracker, track

TARGET = 0.075
STEPS = 768


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 32),
        nn.BatchNorm1d(32),
        nn.SiLU(),
        nn.Linear(32, 32),
        nn.SiLU(),
        nn.Linear(32, 1),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real training run: 32 snapshots in each dtype, and other averages that are tracked directly."""
    folder, model = tmp_path_factory.mktemp("run"), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trackers = [
        track(optimizer, model, folder / dtype, every=STEPS // 32, dtype=dtype, on_error="raise")
        for dtype in ("float32", "float16", "bfloat16")
    ]
    direct = Tracker(
        model, folder / "direct", sigma_rels=(TARGET, 0.03, 0.2), every=None, on_error="raise"
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(64, 4, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.prod(dim=1, keepdim=True).tanh()).backward()
        optimizer.step()
        direct.step()
    for tracker in (*trackers, direct):
        tracker.close()
    return folder, model, direct


def relative_error(result, expected):
    difference = sum(float(((result[n] - e.numpy()) ** 2).sum()) for n, e in expected.items())
    return np.sqrt(difference / sum(float((e**2).sum()) for e in expected.values()))


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)]
)
def test_synthesized_average_is_the_directly_tracked_one(run, dtype, limit):
    """Must-show 2 at small scale, with 32 snapshots."""
    folder, model, direct = run
    assert len(SnapshotStore.open(folder / dtype).times) == 32
    average = direct.averages(TARGET)
    assert relative_error(synthesize(folder / dtype, TARGET), average) < limit
    # The raw weights are far away: the test could fail.
    raw = {name: value.numpy() for name, value in model.state_dict().items()}
    assert relative_error(raw, average) > 3 * min(limit, 5e-3)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.2])
def test_synthesis_reaches_beyond_the_tracked_lengths(run, sigma_rel):
    folder, _, direct = run
    assert (
        relative_error(synthesize(folder / "float32", sigma_rel), direct.averages(sigma_rel)) < 1e-3
    )


def test_synthesized_files_load_strictly_into_the_model(run, tmp_path):
    """BatchNorm statistics are those of the live model, and evaluation with them is finite."""
    folder, model, _ = run
    store = SnapshotStore.open(folder / "float16")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    synthesize_to_files(store, plan_synthesis(store, [0.02, 0.1, 0.25]), paths)
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(2))
    for path in paths:
        fresh = network()
        fresh.load_state_dict(load_file(path), strict=True)
        assert torch.equal(fresh[1].running_var, model[1].running_var)
        assert fresh[1].num_batches_tracked.item() == STEPS
        assert fresh.eval()(x).isfinite().all()
