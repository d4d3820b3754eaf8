"""What the trainer's benchmarks time: steps of training and samplings, the trainer's and the plain ones."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time

import torch

from reference_trainer.config import ComputeConfig, NetworkConfig, TrainConfig
from reference_trainer.distributed import DistributedContext
from reference_trainer.gradients import compute_gradients, force_finite_gradients, step_input
from reference_trainer.losses import uncertainty_loss
from reference_trainer.parallel import new_loss
from reference_trainer.precond import Precond
from reference_trainer.presets import preset
from reference_trainer.sampling import evaluated, heun_sample
from reference_trainer.state import new_optimizer

SMALL = NetworkConfig(
    img_resolution=16,
    img_channels=3,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2, 4),
    num_blocks=1,
    attn_resolutions=(8,),
)
"""0.73 million parameters at 16x16x3: the network of the processor's figures."""

WIDE = dataclasses.replace(SMALL, model_channels=32, channel_mult=(1, 2))
"""0.76 million parameters, wider and less deep: arithmetic counts for more."""


def training(network: NetworkConfig, *, batch: int, compiled: bool = False) -> TrainConfig:
    """The configuration of a run that is only timed."""
    lengths = {"total_images": batch, "checkpoint_every": batch, "status_every": batch}
    base = preset("digits-xs")
    return dataclasses.replace(
        base,
        network=network,
        batch_size=batch,
        compute=ComputeConfig(compile=compiled),
        track=dataclasses.replace(base.track, snapshot_every=batch),
        **lengths,
    )


def new_network(config: NetworkConfig, device: str = "cpu") -> Precond:
    """A network whose gains are not zero, so that all of it matters."""
    torch.manual_seed(0)
    network = Precond(config, preset("digits-xs").data)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)
    return network.to(device).train()


def images_and_labels(config: NetworkConfig, batch: int, device: str = "cpu"):
    """A batch in network units."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.img_channels, config.img_resolution, config.img_resolution)
    images = torch.randn(shape, generator=generator) * 0.5
    return images.to(device), (torch.arange(batch) % max(1, config.label_dim)).to(device)


def trainer_step(network: Precond, config: TrainConfig):
    """One optimizer step as the trainer does it, the tracker left out."""
    device = next(network.parameters()).device
    ranks = DistributedContext(0, 1, device)
    loss = new_loss(network, config.loss, config.compute, ranks)
    optimizer = new_optimizer(network, config)
    given = images_and_labels(config.network, config.batch_size, str(device))

    def step():
        network.force_weight_norm()
        drawn = step_input(*given, 0, config, ranks)
        optimizer.zero_grad(set_to_none=True)
        compute_gradients(loss, network, drawn, 0, config, ranks)
        optimizer.step()

    return step


def plain_step(plain, config: TrainConfig):
    """One optimizer step of the plain network; noise, loss and optimizer are the trainer's."""
    device = next(plain.parameters()).device
    optimizer = new_optimizer(plain, config)
    given = images_and_labels(config.network, config.batch_size, str(device))
    ranks = DistributedContext(0, 1, device)

    def step():
        drawn = step_input(*given, 0, config, ranks)
        optimizer.zero_grad(set_to_none=True)
        loss, _ = uncertainty_loss(plain, drawn.images, drawn.labels, drawn.sigma, drawn.noise)
        (loss.sum() / config.batch_size).backward()
        force_finite_gradients(plain)
        optimizer.step()

    return step


def sampling(network, config: NetworkConfig, *, batch: int, num_steps: int):
    """Sample a batch with Heun steps: 2 num_steps - 1 evaluations."""
    device = str(next(network.parameters()).device)
    noise, labels = images_and_labels(config, batch, device)
    return lambda: heun_sample(network, noise, labels=labels, num_steps=num_steps)


def trainer_sampling(network: Precond, config: NetworkConfig, *, precision, compiled, **how):
    """Sampling as the trainer does it: a folded copy, in a precision of its own."""
    return sampling(evaluated(network, precision, compiled), config, **how)


def in_turn(actions, rounds, *, warm=2, synchronize=lambda: None):
    """Seconds of each action at each round, one after the other; the first rounds do not count."""
    times = {name: [] for name in actions}
    for number in range(warm + rounds):
        for name, action in actions.items():
            synchronize()
            start = time.perf_counter()
            action()
            synchronize()
            if number >= warm:
                times[name].append(time.perf_counter() - start)
    return times


def speedups(times, base):
    """How many times faster than `base`: the median over rounds of the ratio within a round."""
    return {
        name: statistics.median(b / t for b, t in zip(times[base], values, strict=True))
        for name, values in times.items()
    }


def report(title, times, base):
    """Print medians and fastest rounds beside their ratios; return the medians of the ratios."""
    ratios = speedups(times, base)
    print(f"\n{title}")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':36}{'median ms':>10}{'faster':>8}{'fastest':>9}{'faster':>8}")
    for name, values in times.items():
        median, least = statistics.median(values) * 1e3, min(values) * 1e3
        fastest = min(times[base]) / min(values)
        print(f"{name:36}{median:10.1f}{ratios[name]:8.2f}{least:9.1f}{fastest:8.2f}")
    return ratios
