"""Loss, learning rate, and one optimizer step."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from posthoc_ema import ConfigError
from reference_trainer.config import (
    LossConfig,
    NetworkConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)
from reference_trainer.data import load_dataset, new_batches
from reference_trainer.gradients import force_finite_gradients
from reference_trainer.loss_sums import mean_loss
from reference_trainer.losses import edm2_loss, loss_weight
from reference_trainer.presets import PRESETS
from reference_trainer.schedule import learning_rate
from reference_trainer.state import new_state, train_step

CPU = torch.device("cpu")


@pytest.fixture
def config():
    network = NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        logvar_channels=8,
    )
    return TrainConfig(
        network=network,
        track=TrackConfig(snapshot_every=16, direct_sigma_rels=(0.075,)),
        batch_size=8,
        total_images=32,
        checkpoint_every=16,
        status_every=8,
        optim=OptimConfig(lr_ref=0.01, t_ref=2.0, rampup_images=16),
    )


@pytest.fixture
def started(config, tmp_path):
    state = new_state(config, tmp_path, CPU)
    yield state, new_batches(load_dataset("digits"), config, CPU)
    for tracker in state.trackers.values():
        tracker.close()


def test_loss_weight_is_one_over_c_out_squared():
    sigma = torch.tensor([0.01, 0.5, 10.0])
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(loss_weight(sigma, 0.5), 1 / c_out**2)


class Denoiser(torch.nn.Module):
    """Answers zero and a constant u, and keeps what it was asked."""

    sigma_data = 0.5

    def forward(self, x, sigma, labels, return_logvar):
        self.x, self.sigma = x, sigma
        return torch.zeros_like(x), torch.full((len(x), 1, 1, 1), 0.3)


def test_loss_is_elementwise_with_u_broadcast():
    network, images = Denoiser(), torch.randn(5, 1, 4, 4)
    loss = edm2_loss(network, images, None, LossConfig())
    weight = loss_weight(network.sigma, 0.5)[:, None, None, None]
    torch.testing.assert_close(loss, weight / math.exp(0.3) * images**2 + 0.3)


def test_loss_draws_log_normal_noise_levels_and_noise_of_that_level():
    network, images = Denoiser(), torch.zeros(4000, 1, 2, 2)
    edm2_loss(network, images, None, LossConfig(p_mean=-0.8, p_std=1.6), torch.Generator())
    log_sigma = network.sigma.log()
    assert float(log_sigma.mean()) == pytest.approx(-0.8, abs=0.1)
    assert float(log_sigma.std()) == pytest.approx(1.6, abs=0.1)
    scaled = network.x / network.sigma[:, None, None, None]
    assert float(scaled.std()) == pytest.approx(1.0, abs=0.03)


def test_learning_rate_starts_at_zero_ramps_up_and_decays_by_the_root():
    config = OptimConfig(lr_ref=0.01, t_ref=100.0, rampup_images=640)
    rates = [learning_rate(64 * step, 64, config) for step in (0, 5, 10, 100, 400)]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.005])


def test_learning_rate_without_decay_and_ramp_up_is_constant():
    config = OptimConfig(lr_ref=0.01, t_ref=None, rampup_images=0)
    assert {learning_rate(n, 64, config) for n in (0, 64, 10**9)} == {0.01}


def test_non_finite_gradients_become_zero_and_finite_ones_stay():
    layer = torch.nn.Linear(4, 1)
    layer.weight.grad = torch.tensor([[math.nan, math.inf, -math.inf, 2.0]])
    force_finite_gradients(layer)
    assert layer.weight.grad.tolist() == [[0, 0, 0, 2]]
    assert layer.bias.grad is None


def test_digits_of_the_presets_have_mean_zero_and_standard_deviation_sigma_data():
    config = PRESETS["digits-xs"]()
    dataset = load_dataset("digits")
    whole = dataclasses.replace(
        config,
        batch_size=len(dataset),
        total_images=len(dataset),
        checkpoint_every=len(dataset),
        status_every=len(dataset),
        track=TrackConfig(snapshot_every=len(dataset)),
    )
    images, labels = new_batches(dataset, whole, CPU).at(0)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(config.data.sigma_data, rel=1e-3)
    assert labels.bincount().tolist() == np.bincount(dataset.labels).tolist()


@pytest.mark.parametrize(
    ("field", "value"), [("img_resolution", 16), ("img_channels", 3), ("label_dim", 9)]
)
def test_data_set_that_does_not_fit_the_network_is_refused(config, field, value):
    network = dataclasses.replace(config.network, **{field: value})
    with pytest.raises(ConfigError, match=f"network.{field}"):
        new_batches(load_dataset("digits"), dataclasses.replace(config, network=network), CPU)


def test_first_step_changes_time_and_averages_but_not_the_weights(started, config):
    state, batches = started
    train_step(state, batches, config)
    assert state.nimg == 8
    assert [tracker.time for tracker in state.trackers.values()] == [8, 8]
    # Learning rate 0; only the forced normalisation moved the weights, by rescaling rows.
    fresh = new_state(config, state.trackers["snapshots"].folder.parent / "other", CPU)
    for name, p in state.network.named_parameters():
        q = dict(fresh.network.named_parameters())[name]
        norm = [w.detach().reshape(len(w) if w.ndim else 1, -1).norm(dim=1) for w in (p, q)]
        scale = (norm[0] / norm[1].clamp(min=1e-9)).reshape(-1, *[1] * (p.ndim - 1))
        torch.testing.assert_close(p, q * scale if p.ndim else q)


def test_second_step_trains(started, config):
    state, batches = started
    for _ in range(2):
        train_step(state, batches, config)
    assert float(state.network.net.out_gain.detach()) != 0
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_loss_mean_is_counted_in_elements(started, config):
    state, batches = started
    train_step(state, batches, config)
    assert state.losses.count == 8 * 64
    assert math.isfinite(mean_loss(state.losses.values, state.losses.count))


def test_training_leaves_the_global_generator_alone(config, tmp_path):
    dropout = dataclasses.replace(config, network=dataclasses.replace(config.network, dropout=0.5))
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    state = new_state(dropout, tmp_path, CPU)
    train_step(state, new_batches(load_dataset("digits"), dropout, CPU), dropout)
    state.trackers["snapshots"].close()
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_seed_decides_weights_and_noise(config, tmp_path):
    batches = new_batches(load_dataset("digits"), config, CPU)
    losses = []
    for i, seed in enumerate((0, 0, 1)):
        seeded = dataclasses.replace(config, seed=seed)
        state = new_state(seeded, tmp_path / str(i), CPU)
        train_step(state, batches, seeded)
        losses.append(float(state.losses.values[0]))
        for tracker in state.trackers.values():
            tracker.close()
    assert losses[0] == losses[1] != losses[2]
