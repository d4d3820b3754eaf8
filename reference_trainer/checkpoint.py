"""Checkpoints: all that resuming needs, as safetensors; and networks from stored weights.

A checkpoint holds the weights, Adam's moments and the trackers' averages, and in its metadata the
numbers that belong to them and a checksum. It is written atomically; older ones are kept, so that a
damaged newest one costs some time and not the run. A checkpoint is never a snapshot: for the weights
to use, synthesize.

Tensors are whole in it, however many processes train and whatever each of them holds: a run may go on with
any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from posthoc_ema import SnapshotFormatError, SnapshotMismatchError
from posthoc_ema.codecs import FLOATING, AnyArray, decode
from posthoc_ema.tensor_files import TensorFile, byte_view, read_header, write_tensors
from reference_trainer.config import TrainConfig
from reference_trainer.parallel import spread_like, whole
from reference_trainer.precond import Precond
from reference_trainer.state import TrainState

SCHEMA = 2
METADATA_KEY = "reference_trainer.checkpoint"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        nimg: images seen.
        numbers: everything in it that is not a tensor.
        tensors: name -> array; names begin with `network.`, `adam.` or `tracker.`.
    """

    nimg: int
    numbers: dict[str, Any]
    tensors: dict[str, AnyArray]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, under the rest of their names."""
        return {
            name.removeprefix(prefix): torch.from_numpy(array)
            for name, array in self.tensors.items()
            if name.startswith(prefix)
        }


def save_checkpoint(state: TrainState, folder: Path, keep: int = 2) -> Path:
    """Write the checkpoint of now and remove older ones; all processes together.

    Args:
        state: the state of the run.
        folder: the folder of checkpoints; made if needed.
        keep: so many checkpoints stay, this one included.

    Returns:
        The file's path.

    Raises:
        SnapshotWriteError: it could not be written; the older ones are untouched.
    """
    checkpoint = capture(state)
    path = folder / f"checkpoint-{state.nimg:012d}.safetensors"
    state.ranks.agree(lambda: _write(checkpoint, path, keep), main_only=True)
    return path


def _write(checkpoint: Checkpoint, path: Path, keep: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = json.dumps({**checkpoint.numbers, "checksum": _digest(checkpoint)})
    write_tensors(path, checkpoint.tensors, {METADATA_KEY: metadata})
    # Files of a later time can only be damaged ones: a sound one would have been resumed from.
    paths = checkpoint_paths(path.parent)
    older = [p for p in paths if p.name < path.name]
    for old in set(paths) - {path, *older[: keep - 1]}:
        old.unlink()


def checkpoint_paths(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, newest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint, and what is wrong with the newer ones.

    Args:
        folder: the folder of checkpoints; it may be missing.

    Returns:
        The checkpoint, None if the folder holds none; one sentence per damaged file passed over.

    Raises:
        SnapshotFormatError: there are checkpoints, and none of them can be read.
        SnapshotMismatchError: the newest sound one is of another schema.
    """
    damaged: list[str] = []
    for path in checkpoint_paths(folder):
        try:
            return read_checkpoint(path), damaged
        except SnapshotFormatError as error:
            damaged.append(str(error))
    if damaged:
        raise SnapshotFormatError(
            f"{folder} holds no readable checkpoint: {damaged[0]} "
            "Restore one from a copy, or remove the whole run to train from the beginning."
        )
    return None, damaged


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check it against its checksum.

    Raises:
        SnapshotFormatError: the file is damaged or no checkpoint.
        SnapshotMismatchError: it is of another schema.
    """
    header = read_header(path)
    try:
        numbers = json.loads(header.metadata[METADATA_KEY])
        schema, nimg, digest = numbers["schema"], int(numbers["nimg"]), numbers.pop("checksum")
    except (KeyError, TypeError, ValueError):
        raise SnapshotFormatError(f"{path} is not a checkpoint of this trainer.") from None
    if schema != SCHEMA:
        raise SnapshotMismatchError(
            f"{path} has checkpoint schema {schema}, this version reads {SCHEMA}. "
            "Resume with the version that wrote it."
        )
    with TensorFile(path, header) as file:
        tensors = {name: file.read(name) for name in header.tensors}
    checkpoint = Checkpoint(nimg, numbers, tensors)
    if _digest(checkpoint) != digest:
        raise SnapshotFormatError(f"{path} is damaged: its content does not match its checksum.")
    return checkpoint


def capture(state: TrainState) -> Checkpoint:
    """Take the checkpoint of a state; all processes together.

    On a CPU the arrays are views of the live tensors, where those are whole. Only the first process's
    checkpoint holds tensors; the losses of all are with the first from now on.
    """
    network = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    losses = _losses_to_main(state)
    tensors: dict[str, Tensor] = {**network, "loss_sums": losses}
    steps: set[int] = set()
    for name, parameter in state.network.named_parameters():
        adam = state.optimizer.state.get(parameter, {})
        tensors |= {f"adam.{moment}.{name}": adam[moment] for moment in _MOMENTS if adam}
        steps |= {int(adam["step"])} if adam and not steps else set()
    trackers: dict[str, Any] = {}
    for key, tracker in state.trackers.items():
        trackers[key] = tracker.state_dict()
        averages = trackers[key].pop("averages")
        tensors |= {f"tracker.{key}.{name}": average for name, average in averages.items()}
    numbers = {
        "schema": SCHEMA,
        "nimg": state.nimg,
        "adam_step": max(steps, default=0),
        "loss_count": state.losses.count,
        "trackers": trackers,
    }
    arrays: dict[str, AnyArray] = {}
    for name, tensor in tensors.items():
        entire = whole(tensor)
        if state.ranks.is_main:
            arrays[name] = entire.cpu().numpy()
    return Checkpoint(state.nimg, numbers, arrays)


def _losses_to_main(state: TrainState) -> Tensor:
    """Sum the losses over the processes, and leave them with the first."""
    values = state.ranks.sum_(state.losses.values)
    total = values.clone()
    if not state.ranks.is_main:
        values.zero_()
    return total


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into a new state, in place; the stores lose their later snapshots.

    Raises:
        SnapshotMismatchError: its tensors are not those of the network, or a store is of another run.
    """
    load_weights(state.network, checkpoint.part("network."), "the checkpoint")
    _restore_adam(state, checkpoint)
    for key, tracker in state.trackers.items():
        averages = checkpoint.part(f"tracker.{key}.")
        tracker.load_state_dict({**checkpoint.numbers["trackers"][key], "averages": averages})
    state.nimg = checkpoint.nimg
    if state.ranks.is_main:
        state.losses.values.copy_(checkpoint.part("loss_sums")[""])
    state.losses.count = int(checkpoint.numbers["loss_count"])


