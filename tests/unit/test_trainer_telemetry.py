"""Training dynamics: the numbers are what they say, and training does not notice."""

import dataclasses
import math

import pytest
import torch

from reference_trainer.config import NetworkConfig, OptimConfig, TrackConfig, TrainConfig
from reference_trainer.data import load_dataset, new_batches
from reference_trainer.distributed import DistributedContext
from reference_trainer.gradients import step_input
from reference_trainer.state import new_state, train_step
from reference_trainer.telemetry import PROBE, read

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
CONFIG = TrainConfig(
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        logvar_channels=8,
        dropout=0.2,
    ),
    track=TrackConfig(snapshot_every=8),
    batch_size=8,
    total_images=80,
    checkpoint_every=8,
    status_every=8,
    telemetry_every=24,
    optim=OptimConfig(lr_ref=0.02, t_ref=None, rampup_images=0),
)


def trained(config, folder, steps, watch=lambda state: None):
    batches = new_batches(load_dataset("digits"), config, CPU)
    state = new_state(config, folder, CPU)
    for _ in range(steps):
        watch(state)
        train_step(state, batches, config)
    state.trackers["snapshots"].close()
    return state, batches


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three steps, the last of which is measured, and the weights before it as Adam had them."""
    before = {}

    def watch(state):
        state.network.force_weight_norm()  # the step does so again, which changes nothing much
        before.update({n: p.detach().clone() for n, p in state.network.named_parameters()})

    state, batches = trained(CONFIG, tmp_path_factory.mktemp("run"), 3, watch)
    return state, batches, before, read(state.dynamics, ALONE)


def norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def test_blocks_and_resolutions_are_those_of_the_network(measured):
    _, _, _, dynamics = measured
    blocks = {"enc.r8_block0", "enc.r4_down", "enc.r4_block0", "dec.r4_in0", "dec.r4_in1"}
    blocks |= {"dec.r4_block0", "dec.r4_block1", "dec.r8_up", "dec.r8_block0", "dec.r8_block1"}
    assert set(dynamics["activations"]) == blocks | {"stem", "out"}
    assert set(dynamics["activations_by_resolution"]) == {"8", "4"}
    assert blocks | {"stem", "out", "embedding", "logvar"} <= set(dynamics["weights"])
    assert set(dynamics["weights_by_resolution"]) == {"8", "4"}
    for kind in ("updates", "gradients"):
        assert set(dynamics[kind]) >= blocks | {"all"}


def test_updates_are_the_change_of_the_weights_relative_to_them(measured):
    """Computed from Adam's moments; here from the weights before and after the step."""
    state, _, before, dynamics = measured
    after = dict(state.network.named_parameters())
    for block in ("enc.r8_block0", "dec.r4_in0", "stem"):
        names = [n for n, p in after.items() if f"{block}." in n and p.ndim >= 2]
        moved = norm(after[n].detach() - before[n] for n in names)
        size = norm(after[n].detach() for n in names)
        assert names
        assert dynamics["updates"][block] == pytest.approx(moved / size, rel=0.03)


def test_weights_are_root_mean_squares_and_gradients_norms(measured):
    state, _, _, dynamics = measured
    named = dict(state.network.named_parameters())
    block = "dec.r8_up"
    weights = [p.detach() for n, p in named.items() if f"{block}." in n and p.ndim >= 2]
    rms = norm(weights) / math.sqrt(sum(w.numel() for w in weights))
    assert dynamics["weights"][block] == pytest.approx(rms, rel=1e-5)
    assert rms == pytest.approx(1, abs=0.05)  # config G
    gradients = [p.grad for n, p in named.items() if f"{block}." in n]
    assert dynamics["gradients"][block] == pytest.approx(norm(gradients), rel=1e-5)
    everything = norm(p.grad for p in named.values())
    assert dynamics["gradients"]["all"] == pytest.approx(everything, rel=1e-5)


def test_activations_are_root_mean_squares_of_what_the_blocks_give(measured):
    state, batches, _, dynamics = measured
    given = step_input(*batches.at(16), 16, CONFIG, ALONE)
    seen = {}
    block = state.network.net.dec["r8_block0"]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    network = state.network.eval()
    with torch.no_grad():
        network(given.images[:PROBE] + given.noise[:PROBE], given.sigma[:PROBE], given.labels)
    handle.remove()
    expected = float(seen["out"].square().mean().sqrt())
    assert dynamics["activations"]["dec.r8_block0"] == pytest.approx(expected, rel=1e-5)
    level = [v for k, v in dynamics["activations"].items() if "r4_" in k]
    assert dynamics["activations_by_resolution"]["4"] == pytest.approx(sum(level) / len(level))


def test_measuring_changes_no_bit_of_training(tmp_path):
    """With dropout, whose random numbers the measurement must not use up."""
    often = dataclasses.replace(CONFIG, telemetry_every=8)
    never = dataclasses.replace(CONFIG, telemetry_every=None)
    states = [trained(c, tmp_path / str(c.telemetry_every), 4)[0] for c in (often, never)]
    assert states[0].dynamics is not None
    assert states[1].dynamics is None
    for a, b in zip(*(s.network.state_dict().values() for s in states), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(states[0].losses.values, states[1].losses.values)
    assert states[0].network.training


def test_it_is_measured_when_it_is_due_and_then_only(tmp_path):
    seen = []
    trained(CONFIG, tmp_path, 4, lambda state: seen.append(state.dynamics is not None))
    assert seen == [False, False, False, True]  # before the steps; due after the third
