"""Losses, and gradients of a batch in several passes: the same numbers however the batch is divided."""

import contextlib
import dataclasses
import math

import pytest
import torch

from posthoc_ema import ConfigError
from reference_trainer.config import (
    ComputeConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)
from reference_trainer.data import load_dataset, new_batches
from reference_trainer.distributed import DistributedContext
from reference_trainer.gradients import compute_gradients, step_input, unscale_gradients
from reference_trainer.loss_sums import LossSums, loss_by_ln_sigma, mean_loss
from reference_trainer.losses import (
    TrainingLoss,
    denoising_loss,
    draw_noise,
    edm2_loss,
    uncertainty_loss,
)
from reference_trainer.memory import memory_advice, peak_bytes
from reference_trainer.parallel import images_per_pass, new_loss, next_lower_divisor
from reference_trainer.precond import Precond
from reference_trainer.presets import preset, with_config

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
NETWORK = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    logvar_channels=8,
)
CONFIG = TrainConfig(
    network=NETWORK,
    track=TrackConfig(snapshot_every=24),
    batch_size=24,
    total_images=240,
    checkpoint_every=24,
    status_every=24,
)


def with_compute(config, **options):
    return dataclasses.replace(config, compute=ComputeConfig(**options))


@pytest.fixture(scope="module")
def network():
    """A network whose output is not zero any more."""
    torch.manual_seed(0)
    network = Precond(NETWORK, CONFIG.data).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return network


@pytest.fixture(scope="module")
def given():
    batches = new_batches(load_dataset("digits"), CONFIG, CPU)
    return step_input(*batches.at(48), 48, CONFIG, ALONE)


def gradients(network, given, config, nimg=48):
    """Gradients and losses of a step."""
    network.zero_grad(set_to_none=True)
    loss = new_loss(network, config.loss, config.compute, ALONE)
    losses = compute_gradients(loss, network, given, nimg, config, ALONE)
    return {n: p.grad.clone() for n, p in network.named_parameters()}, losses


# ---- losses


class Denoiser(torch.nn.Module):
    """Answers zero, and 0.3 as u."""

    sigma_data = 0.5

    def forward(self, x, sigma, labels, return_logvar=False):
        u = torch.full((len(x), 1, 1, 1), 0.3)
        return (torch.zeros_like(x), u) if return_logvar else torch.zeros_like(x)


def test_static_loss_is_lambda_times_the_squared_error():
    """EDM table 1, and no u in it."""
    images, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 2.0])
    loss = denoising_loss(Denoiser(), images, None, sigma, torch.zeros_like(images))
    for i, s in enumerate(sigma.tolist()):
        expected = (s**2 + 0.25) / (s * 0.5) ** 2 * images[i] ** 2
        torch.testing.assert_close(loss[i], expected)


def test_uncertainty_loss_gives_the_static_loss_beside_it():
    images, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 2.0])
    noise = torch.zeros_like(images)
    loss, static = uncertainty_loss(Denoiser(), images, None, sigma, noise)
    torch.testing.assert_close(static, denoising_loss(Denoiser(), images, None, sigma, noise))
    torch.testing.assert_close(loss, static / math.exp(0.3) + 0.3)


@pytest.mark.parametrize("weighting", ["static", "uncertainty"])
def test_training_loss_sums_the_elements_of_each_image(weighting):
    config = LossConfig(weighting=weighting)
    images = torch.randn(3, 1, 4, 4)
    sigma, noise = draw_noise((3, 1, 4, 4), config, torch.Generator().manual_seed(3))
    loss, static = TrainingLoss(Denoiser(), config)(images, None, sigma, noise)
    whole = edm2_loss(Denoiser(), images, None, config, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, whole.sum((1, 2, 3)))
    assert torch.equal(static, loss) == (weighting == "static")


@pytest.mark.parametrize("letter", ["A", "C", "G"])
def test_configs_of_the_paper_give_every_parameter_a_gradient(letter):
    """Parameters without one would stay behind, and replicas would wait for them."""
    config = with_config(preset("digits-xs"), letter)
    config = dataclasses.replace(
        config, network=dataclasses.replace(config.network, model_channels=8, dropout=0.0)
    )
    network = Precond(config.network, config.data)
    loss = TrainingLoss(network, config.loss)
    loss(
        *(t[:4] for t in (torch.randn(4, 1, 8, 8), torch.arange(4), torch.ones(4))), torch.zeros(1)
    )[0].sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


# ---- passes


@pytest.mark.parametrize("microbatch", [1, 8, 12])
def test_gradients_of_several_passes_are_those_of_one(network, given, microbatch):
    expected, losses = gradients(network, given, CONFIG)
    found, parts = gradients(network, given, with_compute(CONFIG, microbatch=microbatch))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)
    for part, loss in zip(parts, losses, strict=True):
        torch.testing.assert_close(part, loss)


