"""From what a user names (weights file, run, snapshots) to networks of the reference trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from phema.options import extra, find_store, parse_sigma_rels
from posthoc_ema import ConfigError, synthesize
from posthoc_ema.sweep import label
from posthoc_ema.tensor_files import read_header

if TYPE_CHECKING:
    from reference_trainer.config import TrainConfig
    from reference_trainer.precond import Precond

_KEY = "reference_trainer"


def config_of(metadata: Mapping[str, str], source: Path) -> TrainConfig:
    """The trainer's configuration that a store or a synthesized file carries.

    Raises:
        ConfigError: it carries none: the weights are not of `phema train`.
    """
    from reference_trainer.config import TrainConfig

    if _KEY not in metadata and metadata.get("imported_from") == "edm2":
        raise ConfigError(
            f"{source} holds a network of EDM2 under its own names. To run it here, convert the pickles "
            "with phema convert --as-trainer."
        )
    if _KEY not in metadata:
        raise ConfigError(
            f"{source} does not come from `phema train`, so its network is unknown here. To measure "
            "your own model use `phema sweep --metric 'COMMAND {weights}'`."
        )
    return TrainConfig.from_json(metadata[_KEY])


@dataclass(frozen=True, slots=True)
class Average:
    """One average as a network.

    Attributes:
        label: its length, "raw", or the name of its file.
        network: the network.
        config: the configuration of its run.
        identity: what tells it from others: run, time and length, or the checksum of its file.
    """

    label: str
    network: Precond
    config: TrainConfig
    identity: dict[str, Any]


def open_averages(
    source: Path,
    sigma_rel: str | None,
    at: int | None,
    device: str,
    command: str,
    option: str = "",
) -> Iterator[Average]:
    """Networks that `source` and a LIST stand for, one after another.

    Args:
        source: a weights file, a run folder or a folder of snapshots.
        sigma_rel: LIST for snapshots; None for a weights file.
        at: training time for snapshots.
        device: where the networks go.
        command: name of the command, for messages.
        option: what the options' names begin with, for messages: "guide-" for guides.

    Raises:
        ConfigError: LIST is missing or out of place, or a package is missing.
    """
    with extra(command):
        from reference_trainer.checkpoint import load_network
        from reference_trainer.distributed import resolve_device

        target = resolve_device(device)
        if source.is_file():
            if sigma_rel is not None or at is not None:
                raise ConfigError(
                    f"{source} is one average already; --{option}sigma-rel and --{option}at go with "
                    "snapshots."
                )
            config = config_of(read_header(source).metadata, source)
            network = load_network(source, config, target)
            yield Average(source.stem, network, config, {"file_xxh3": _file_checksum(source)})
            return
        store = find_store(source)
        if sigma_rel is None:
            raise ConfigError(
                f"say which average of the snapshots: --{option}sigma-rel 0.1, or "
                f"--{option}sigma-rel raw for none."
            )
        config = config_of(store.metadata, store.folder)
        sigma_rels = parse_sigma_rels(sigma_rel)
        for value, tensors in zip(sigma_rels, synthesize(store, sigma_rels, at), strict=True):
            identity = {"run_id": store.run_id, "time": tensors.report.time, "sigma_rel": value}
            yield Average(label(value), load_network(tensors, config, target), config, identity)


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def classes_in_turn(network: Precond, count: int) -> list[int] | None:
    """Classes 0, 1, 2, ... and again from 0; None for a network without classes."""
    if network.label_dim == 0:
        return None
    return [i % network.label_dim for i in range(count)]
