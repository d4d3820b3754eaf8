"""EDM2 networks of the published form, read into the network of this trainer.

Network snapshots of EDM2 arrive from `posthoc_ema.importers` as named tensors. The network is config G,
the same function as ours, so what is left is to find out which tensor plays which part. Names are trusted
with two things only: tensors of a block have the block's path in common, and a block says its resolution
there, as in `8x8`. The parts follow from the shapes and, where two shapes agree, from the order in the
file, which is the order in which a block uses them. Every tensor must find its place; nothing is guessed.

Three things are stored differently there:

- queries, keys and values are interleaved: head, channel of the head, then which of the three;
- frequencies and phases of the Fourier features hold the factor 2 pi, that is, angles and not turns;
- buffers are rounded to float16 with the rest of a snapshot. They become float32 here, because what is
  left of the angles after a division by 2 pi should not be rounded a second time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from posthoc_ema import ConfigError
from posthoc_ema.codecs import FLOATING, AnyArray, decode
from posthoc_ema.importers import ImportPlan
from posthoc_ema.importers.plans import Contents, SourceFile
from posthoc_ema.importers.tensors import LazyTensor
from posthoc_ema.snapshot import label_of
from posthoc_ema.tensor_files import TensorFileWriter
from reference_trainer.config import DataConfig, NetworkConfig, TrainConfig
from reference_trainer.interchange.parts import Parts, Shapes, find_parts, unlike
from reference_trainer.precond import Precond
from reference_trainer.presets import PRESETS
from reference_trainer.topology import plan_unet

METADATA_KEY = "reference_trainer"
_FREQS, _PHASES = "freqs", "phases"
_LARGEST_PHASE = 6.2853  # 2 pi, rounded up to float16


@dataclass(frozen=True)
class PublishedNetwork:
    """A network of the published form, understood.

    Attributes:
        config: a configuration whose network it fits; a preset's where one has this network.
        sources: our name of each tensor -> theirs, in the order of our state dict.
    """

    config: TrainConfig
    sources: dict[str, str]


def recognise(shapes: Shapes) -> PublishedNetwork:
    """Find the configuration of a network of the published form and the place of each of its tensors.

    Args:
        shapes: name -> shape of all parameters and buffers, in the file's order.

    Raises:
        ConfigError: it is no network of EDM2's config G; says what does not fit.
    """
    parts = find_parts(shapes)
    network = _network_config(parts, shapes)
    config = _config(network)
    sources = _sources(parts, config)
    with torch.device("meta"):
        own = Precond(config.network, config.data).state_dict()
    for name, tensor in own.items():
        theirs = sources.get(name)
        if theirs is None or not _fits(shapes[theirs], tuple(tensor.shape)):
            found = "nothing" if theirs is None else f"{theirs!r} of shape {shapes[theirs]}"
            raise unlike(f"for {name!r} of shape {tuple(tensor.shape)} it holds {found}")
    spare = set(shapes) - set(sources.values())
    if spare or len(sources) != len(own):
        raise unlike(f"the tensor {min(spare or set(sources) - set(own))!r} has no place in it")
    return PublishedNetwork(config, {name: sources[name] for name in own})


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Whether a tensor can be taken: of the same shape, or a scalar however it is written."""
    return theirs == ours or math.prod(theirs) == math.prod(ours) == 1


def as_trainer(plan: ImportPlan) -> ImportPlan:
    """The same import with the tensors of this trainer's network, and its configuration as metadata.

    Args:
        plan: of EDM2 network snapshots, from `posthoc_ema.importers.plan_import`.

    Returns:
        A plan for `posthoc_ema.importers.write_import`, whose store works like one of a training run.

    Raises:
        ConfigError: the files are not EDM2's, or hold another network than config G.
    """
    if plan.kind != "edm2":
        raise ConfigError(
            f"files of {plan.kind} hold no network that this trainer knows; only EDM2's can become one. "
            "Convert them without --as-trainer."
        )
    published = recognise({name: entry.shape for name, entry in plan.table.entries.items()})
    files = tuple(
        dataclasses.replace(file, open=functools.partial(_open, file, published))
        for file in plan.files
    )
    with files[-1].open() as found:
        table = found.table()
    size = published.config.name
    note = f"the network is that of preset {size}." if size in PRESETS else _describe(published)
    return dataclasses.replace(
        plan,
        files=files,
        table=table,
        metadata={**plan.metadata, METADATA_KEY: published.config.to_json()},
        notes=(*plan.notes, note),
    )