def test_gradients_of_shares_average_to_those_of_the_batch(network, given):
    """What two processes have before they exchange gradients, without the processes."""
    expected, _ = gradients(network, given, CONFIG)
    total = dict.fromkeys(expected, 0.0)
    whole = new_batches(load_dataset("digits"), CONFIG, CPU).at(48)
    for rank in range(2):
        ranks = DistributedContext(rank, 2, CPU)
        mine = slice(12 * rank, 12 * rank + 12)
        part = step_input(*(t[mine] for t in whole), 48, CONFIG, ranks)
        assert torch.equal(part.noise, given.noise[mine])
        assert torch.equal(part.sigma, given.sigma[mine])
        network.zero_grad(set_to_none=True)
        loss = TrainingLoss(network, CONFIG.loss)
        compute_gradients(loss, network, part, 48, CONFIG, ranks)
        for name, parameter in network.named_parameters():
            total[name] = total[name] + parameter.grad / 2
    for name in expected:
        torch.testing.assert_close(total[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)


def test_loss_scale_is_taken_out_before_adam_sees_the_gradients(network, given):
    expected, _ = gradients(network, given, CONFIG)
    scaled = dataclasses.replace(CONFIG, optim=OptimConfig(loss_scale=128.0))
    found, _ = gradients(network, given, scaled)  # a power of two: exactly
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unscaling_leaves_what_has_overflowed_to_be_zeroed():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[math.inf, 50.0]])
    unscale_gradients(layer, 100.0)
    assert layer.weight.grad.tolist() == [[math.inf, 0.5]]


def test_dropout_of_a_step_is_its_own_and_comes_again(given):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(NETWORK, dropout=0.5))
    torch.manual_seed(0)
    network = Precond(config.network, config.data).train()
    with torch.no_grad():
        network.net.out_gain.fill_(1.0)
    before = torch.random.get_rng_state()
    runs = [gradients(network, given, config, nimg)[1][0] for nimg in (48, 48, 72)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("microbatch", "processes", "words"),
    [
        (7, 1, "must divide the 24 images that each of 1 processes has of a batch, got 7. Try 6."),
        (5, 2, "must divide the 12 images that each of 2 processes has of a batch, got 5. Try 4."),
        (None, 5, "batch_size must be a multiple of the number of processes, which is 5, got 24."),
    ],
)
def test_batches_that_do_not_divide_are_refused(microbatch, processes, words):
    ranks = DistributedContext(0, processes, CPU)
    with pytest.raises(ConfigError) as caught:
        images_per_pass(with_compute(CONFIG, microbatch=microbatch), ranks)
    assert words in str(caught.value)


def test_next_lower_divisor():
    assert [next_lower_divisor(24, n) for n in (30, 23, 7, 1, 0)] == [24, 12, 6, 1, 1]


# ---- sums of losses


def test_losses_are_reported_by_noise_level_and_non_finite_ones_spoil_one_bin():
    sums = LossSums.on(CPU)
    sigma = torch.tensor([-6.0, -0.5, -0.25, 0.5, 9.0]).exp()
    static = torch.tensor([4.0, 8.0, 12.0, math.nan, 2.0])
    sums.add(torch.ones(5), static, sigma, count=20)
    sums.add(torch.ones(5), static, sigma, count=20)
    found = loss_by_ln_sigma(sums.values, elements=4)
    assert math.isnan(found.pop("0..1"))
    assert found == {"..-5": 1.0, "-1..0": 2.5, "5..": 0.5}
    assert mean_loss(sums.values, sums.count) == 10 / 40
    sums.reset()
    assert (sums.count, float(sums.values.abs().sum())) == (0, 0.0)


# ---- memory


def ask_for_a_terabyte(error):
    if error is torch.OutOfMemoryError:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
    torch.empty(2**50)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("microbatch", "words"),
    [(None, "with 24 images per forward pass: try --microbatch 12."), (6, "try --microbatch 3.")],
)
def test_out_of_memory_says_which_microbatch_to_try(error, microbatch, words):
    config = with_compute(CONFIG, microbatch=microbatch)
    with pytest.raises(ConfigError) as caught, memory_advice(config, ALONE):
        ask_for_a_terabyte(error)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_out_of_memory_with_one_image_says_what_else_there_is():
    with (
        pytest.raises(ConfigError, match="dtype=bfloat16"),
        memory_advice(with_compute(CONFIG, microbatch=1), ALONE),
    ):
        ask_for_a_terabyte(RuntimeError)


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling"],
)
def test_out_of_memory_of_driver_and_libraries_is_recognised(message):
    with pytest.raises(ConfigError, match="try --microbatch 12"), memory_advice(CONFIG, ALONE):
        raise RuntimeError(message)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="sizes"), memory_advice(CONFIG, ALONE):
        raise RuntimeError("sizes do not match")


def test_memory_is_that_of_this_process():
    before = peak_bytes(CPU)
    with contextlib.suppress(MemoryError):
        torch.ones(2**26)
    assert 2**26 < before <= peak_bytes(CPU)
