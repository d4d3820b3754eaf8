"""Folders that the real packages wrote become stores that give the true averages of the training."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema import PowerProfile, SnapshotStore, gamma_from_sigma_rel, synthesize
from posthoc_ema.importers import ImportOptions, plan_import, write_import

CORPUS = Path(__file__).parents[1] / "corpus" / "pytorch_posthoc_ema"
STEPS, EVERY = 1000, 50


@functools.cache
def tracker_of(package):
    if package == "ema-pytorch":
        from ema_pytorch import PostHocEMA
    else:
        from nitrous_ema import PostHocEMA
    return PostHocEMA


def train(package, folder, sigma_rels, update_every, **options):
    """A small real training run with the package's tracker; returns the weights after every step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )
    tracker = tracker_of(package)(
        model,
        sigma_rels=sigma_rels,
        update_every=update_every,
        checkpoint_every_num_steps=EVERY,
        checkpoint_folder=str(folder),
        **{"checkpoint_dtype": torch.float32, **options},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trajectory = []
    for _ in range(STEPS):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()
        tracker.update()
        trajectory.append(
            {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
        )
    return trajectory, model


def direct(trajectory, sigma_rel):
    """The average itself: step k counts (k^(g+1) - (k-1)^(g+1)) / t^(g+1)."""
    t = len(trajectory)
    shares = np.diff((np.arange(t + 1) / t) ** (float(gamma_from_sigma_rel(sigma_rel)) + 1))
    return {
        n: sum(s * w[n] for s, w in zip(shares, trajectory, strict=True)) for n in trajectory[0]
    }


def error(found, wanted):
    squares = [(np.sum((found[n] - w) ** 2), np.sum(w**2)) for n, w in wanted.items()]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


@pytest.mark.parametrize("package", ["ema-pytorch", "nitrous"])
def test_updates_at_every_step_give_the_true_average(package, tmp_path):
    trajectory, model = train(package, tmp_path / "theirs", (0.05, 0.10), 1)
    plan = plan_import(tmp_path / "theirs", options=ImportOptions((0.05, 0.10), update_every=1))
    store, noticed = write_import(plan, tmp_path / "ours")
    assert (plan.kind, noticed, list(store.verify())) == (package, [], [])
    assert store.times == list(range(EVERY, STEPS + 1, EVERY))
    for sigma_rel in (0.04, 0.07, 0.13, 0.20):
        found = synthesize(store, sigma_rel=sigma_rel)
        assert set(found) == set(model.state_dict())
        # the raw weights are 2 to 20 percent away
        assert error(found, direct(trajectory, sigma_rel)) < 5e-3 * error(
            trajectory[-1], direct(trajectory, sigma_rel)
        ), sigma_rel
        model.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})


@pytest.mark.parametrize(
    ("package", "told", "options"),
    [
        ("ema-pytorch", 10, {}),
        ("nitrous", 10, {}),
        ("nitrous", 1, {"step_size_correction": True}),
    ],
)
def test_updates_at_every_tenth_step_are_understood(package, told, options, tmp_path):
    """gamma_eff = (gamma+1)/10 - 1: what the package tracked, 0.02 and 0.05 becoming longer."""
    trajectory, _ = train(package, tmp_path / "theirs", (0.02, 0.05), 10, **options)
    store, _ = write_import(
        plan_import(tmp_path / "theirs", options=ImportOptions((0.02, 0.05), told)),
        tmp_path / "ours",
    )
    naive, _ = write_import(
        plan_import(tmp_path / "theirs", options=ImportOptions((0.02, 0.05), 1)), tmp_path / "naive"
    )
    for sigma_rel in (0.13, 0.20):
        wanted = direct(trajectory, sigma_rel)
        # the last update lies 9 steps before the end: one percent of the training
        raw = error(trajectory[-1], wanted)
        assert error(synthesize(store, sigma_rel=sigma_rel), wanted) < 0.1 * raw
        if told == 10:
            assert error(synthesize(naive, sigma_rel=sigma_rel), wanted) > 0.5 * raw


def test_negative_exponents_are_stored_and_used(tmp_path):
    """0.10 at every tenth step is gamma = -0.21, which no sigma_rel names."""
    trajectory, _ = train("ema-pytorch", tmp_path / "theirs", (0.05, 0.10), 10)
    plan = plan_import(tmp_path / "theirs", options=ImportOptions((0.05, 0.10), 10))
    assert "gamma -0.206" in plan.notes[0]
    store, _ = write_import(plan, tmp_path / "ours")
    wanted = direct(trajectory, 0.25)
    found = synthesize(SnapshotStore.open(store.folder), sigma_rel=0.25)
    assert error(found, wanted) < 0.05 * error(trajectory[-1], wanted)


def test_float16_folder_of_ema_pytorch_keeps_what_it_can(tmp_path):
    """Its default: every tensor, counters too, cast to float16."""
    trajectory, model = train(
        "ema-pytorch", tmp_path / "theirs", (0.05, 0.10), 1, checkpoint_dtype=torch.float16
    )
    plan = plan_import(tmp_path / "theirs", options=ImportOptions((0.05, 0.10), 1))
    store, _ = write_import(plan, tmp_path / "ours")
    assert {record.dtype for record in store.records} == {"float16"}
    assert all(record.noise > 0 for record in store.records)
    assert store.table.entries["1.num_batches_tracked"].dtype == "int64"
    found = synthesize(store, sigma_rel=0.07)
    assert error(found, direct(trajectory, 0.07)) < 3e-4
    assert set(found) == set(model.state_dict())


def test_folder_of_pytorch_posthoc_ema(tmp_path):
    """Files of the real package in the corpus: w is the weight of every step, counting from step 24."""
    plan = plan_import(CORPUS, options=ImportOptions((0.10, 0.25), 1))
    store, _ = write_import(plan, tmp_path / "ours")
    late = 400 - store.times[-1]
    assert (plan.kind, late) == ("posthoc-ema", 24)
    assert f"after {late} steps" in plan.notes[0]
    for file in plan.files:
        with file.open() as found:
            shares = found.tensors["w"].read().astype(np.float64)[late:]
        steps = np.arange(0, file.time + 1)
        tail = 1 - np.cumsum(shares[: file.time + 1])
        wanted = PowerProfile(file.time, file.profile.sigma_rel).tail(steps)
        # their clock starts at 1 instead of 0, which moves the profile by one step
        np.testing.assert_allclose(tail, wanted, atol=8 / file.time)
