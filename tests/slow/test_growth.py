"""Activations grow in config C, weights in D, both are flat from E on: a few hundred real steps each."""

import dataclasses

import pytest

from reference_trainer.config import OptimConfig
from reference_trainer.studies import Plan, growth, scale_named
from reference_trainer.studies.apply import apply
from reference_trainer.studies.families import config_runs

BATCH, STEPS = 16, 256
LETTERS = ("C", "D", "E", "F", "G")


@pytest.fixture(scope="module")
def slopes(tmp_path_factory):
    """Slopes of ln magnitude against ln time per config, of one seed each."""
    tiny = scale_named("tiny")
    base = dataclasses.replace(
        tiny.base,
        optim=OptimConfig(lr_ref=0.05, t_ref=96.0, rampup_images=16 * BATCH),
        track=dataclasses.replace(tiny.base.track, snapshot_every=8 * BATCH),
        batch_size=BATCH,
        total_images=STEPS * BATCH,
        checkpoint_every=STEPS * BATCH,
        status_every=STEPS * BATCH,
    )
    scale = dataclasses.replace(tiny, base=base)
    runs = [run for letter in LETTERS for run in config_runs(scale, letter, (0,))]
    plan = Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in growth.measurements_of(scale, run.name)),
    )
    numbers = apply(plan, scale, tmp_path_factory.mktemp("growth"), device="cpu")
    return {
        kind: {
            letter: of[0]
            for letter, of in growth.slopes_of(scale, (0,), numbers, kind, LETTERS).items()
        }
        for kind in growth.KINDS
    }


def test_activations_grow_in_c_faster_than_from_e_on(slopes):
    found = slopes["activations"]
    assert found["C"] > growth.GROWS
    assert found["C"] > max(found[letter] for letter in "EFG")


def test_weights_grow_in_d_and_nowhere_from_e_on(slopes):
    found = slopes["weights"]
    assert found["D"] > growth.GROWS
    assert max(abs(found[letter]) for letter in "EFG") < growth.FLAT
