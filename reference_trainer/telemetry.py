"""Training dynamics, measured now and then: magnitudes of activations and weights, gradients, updates.

A measurement follows an optimizer step. It takes one forward pass of a few images without gradients, and
norms of what the step has left: no copy of the weights, and nothing waits for the device until the numbers
are read. Training is not touched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_trainer.distributed import DistributedContext
from reference_trainer.gradients import StepInput
from reference_trainer.parallel import is_cut, is_sharded, local
from reference_trainer.precond import Precond

PROBE = 32
"""Images of the forward pass in which activations are measured, over all processes."""

Dynamics = dict[str, dict[str, float]]

_BLOCK = re.compile(r"(?:net\.)?((?:enc|dec)\.[^.]+|[^.]+)")
_MEASURED = re.compile(r"net\.((?:enc|dec)\.[^.]+|stem|out)")
_RESOLUTION = re.compile(r"\br(\d+)_")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Sums of squares on the device, and what they are of.

    Attributes:
        squares: float64 1-d, of this process: activations (means of squares), then weights, updates and
            gradients.
        parts: 1 where the processes' numbers add up (shards), and elsewhere the share of each that makes
            their mean.
        blocks: names of the blocks whose activations come first.
        parameters: names of the parameters.
        sizes: numbers of elements of the parameters.
        matrices: whether each is a weight, and neither a gain nor a bias.
    """

    squares: Tensor
    parts: tuple[float, ...]
    blocks: tuple[str, ...]
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    matrices: tuple[bool, ...]


def measure(
    network: Precond,
    optimizer: torch.optim.Adam,
    given: StepInput,
    step: int,
    ranks: DistributedContext,
) -> Measurement:
    """Measure after an optimizer step; all processes together.

    Args:
        network: the network.
        optimizer: Adam after the step, the gradients still there.
        given: what the step was trained on.
        step: number of optimizer steps so far.
        ranks: the processes.
    """
    activations = activation_squares(network, given, max(1, PROBE // ranks.world_size))
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    updates = {id(p): u for p, u in _updates(optimizer, step)}
    zero = torch.zeros((), device=ranks.device)
    kinds: tuple[Callable[[nn.Parameter], Tensor | None], ...] = (
        _square,
        lambda p: updates.get(id(p)),
        lambda p: None if p.grad is None else _square(p.grad),
    )
    rows = [[zero if (s := kind(p)) is None else s for _, p in named] for kind in kinds]
    # What all processes hold alike counts once; shards add up.
    share = 1 / ranks.world_size
    of_parameters = [1.0 if is_cut(p) else share for _, p in named]
    every = [*activations.values(), *(square for row in rows for square in row)]
    return Measurement(
        torch.stack(every).to(torch.float64),
        (*[share] * len(activations), *of_parameters * len(kinds)),
        tuple(activations),
        tuple(name for name, _ in named),
        tuple(p.numel() for _, p in named),
        tuple(p.ndim >= 2 for _, p in named),
    )


def _square(tensor: Tensor) -> Tensor:
    """Sum of the squares of what this process holds of a tensor, float32 0-d."""
    return torch.linalg.vector_norm(local(tensor), dtype=torch.float32).square()


def _updates(optimizer: torch.optim.Adam, step: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with the squared size of its last update, computed anew from Adam's moments.

    The update is lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); the weights before the step
    need not be kept for it.
    """
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                m, v = local(state["exp_avg"]), local(state["exp_avg_sq"])
                scaled = m / (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
                factor = group["lr"] / (1 - beta1**step)
                yield parameter, _square(scaled) * factor**2


@torch.no_grad()
def activation_squares(network: Precond, given: StepInput, count: int) -> dict[str, Tensor]:
    """Mean square of the output of each block, 0-d tensors on the device.

    Args:
        network: the network; it is called as it is, without compilation or replication around it.
        given: images, labels and noise.
        count: so many of these images, the first ones.
    """
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
            squares[name] = output.detach().to(torch.float32).square().mean()

        return keep

    images, labels, sigma, noise = given.part(0, count)
    with contextlib.ExitStack() as stack, _evaluating(network):
        for name, module in network.named_modules():
            match = _MEASURED.fullmatch(name)
            if match:
                stack.callback(module.register_forward_hook(hook(match[1])).remove)
        network(images + noise, sigma, labels)
    if is_sharded(network):
        network.reshard()  # type: ignore[operator]  # no backward pass follows, which would do it
    return squares


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout, whose random numbers belong to training."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def read(measurement: Measurement, ranks: DistributedContext) -> Dynamics:
    """The numbers of a measurement; all processes together. Waits for the device.

    Returns:
        Name of what was measured -> block (or resolution, or "all") -> number:
        "activations" root mean square of a block's output, "activations_by_resolution" the mean of
        these; "weights" root mean square of a block's weights (gains and biases left out), also by
        resolution; "updates" size of the last update of these weights relative to the weights, the
        effective learning rate; "gradients" norm of the gradient of a block's parameters.
    """
    parts = torch.tensor(measurement.parts, dtype=torch.float64)
    values = ranks.sum_(measurement.squares.cpu() * parts).tolist()
    activations, rest = values[: len(measurement.blocks)], values[len(measurement.blocks) :]
    count = len(measurement.parameters)
    weights, updates, gradients = (rest[i * count : (i + 1) * count] for i in range(3))
    blocks = [block_of(name) for name in measurement.parameters]
    matrices = [i for i in range(count) if measurement.matrices[i]]

    def totals(numbers: Sequence[float], keys: Sequence[str | None]) -> dict[str, float]:
        found: dict[str, float] = {}
        for i in matrices:
            key = keys[i]
            if key is not None:
                found[key] = found.get(key, 0.0) + numbers[i]
        return found

    levels = [resolution_of(block) for block in blocks]
    every: list[str | None] = ["all"] * count
    rms = dict(zip(measurement.blocks, (a**0.5 for a in activations), strict=True))
    by_block = totals(weights, blocks)
    sizes, level_sizes = totals(measurement.sizes, blocks), totals(measurement.sizes, levels)
    by_level = totals(weights, levels)
    moved = totals(updates, blocks) | totals(updates, every)
    against = by_block | totals(weights, every)
    squares: dict[str, float] = {"all": sum(gradients)}
    for block, square in zip(blocks, gradients, strict=True):
        squares[block] = squares.get(block, 0.0) + square
    return {
        "activations": rms,
        "activations_by_resolution": _mean_by_resolution(rms),
        "weights": {k: (v / sizes[k]) ** 0.5 for k, v in by_block.items()},
        "weights_by_resolution": {k: (v / level_sizes[k]) ** 0.5 for k, v in by_level.items()},
        "updates": {k: (v / against[k]) ** 0.5 for k, v in moved.items() if against[k]},
        "gradients": {k: v**0.5 for k, v in squares.items()},
    }


def _mean_by_resolution(values: dict[str, float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for block, value in values.items():
        level = resolution_of(block)
        if level is not None:
            found.setdefault(level, []).append(value)
    return {level: sum(v) / len(v) for level, v in found.items()}


def block_of(parameter: str) -> str:
    """The block of a parameter.

    Example:
        >>> block_of("net.enc.r8_block0.branch.conv0.weight"), block_of("net.stem.weight")
        ('enc.r8_block0', 'stem')
    """
    match = _BLOCK.match(parameter)
    assert match is not None
    return match[1]


def resolution_of(block: str) -> str | None:
    """The resolution of a block, if its name tells.

    Example:
        >>> resolution_of("enc.r8_block0")
        '8'
    """
    match = _RESOLUTION.search(block)
    return match[1] if match else None
