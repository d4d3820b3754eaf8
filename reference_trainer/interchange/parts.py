"""Which tensor of a published network plays which part, told from shapes and from the paths of blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posthoc_ema import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
_BLOCK = re.compile(r"(?P<path>(?:.*?\.)??[^.]*?(?P<side>\d+)x(?P=side)(?!\d)[^.]*)\..+")
_SCALAR = ((), (1,))


def unlike(what: str) -> ConfigError:
    """The error that a network is not one of EDM2's config G; `what` says why."""
    return ConfigError(
        f"this is not a network of EDM2's config G: {what}. Without --as-trainer it is converted under "
        "its own names."
    )


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The tensors of one residual block.

    Attributes:
        path: what their names have in common.
        resolution: the side that the path names.
        out_channels: channels at the exit.
        tensors: part -> name; "gain", "emb", "conv0", "conv1" and, where the block has them, "skip",
            "qkv" and "proj".
    """

    path: str
    resolution: int
    out_channels: int
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a network.

    Attributes:
        blocks: the residual blocks in order, encoder first.
        stem: the input convolution.
        out: the output convolution.
        out_gain: its gain.
        noise: the linear layer of the noise level.
        label: that of the class label, None without classes.
        fourier: frequencies and phases of the noise level's features.
        logvar: the linear layer of the uncertainty.
        logvar_fourier: frequencies and phases of its features.
    """

    blocks: tuple[BlockParts, ...]
    stem: str
    out: str
    out_gain: str
    noise: str
    label: str | None
    fourier: tuple[str, str]
    logvar: str
    logvar_fourier: tuple[str, str]


def find_parts(shapes: Shapes) -> Parts:
    """Give every tensor its part.

    Args:
        shapes: name -> shape of all tensors, in the file's order.

    Raises:
        ConfigError: a part is missing, or a tensor has none.
    """
    groups: dict[str, list[str]] = {}
    for name in shapes:
        match = _BLOCK.fullmatch(name)
        groups.setdefault(match["path"] if match else "", []).append(name)
    # The input convolution may have a path like a block's, but is alone there.
    inside = {path: names for path, names in groups.items() if path and len(names) > 1}
    blocks = tuple(_block(path, names, shapes) for path, names in inside.items())
    if not blocks:
        raise unlike("no part of a name says a resolution, as 8x8 does")
    rest = [name for name in shapes if not any(name in names for names in inside.values())]
    return _rest(rest, shapes, blocks)


def _block(path: str, names: Sequence[str], shapes: Shapes) -> BlockParts:
    match = _BLOCK.fullmatch(names[0])
    assert match is not None, "it was grouped by this match"
    convs = [name for name in names if shapes[name][2:] == (3, 3)]
    if len(convs) != 2:
        raise unlike(f"its block {path!r} has {len(convs)} convolutions of 3x3, not 2")
    out = shapes[convs[0]][0]
    tensors = {"conv0": convs[0], "conv1": convs[1]}
    for name in names:
        if name not in convs:
            part = _part_of_block(shapes[name], out)
            if part is None or part in tensors:
                raise unlike(f"{name!r} of shape {shapes[name]} has no place in a block")
            tensors[part] = name
    return BlockParts(path, int(match["side"]), out, tensors)


def _part_of_block(shape: tuple[int, ...], out: int) -> str | None:
    if shape in _SCALAR:
        return "gain"
    if len(shape) == 2:
        return "emb"
    if shape[2:] != (1, 1):
        return None
    return {(3 * out, out): "qkv", (out, out): "proj"}.get((shape[0], shape[1]), "skip")


def _rest(names: Sequence[str], shapes: Shapes, blocks: tuple[BlockParts, ...]) -> Parts:
    """The parts outside the blocks."""
    convs = [name for name in names if shapes[name][2:] == (3, 3)]
    # One takes the images' channels and a constant one, the other gives the images' channels.
    pairs = [(a, b) for a in convs for b in convs if a != b and shapes[a][1] == shapes[b][0] + 1]
    linear = [name for name in names if len(shapes[name]) == 2]
    logvar = [name for name in linear if shapes[name][0] == 1]
    embedding = [name for name in linear if shapes[name][0] > 1]
    # The embedding is four times as wide as the features of the noise level.
    noise = [name for name in embedding if shapes[name][0] == 4 * shapes[name][1]]
    gains = [name for name in names if shapes[name] in _SCALAR]
    found = {
        "an input and an output convolution": pairs,
        "a linear layer of the noise level": noise,
        "a gain of the output": gains,
        "a linear layer of the uncertainty": logvar,
    }
    for what, candidates in found.items():
        if not candidates:
            raise unlike(f"it lacks {what}")
    fourier, logvar_fourier = _fourier(names, shapes, blocks[0].path)
    labels = [name for name in embedding if name != noise[0]]
    parts = Parts(
        blocks,
        *pairs[0],
        gains[0],
        noise[0],
        labels[0] if labels else None,
        fourier,
        logvar[0],
        logvar_fourier,
    )
    placed = {*pairs[0], gains[0], noise[0], *labels[:1], *fourier, logvar[0], *logvar_fourier}
    if spare := [name for name in names if name not in placed]:
        raise unlike(f"{spare[0]!r} of shape {shapes[spare[0]]} has no place in it")
    return parts


def _fourier(
    names: Sequence[str], shapes: Shapes, block: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Frequencies and phases of the embedding, and those of the uncertainty, which is further away."""
    modules: dict[str, list[str]] = {}
    for name in names:
        if len(shapes[name]) == 1 and shapes[name] not in _SCALAR:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    near = sorted(modules, key=lambda path: -_common(path, block))
    pairs = [(modules[path][0], modules[path][-1]) for path in near]
    if len(pairs) != 2 or any(len(modules[path]) != 2 for path in near):
        raise unlike("it lacks the frequencies and phases of two sets of Fourier features")
    return pairs[0], pairs[1]


def _common(a: str, b: str) -> int:
    """Number of components that two paths begin with in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
