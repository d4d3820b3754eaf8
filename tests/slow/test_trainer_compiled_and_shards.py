"""The compiled step against the plain one, and a killed shard: what takes minutes."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from reference_trainer.config import ComputeConfig
from reference_trainer.data import load_dataset, new_batches
from reference_trainer.state import new_state, train_step

RANKS = Path(__file__).parents[1] / "integration" / "test_trainer_ranks.py"
spec = importlib.util.spec_from_file_location("trainer_ranks_tests", RANKS)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


def losses(config, folder, steps=6):
    """The loss of each step; more of them would only show how rounding grows."""
    device = torch.device("cpu")
    batches = new_batches(load_dataset("digits"), config, device)
    state = new_state(config, folder, device)
    found, total = [], 0.0
    for _ in range(steps):
        train_step(state, batches, config)
        found.append(float(state.losses.values[0]) - total)
        total += found[-1]
    for tracker in state.trackers.values():
        tracker.close()
    return found


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_plain_ones(tmp_path):
    config = dataclasses.replace(
        ranks.CONFIG, optim=dataclasses.replace(ranks.CONFIG.optim, rampup_images=0)
    )
    compiled = dataclasses.replace(config, compute=ComputeConfig(compile=True))
    expected = losses(config, tmp_path / "plain")
    assert losses(compiled, tmp_path / "compiled") == pytest.approx(expected, rel=1e-4)


def test_a_killed_shard_ends_all_and_the_same_command_goes_on_bit_by_bit(tmp_path):
    config, reference, killed = ranks.SHARDED, tmp_path / "reference", tmp_path / "killed"
    code, _, err = ranks.run(*ranks.phema(config, reference))
    assert code == 0, err
    err, seconds = ranks.kill_a_rank(config, killed, rank=0)
    assert seconds < 45
    assert "so process 1 of 2 stops too" in ranks.sentences(err)[0]
    code, _, err = ranks.run(*ranks.phema(config, killed))
    assert code == 0, err
    assert ranks.sentences(err)[0].startswith("phema: continuing at ")
    ranks.assert_bit_equal(ranks.outcome(killed), ranks.outcome(reference))
    assert ranks.statuses(killed) == ranks.statuses(reference)
