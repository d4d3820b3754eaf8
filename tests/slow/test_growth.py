"""Activations grow in config C, weights in D, both are flat from E on: the study's own runs of one seed."""

import pytest

from reference_trainer.studies import Plan, growth, scale_named
from reference_trainer.studies.apply import apply
from reference_trainer.studies.families import config_runs

LETTERS = ("C", "D", "E", "F", "G")
SEED = 1


@pytest.fixture(scope="module")
def slopes(tmp_path_factory):
    """Slopes of ln magnitude against ln time per config."""
    scale = scale_named("digits")
    runs = [run for letter in LETTERS for run in config_runs(scale, letter, (SEED,))]
    plan = Plan(
        runs=tuple(runs),
        measurements=tuple(m for run in runs for m in growth.measurements_of(scale, run.name)),
    )
    numbers = apply(plan, scale, tmp_path_factory.mktemp("growth"), device="cpu")
    return {
        kind: {
            letter: of[0]
            for letter, of in growth.slopes_of(scale, (SEED,), numbers, kind, LETTERS).items()
        }
        for kind in growth.KINDS
    }


@pytest.mark.timeout(900)
def test_activations_grow_in_c_faster_than_from_e_on(slopes):
    found = slopes["activations"]  # 0.15 in C, at most -0.02 from E on, when it was written
    assert found["C"] > growth.GROWS
    assert found["C"] > max(found[letter] for letter in "EFG") + 0.05


@pytest.mark.timeout(900)
def test_weights_grow_in_d_and_nowhere_from_e_on(slopes):
    found = slopes["weights"]
    assert found["D"] > growth.GROWS
    assert max(abs(found[letter]) for letter in "EFG") < growth.FLAT