def _restore_adam(state: TrainState, checkpoint: Checkpoint) -> None:
    parts = {moment: checkpoint.part(f"adam.{moment}.") for moment in _MOMENTS}
    step = torch.tensor(float(checkpoint.numbers["adam_step"]))
    names = {parameter: name for name, parameter in state.network.named_parameters()}
    places = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = {
        i: {"step": step.clone()}
        | {moment: spread_like(parts[moment][names[p]], p.detach()) for moment in _MOMENTS}
        for i, p in enumerate(places)
        if names[p] in parts[_MOMENTS[0]]
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def load_weights(network: Precond, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network, paired by name.

    Args:
        network: the network.
        tensors: name -> tensor of the network's state dict, any floating dtype.
        source: what to call them in an error.

    Raises:
        SnapshotMismatchError: a name is missing or unknown, or a shape differs.
    """
    own = network.state_dict()
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            where = f"{source} lacks" if name not in tensors else f"the network lacks, in {source},"
            raise SnapshotMismatchError(
                f"{where} the tensor {name!r}. Weights and configuration must come from one run."
            )
        if tensors[name].shape != own[name].shape:
            raise SnapshotMismatchError(
                f"tensor {name!r} has shape {tuple(tensors[name].shape)} in {source} and "
                f"{tuple(own[name].shape)} in the network. Weights and configuration must come from "
                "one run."
            )
    network.load_state_dict({name: spread_like(tensors[name], own[name]) for name in own})


def load_network(
    weights: Path | Mapping[str, AnyArray], config: TrainConfig, device: str | torch.device = "cpu"
) -> Precond:
    """A network in evaluation mode with given weights, for example synthesized ones.

    Args:
        weights: a safetensors file with the network's own names, or the same as name -> array.
        config: the configuration of the run that the weights come from.
        device: where the network goes.

    Raises:
        SnapshotFormatError: the file cannot be read.
        SnapshotMismatchError: names or shapes are not the network's.
    """
    source = "the mapping"
    if isinstance(weights, Path):
        source, weights = str(weights), _read_weights(weights)
    with torch.device("meta"):
        network = Precond(config.network, config.data)
    network = network.to_empty(device=device)
    load_weights(network, {k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()}, source)
    return network.eval()


def _read_weights(path: Path) -> dict[str, AnyArray]:
    with TensorFile(path) as file:
        infos = file.header.tensors
        return {
            name: decode(file.read(name), info.dtype) if info.dtype in FLOATING else file.read(name)
            for name, info in infos.items()
        }


def _digest(checkpoint: Checkpoint) -> str:
    """xxh3_64 of numbers and tensors, in the order of the names."""
    state = xxhash.xxh3_64(json.dumps(checkpoint.numbers, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        state.update(name.encode())
        state.update(byte_view(checkpoint.tensors[name]))
    return state.hexdigest()
