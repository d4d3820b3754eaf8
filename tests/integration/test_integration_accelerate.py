"""track() in a loop of accelerate, with the real Accelerator; the tracker among its registered objects."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, gamma_from_sigma_rel, power_average, synthesize
from posthoc_ema.torch import track

SIGMA_REL = 0.1

pytestmark = pytest.mark.filterwarnings("ignore")  # those of accelerate, about itself


class Run:
    """A prepared model, its optimizer, its data and its tracker."""

    def __init__(self, folder, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from accelerate import Accelerator
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = torch.utils.data.DataLoader(torch.randn(48, 4), batch_size=4)
        self.accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)
        settings = {"every": 4, "sigma_rels": (0.05, SIGMA_REL), "dtype": "float32", **options}
        self.tracker = track(
            self.optimizer, self.model, folder, resume=True, on_error="raise", **settings
        )
        self.accelerator.register_for_checkpointing(self.tracker)
        self.seen = []

    def epoch(self):
        for batch in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward((self.model(batch) - 1).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                weights = self.accelerator.unwrap_model(self.model).named_parameters()
                self.seen.append({n: p.detach().clone().numpy() for n, p in weights})


def test_accelerate_averages_are_those_of_the_optimizer_steps(tmp_path):
    run = Run(tmp_path / "snapshots")
    run.epoch()
    run.epoch()
    assert run.tracker.time == len(run.seen) == 12
    run.tracker.close()
    average = synthesize(tmp_path / "snapshots", SIGMA_REL)
    gamma = float(gamma_from_sigma_rel(SIGMA_REL))
    assert average.keys() == run.seen[0].keys()
    for name in average:
        expected = power_average([w[name] for w in run.seen], range(1, 13), gamma)
        np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-7)


def test_accelerate_saves_and_loads_the_tracker_bit_for_bit(tmp_path):
    run = Run(tmp_path / "snapshots")
    run.epoch()
    run.accelerator.save_state(tmp_path / "checkpoint")
    run.epoch()
    expected = {name: a.clone() for name, a in run.tracker.averages(SIGMA_REL).items()}
    assert run.tracker.store.times == [4, 8, 12]
    run.tracker.close()

    again = Run(tmp_path / "snapshots")
    again.accelerator.load_state(tmp_path / "checkpoint")
    assert again.tracker.time == 6
    assert SnapshotStore.open(tmp_path / "snapshots").times == [4]
    again.epoch()
    found = again.tracker.averages(SIGMA_REL)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again.tracker.flush()
    assert again.tracker.store.times == [4, 8, 12]
    again.tracker.close()


def test_accelerate_clock_of_images_adds_up_micro_batches(tmp_path):
    run = Run(tmp_path / "snapshots", clock="images", every=16)
    for batch in run.data:
        with run.accelerator.accumulate(run.model):
            run.tracker.advance(len(batch))
            run.accelerator.backward(run.model(batch).square().mean())
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.tracker.time == 48
    run.tracker.close()
    assert SnapshotStore.open(tmp_path / "snapshots").times == [16, 32, 48]
