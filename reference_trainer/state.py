"""The state of a run as one record, how it begins, and one optimizer step of it.

Time is the number of images seen. Everything random is drawn from a generator that is seeded from
(seed, images seen), so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from posthoc_ema import ConfigError
from posthoc_ema.torch import Tracker
from reference_trainer.config import TrainConfig
from reference_trainer.data import Dataset, batch_indices
from reference_trainer.losses import edm2_loss
from reference_trainer.precond import Precond
from reference_trainer.schedule import learning_rate

_INIT, _STEP = 0, 1  # the two uses of the seed, kept apart


@dataclass(slots=True)
class TrainState:
    """All that changes while a run trains.

    Attributes:
        network: the denoiser.
        optimizer: Adam over its parameters.
        trackers: the averages by name: "snapshots", and "direct" if there are direct ones.
        nimg: images seen.
        loss_sum: sum of the loss over the elements since the last report, float64 0-d, on the device.
        loss_count: number of those elements.
    """

    network: Precond
    optimizer: torch.optim.Adam
    trackers: dict[str, Tracker]
    nimg: int
    loss_sum: Tensor
    loss_count: int


@dataclass(frozen=True, slots=True)
class Batches:
    """The data set on the device, and the mapping of its pixels.

    Attributes:
        images: uint8 `[num_items, c, h, w]`.
        labels: int64 `[num_items]`.
        config: the run's configuration.
    """

    images: Tensor
    labels: Tensor
    config: TrainConfig

    def at(self, nimg: int) -> tuple[Tensor, Tensor]:
        """The batch that is seen after `nimg` images: float32 `[n, c, h, w]` and labels `[n]`."""
        config = self.config
        order = batch_indices(len(self.images), nimg, config.batch_size, config.seed)
        index = torch.from_numpy(order).to(self.images.device)
        pixels = self.images[index].to(torch.float32)
        mean, scale = (
            pixels.new_tensor(v)[:, None, None] for v in (config.data.mean, config.data.scale)
        )
        images = (pixels / 127.5 - 1 - mean) * scale
        return images, self.labels[index]


def new_batches(dataset: Dataset, config: TrainConfig, device: torch.device) -> Batches:
    """Move a data set to the device.

    Raises:
        ConfigError: the data set does not fit the network.
    """
    network = config.network
    for name, needed, given in (
        ("img_resolution", dataset.resolution, network.img_resolution),
        ("img_channels", dataset.channels, network.img_channels),
    ):
        if needed != given:
            raise ConfigError(
                f"network.{name} must be {needed} for the data set {dataset.name!r}, got {given}."
            )
    if network.label_dim not in (0, dataset.label_dim):
        raise ConfigError(
            f"network.label_dim must be {dataset.label_dim} for the data set {dataset.name!r} "
            f"(or 0 for an unconditional network), got {network.label_dim}."
        )
    images, labels = torch.from_numpy(dataset.images), torch.from_numpy(dataset.labels)
    return Batches(images.to(device), labels.to(device), config)


def new_state(config: TrainConfig, folder: Path, device: torch.device) -> TrainState:
    """The state at time 0: fresh weights, an optimizer without moments, trackers without averages.

    Args:
        config: the run's configuration.
        folder: the run's folder; the trackers write to `snapshots` and `direct` in it.
        device: where the network lives.
    """
    with seeded(_entropy(config.seed, 0, _INIT), torch.device("cpu")):
        network = Precond(config.network, config.data)
    network = network.to(device).train()
    optim = config.optim
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=optim.lr_ref,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return TrainState(network, optimizer, new_trackers(network, config, folder), 0, zero, 0)


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
    images, labels = batches.at(state.nimg)
    entropy = _entropy(config.seed, state.nimg, _STEP)
    generator = torch.Generator(images.device).manual_seed(entropy)
    state.optimizer.zero_grad(set_to_none=True)
    # Dropout takes no generator of its own: only then is the global one borrowed.
    dropout = seeded(entropy, images.device) if config.network.dropout else contextlib.nullcontext()
    with dropout:
        loss = edm2_loss(state.network, images, labels, config.loss, generator)
    (loss.sum() / len(images)).backward()
    force_finite_gradients(state.network)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.nimg, config.batch_size, config.optim)
    state.optimizer.step()
    state.nimg += config.batch_size
    for tracker in state.trackers.values():
        tracker.step()
    state.loss_sum += loss.detach().sum(dtype=torch.float64)
    state.loss_count += loss.numel()


def force_finite_gradients(module: nn.Module) -> None:
    """Replace nan and infinities in the gradients by 0, in place (EDM2 section D.2)."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            torch.nan_to_num(parameter.grad, nan=0, posinf=0, neginf=0, out=parameter.grad)


@contextlib.contextmanager
def seeded(entropy: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block and put them back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(entropy)
        yield


def _entropy(seed: int, nimg: int, use: int) -> int:
    """64 well-mixed bits of (seed, nimg, use): neighbouring seeds share no stream."""
    mixed = np.random.SeedSequence((seed, nimg), spawn_key=(use,)).generate_state(1, np.uint64)
    return int(mixed[0])