def write_weights(plan: ImportPlan, path: Path) -> None:
    """Write the one average of a plan as a weights file, as `phema synth` writes them.

    Args:
        plan: from `as_trainer`, of a single file.
        path: the safetensors file to make or replace.

    Raises:
        ConfigError: the plan holds several averages.
        SnapshotWriteError: the file could not be written.
    """
    if len(plan.files) != 1:
        raise ConfigError(
            f"{len(plan.files)} averages do not fit into the file {path}. Give a folder with --out: it "
            "becomes a store, of which `phema synth` makes any average."
        )
    (file,) = plan.files
    origin = {"source": file.path.name, "time": str(file.time), "profile": label_of(file.profile)}
    with file.open() as found:
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()]
        with TensorFileWriter(path, layout, {**plan.metadata, **origin}) as writer:
            for name, tensor in found.tensors.items():
                writer.write(name, tensor.read())


# ---- the configuration


def _network_config(parts: Parts, shapes: Shapes) -> NetworkConfig:
    """The network's shape, from the shapes of its tensors."""
    levels = sorted({block.resolution for block in parts.blocks}, reverse=True)
    # Per level num_blocks in the encoder and one more in the decoder; one that halves or doubles per
    # level but the finest on each side, and two at the coarsest: (2 num_blocks + 3) per level.
    num_blocks, rest = divmod(len(parts.blocks) - 3 * len(levels), 2 * len(levels))
    if rest or num_blocks < 1 or levels != [levels[0] >> i for i in range(len(levels))]:
        raise unlike(f"it has {len(parts.blocks)} blocks at the resolutions {levels}")
    encoder = parts.blocks[: len(levels) * (num_blocks + 1) - 1]
    last = {block.resolution: block for block in encoder}
    channels = {resolution: block.out_channels for resolution, block in last.items()}
    base = shapes[parts.noise][1]
    if sorted(channels, reverse=True) != levels or any(n % base for n in channels.values()):
        raise unlike(f"its levels have {channels} channels, its noise embedding takes {base}")
    return NetworkConfig(
        img_resolution=levels[0],
        img_channels=shapes[parts.out][0],
        label_dim=shapes[parts.label][1] if parts.label else 0,
        model_channels=base,
        channel_mult=tuple(channels[resolution] // base for resolution in levels),
        num_blocks=num_blocks,
        attn_resolutions=tuple(r for r in levels if "qkv" in last[r].tensors),
        logvar_channels=shapes[parts.logvar][1],
    )


def _config(network: NetworkConfig) -> TrainConfig:
    """The preset that has this network, or the nearest one with the network in its place."""
    presets = [make() for name, make in PRESETS.items() if name.startswith("edm2-")]
    for preset in presets:
        shape = dataclasses.replace(preset.network, dropout=0.0, dtype="float32")
        if shape == network:
            return preset
    like = next((p for p in presets if p.network.img_channels == network.img_channels), None)
    if like is not None:
        return dataclasses.replace(like, network=network, name="custom")
    unknown = DataConfig(name="unknown", kind="latents")
    return dataclasses.replace(presets[0], network=network, data=unknown, name="custom")


def _describe(published: PublishedNetwork) -> str:
    network = published.config.network
    text = (
        f"no preset has this network of {network.model_channels} base channels, "
        f"{network.img_resolution}x{network.img_resolution}x{network.img_channels}"
    )
    if published.config.data.name == "unknown":
        return f"{text}; how its data were scaled is unknown, mean 0 and scale 1 are taken."
    return f"{text}; its data are taken to be scaled as {published.config.data.name}."


# ---- the tensors


def _sources(parts: Parts, config: TrainConfig) -> dict[str, str]:
    """Our names to theirs, as far as there is anything."""
    plan = plan_unet(config.network)
    paths = [f"net.enc.{block.name}" for block in plan.encoder]
    paths += [f"net.dec.{block.name}" for block in plan.decoder]
    found = {
        "net.embedding.features.freqs": parts.fourier[0],
        "net.embedding.features.phases": parts.fourier[1],
        "net.embedding.noise.weight": parts.noise,
        "net.stem.weight": parts.stem,
        "net.out.weight": parts.out,
        "net.out_gain": parts.out_gain,
        "logvar_features.freqs": parts.logvar_fourier[0],
        "logvar_features.phases": parts.logvar_fourier[1],
        "logvar.weight": parts.logvar,
    }
    if parts.label is not None:
        found["net.embedding.label.weight"] = parts.label
    for path, block in zip(paths, parts.blocks, strict=True):
        if f".r{block.resolution}_" not in f"{path}_":
            raise unlike(f"its block {block.path!r} stands where {path.rpartition('.')[2]} belongs")
        found |= {f"{path}.{_IN_BLOCK[part]}": name for part, name in block.tensors.items()}
    return found


_IN_BLOCK = {
    "gain": "branch.emb_gain",
    "emb": "branch.emb.weight",
    "conv0": "branch.conv0.weight",
    "conv1": "branch.conv1.weight",
    "skip": "conv_skip.weight",
    "qkv": "attention.qkv.weight",
    "proj": "attention.proj.weight",
}


@contextlib.contextmanager
def _open(file: SourceFile, published: PublishedNetwork) -> Iterator[Contents]:
    """The contents of a file under our names."""
    width = published.config.network.channels_per_head
    with file.open() as theirs:
        tensors: dict[str, LazyTensor] = {}
        for name, source in published.sources.items():
            tensor = theirs.tensors[source]
            if name.endswith(".qkv.weight"):
                ordered = functools.partial(sort_qkv, width)
                tensors[name] = _Changed(tensor, tensor.dtype, ordered, tensor.shape)
            elif name.endswith(f".{_FREQS}"):
                angles = theirs.tensors[published.sources[name.replace(_FREQS, _PHASES)]]
                tensors[name] = _turns(tensor, angles)
            elif name.endswith(f".{_PHASES}"):
                tensors[name] = _turns(tensor, tensor)
            elif name.endswith("_gain"):
                one = functools.partial(np.reshape, shape=(1,))
                tensors[name] = _Changed(tensor, tensor.dtype, one, (1,))
            else:
                tensors[name] = tensor
        copied = frozenset(name for name in tensors if name.endswith((_FREQS, _PHASES)))
        yield Contents(tensors, copied)


@dataclass(frozen=True, eq=False)
class _Changed:
    """A tensor that is changed when it is read.

    Attributes:
        source: the tensor in the file.
        dtype: dtype of the result.
        change: from the bits of one to those of the other.
        shape: shape of the result.
    """

    source: LazyTensor
    dtype: str
    change: Callable[[AnyArray], AnyArray]
    shape: tuple[int, ...]

    def read(self) -> AnyArray:
        """The changed bits."""
        return self.change(self.source.read())


def sort_qkv(channels_per_head: int, weight: AnyArray) -> AnyArray:
    """Outputs ordered by head, channel, and which of query, key, value: ours go by which, head, channel.

    Args:
        channels_per_head: channels of a head, as many as there are if that is fewer.
        weight: `[3 c, c, 1, 1]` with c channels.

    Example:
        >>> sort_qkv(2, np.arange(6).reshape(6, 1)).ravel().tolist()
        [0, 3, 1, 4, 2, 5]
    """
    channels = weight.shape[0] // 3
    heads = max(1, channels // channels_per_head)
    rows = weight.reshape(heads, channels // heads, 3, -1)
    return np.ascontiguousarray(rows.transpose(2, 0, 1, 3)).reshape(weight.shape)


def _turns(tensor: LazyTensor, phases: LazyTensor) -> _Changed:
    """Frequencies or phases in turns, float32.

    Phases are uniform over one turn: if one exceeds 1, they are angles in radians.
    """
    values = _float32(phases, phases.read())
    if values.size and not 0 <= values.min() <= values.max() <= _LARGEST_PHASE:
        raise unlike(
            f"the phases of its features reach from {values.min():.4g} to {values.max():.4g}"
        )
    unit = 2 * math.pi if values.max(initial=0.0) > 1 else 1.0

    def change(bits: AnyArray) -> AnyArray:
        return np.asarray(_float32(tensor, bits) / np.float32(unit))

    return _Changed(tensor, "float32", change, tensor.shape)


def _float32(tensor: LazyTensor, bits: AnyArray) -> AnyArray:
    return decode(bits, tensor.dtype) if tensor.dtype in FLOATING else bits.astype(np.float32)
