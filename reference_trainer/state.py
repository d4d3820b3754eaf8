"""The state of a run as one record, how it begins, and one optimizer step of it.

Time is the number of images seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from posthoc_ema.torch import Tracker
from reference_trainer.config import TrainConfig
from reference_trainer.data.batches import Batches
from reference_trainer.data.sampler import entropy
from reference_trainer.distributed import DistributedContext
from reference_trainer.gradients import compute_gradients, step_input
from reference_trainer.loss_sums import LossSums
from reference_trainer.parallel import images_per_pass, new_loss, shard
from reference_trainer.precond import Precond
from reference_trainer.schedule import learning_rate
from reference_trainer.seeds import INIT, seeded
from reference_trainer.telemetry import Measurement, measure


@dataclass(slots=True)
class TrainState:
    """All that changes while a run trains.

    Attributes:
        network: the denoiser.
        loss: the loss around it as it is called, compiled or replicated.
        optimizer: Adam over its parameters.
        trackers: the averages by name: "snapshots", and "direct" if there are direct ones.
        ranks: the processes that train together.
        nimg: images seen.
        losses: losses since the last report.
        dynamics: the last measurement of the training dynamics, until it is reported.
    """

    network: Precond
    loss: nn.Module
    optimizer: torch.optim.Adam
    trackers: dict[str, Tracker]
    ranks: DistributedContext
    nimg: int
    losses: LossSums
    dynamics: Measurement | None = None


def new_state(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    *,
    ranks: DistributedContext | None = None,
) -> TrainState:
    """The state at time 0: fresh weights, an optimizer without moments, trackers without averages.

    Args:
        config: the run's configuration.
        folder: the run's folder; the trackers write to `snapshots` and `direct` in it.
        device: where the network lives.
        ranks: the processes that train together; None for this one alone.

    Raises:
        ConfigError: the batch does not divide over processes and passes.
    """
    ranks = ranks or DistributedContext(0, 1, device)
    images_per_pass(config, ranks)
    with seeded(entropy(config.seed, 0, INIT), torch.device("cpu")):
        network = Precond(config.network, config.data)
    network = network.to(device).train()
    if ranks.world_size > 1 and config.compute.parallel == "fsdp2":
        shard(network, ranks)
    loss = new_loss(network, config.loss, config.compute, ranks)
    return TrainState(
        network,
        loss,
        new_optimizer(network, config),
        new_trackers(network, config, folder),
        ranks,
        0,
        LossSums.on(device),
    )


def new_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Adam over all that is trained."""
    optim = config.optim
    return torch.optim.Adam(
        [p for p in network.parameters() if p.requires_grad],
        lr=optim.lr_ref,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def new_trackers(network: Precond, config: TrainConfig, folder: Path) -> dict[str, Tracker]:
    """The tracker of the stored averages and, if asked for, that of the direct ones."""
    track, metadata = config.track, {"reference_trainer": config.to_json()}
    trackers = {
        "snapshots": Tracker(
            network,
            folder / "snapshots",
            sigma_rels=track.sigma_rels,
            every=track.snapshot_every,
            clock="images",
            samples_per_step=config.batch_size,
            dtype=track.dtype,
            resume=True,
            metadata=metadata,
            on_error="raise",
        )
    }
    if track.direct_sigma_rels:
        trackers["direct"] = Tracker(
            network,
            folder / "direct",
            sigma_rels=track.direct_sigma_rels,
            every=None,
            clock="images",
            samples_per_step=config.batch_size,
            dtype="float32",
            raw="none",
            resume=True,
            metadata=metadata,
            on_error="raise",
        )
    return trackers


def train_step(state: TrainState, batches: Batches, config: TrainConfig) -> None:
    """One optimizer step and one tracker step; `state` is updated in place (EDM2 eq. 21)."""
    state.network.force_weight_norm()
    given = step_input(*batches.at(state.nimg), state.nimg, config, state.ranks)
    state.optimizer.zero_grad(set_to_none=True)
    loss, static = compute_gradients(
        state.loss, state.network, given, state.nimg, config, state.ranks
    )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.nimg, config.batch_size, config.optim)
    state.optimizer.step()
    state.nimg += config.batch_size
    for tracker in state.trackers.values():
        tracker.step()
    elements = config.batch_size * given.images[0].numel()
    state.losses.add(loss, static, given.sigma, elements)
    if dynamics_are_due(state.nimg, config):
        step = state.nimg // config.batch_size
        state.dynamics = measure(state.network, state.optimizer, given, step, state.ranks)


def release(state: TrainState) -> None:
    """Let go of what connects the processes; to be called before their process group ends.

    Replicas that outlive the group would end it themselves, in a way that can wait for ever: the group's
    threads need Python's lock to let go of their tensors, and the replicas' destructor holds it.
    """
    state.loss = nn.Identity()


def dynamics_are_due(nimg: int, config: TrainConfig) -> bool:
    """Whether the training dynamics are measured after the step that ends at `nimg` images."""
    return config.telemetry_every is not None and nimg % config.telemetry_every == 0
