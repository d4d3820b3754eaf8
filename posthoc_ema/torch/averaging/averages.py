"""The averages of several parameters, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from posthoc_ema.errors import ConfigError, TrackingError
from posthoc_ema.torch.averaging.choosing import KERNELS, Kernel, new_kernel
from posthoc_ema.torch.averaging.layout import signature
from posthoc_ema.torch.averaging.memory import Shelf
from posthoc_ema.torch.averaging.offload import Offload

__all__ = ["DTYPES", "KERNELS", "Averages"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HOST = torch.device("cpu")


class Averages:
    """Averages of several parameters for several profiles; zeros before the first update.

    Args:
        parameters: name -> whole tensor on this process, of any floating dtype.
        num_profiles: averages of each parameter.
        kernel: one of KERNELS. "auto" takes Triton on CUDA devices where it is installed, and PyTorch's
            own operators elsewhere.
        dtype: of the averages, one of DTYPES; bfloat16 ones are rounded stochastically.
        device: where they live; None: beside each parameter, wherever it moves. "cpu": in the host's
            memory, updated by a thread while training goes on.

    Raises:
        ConfigError: an argument is wrong, or the kernel cannot run there.

    Example:
        >>> averages = Averages({"w": torch.zeros(2)}, 2)
        >>> averages.update({"w": torch.tensor([1.0, 2.0])}, [1.0, 0.5])
        >>> averages.stack("w").tolist()
        [[1.0, 2.0], [0.5, 1.0]]
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        num_profiles: int,
        *,
        kernel: str = "auto",
        dtype: str = "float32",
        device: torch.device | str | None = None,
    ) -> None:
        if kernel not in KERNELS:
            raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if device is not None and torch.device(device).type != "cpu":
            raise ConfigError(
                f"device must be None or 'cpu', got {str(device)!r}: averages live beside the parameters "
                "or in the host's memory."
            )
        self._kernel = kernel
        self._dtype = DTYPES[dtype]
        self._num_profiles = num_profiles
        self._names = list(parameters)
        self._shapes = [tensor.shape for tensor in parameters.values()]
        self._num_updates = 0
        self._broken = False
        self._devices: list[torch.device] = []
        self._shelves: list[tuple[Shelf, Kernel]] = []
        self._shelf_of: dict[str, Shelf] = {}
        self._signatures: dict[int, tuple[list[object], ...]] = {}
        self._offload = None if device is None else Offload(self._run, self._check)
        tensors = list(parameters.values())
        self._arrange(tensors, [t.device if device is None else _HOST for t in tensors])

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters, in their order."""
        return list(self._names)

    @torch.no_grad()
    def update(
        self,
        parameters: Mapping[str, torch.Tensor],
        weights: Sequence[float],
        *,
        seed: int | None = None,
    ) -> None:
        """One update of all averages: a[p] <- a[p] + weights[p] (parameter - a[p]).

        Args:
            parameters: the same names and shapes as at first.
            weights: 1 - beta of each profile.
            seed: stochastic rounding is a function of it: the same state and seed give the same bits,
                so that a resumed run equals an undisturbed one. Another one for each update; the number
                of updates by default.

        Raises:
            TrackingError: names, shapes or dtypes do not fit; or an earlier update was interrupted or
                has failed half way, and the averages are useless.
        """
        if len(weights) != self._num_profiles:
            raise ConfigError(
                f"{self._num_profiles} weights are needed, one for each profile, got {len(weights)}."
            )
        tensors = self._ordered(parameters)
        seed = self._num_updates if seed is None else seed
        self._num_updates += 1
        if self._offload is None:
            self._run(tensors, weights, seed)
        else:
            self._offload.submit(tensors, list(weights), seed)

    def _ordered(self, parameters: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The parameters in our order, if they are those that tracking began with."""
        if parameters.keys() != self._shelf_of.keys():
            name = min(parameters.keys() ^ self._shelf_of.keys())
            raise TrackingError(
                f"parameter {name!r} was {'added' if name in parameters else 'removed'} while it was "
                "tracked. Start a new tracker with a new folder for the changed model."
            )
        return [parameters[name] for name in self._names]

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        for name, shape, tensor in zip(self._names, self._shapes, tensors, strict=True):
            if tensor.shape != shape:
                raise TrackingError(
                    f"parameter {name!r} had shape {tuple(shape)} when tracking began and has "
                    f"{tuple(tensor.shape)} now. Start a new tracker with a new folder for the changed "
                    "model."
                )
            if not tensor.is_floating_point():
                raise TrackingError(
                    f"parameter {name!r} has dtype {tensor.dtype}; averages are defined for floating "
                    "dtypes. Convert it back, or freeze it before tracking."
                )

    @torch.no_grad()
    def _run(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        seed: int,
        source: int = 0,
    ) -> None:
        """Update all shelves. The averages count as broken until that is done."""
        if self._broken:
            raise TrackingError(
                "the averages are not whole: an update was interrupted between two tensors. Resume from "
                "the last checkpoint."
            )
        now = signature(tensors)
        changed = now != self._signatures.get(source)
        if changed:  # what is refused is refused before an average is touched
            self._check(tensors)
            devices = [tensor.device for tensor in tensors]
            if devices != self._devices:
                self._arrange(tensors, devices)
        self._broken = True
        for shelf, kernel in self._shelves:
            mine = [tensors[i] for i in shelf.indices]
            kernel.update(mine, weights, seed, source, changed)
        self._signatures[source] = now
        self._broken = False

    def _arrange(self, tensors: Sequence[torch.Tensor], devices: list[torch.device]) -> None:
        """Put the averages on these devices, one for each parameter; what they hold moves along."""
        before, moved = self._shelf_of, dict[str, Shelf]()
        shelves = []
        for device in dict.fromkeys(devices):
            indices = [i for i, other in enumerate(devices) if other == device]
            shelf, kernel = new_kernel(
                self._kernel,
                {self._names[i]: tensors[i] for i in indices},
                indices,
                self._num_profiles,
                self._dtype,
                device,
            )
            shelves.append((shelf, kernel))
            moved |= dict.fromkeys(shelf.names, shelf)
        for name, shelf in before.items():
            moved[name].stack(name).copy_(shelf.stack(name))
        self._shelves, self._shelf_of, self._devices = shelves, moved, devices

    def stack(self, name: str) -> torch.Tensor:
        """All averages of one parameter, float32, (num_profiles, *shape); a view if they are float32."""
        self.wait()
        return self._shelf_of[name].stack(name).float()

    def average(self, name: str, index: int) -> torch.Tensor:
        """One average of one parameter, float32, (*shape); a view if it is float32."""
        self.wait()
        return self._shelf_of[name].stack(name)[index].float()

    @torch.no_grad()
    def load(self, name: str, stack: torch.Tensor) -> None:
        """Set the averages of one parameter to a copy of `stack`, (num_profiles, *shape).

        Raises:
            TrackingError: `stack` has another shape.
        """
        self.wait()
        held = self._shelf_of[name].stack(name)
        if held.shape != stack.shape:
            raise TrackingError(
                f"the averages of {name!r} have shape {tuple(held.shape)}, got {tuple(stack.shape)}. The "
                "state belongs to another model."
            )
        held.copy_(stack)

    def wait(self) -> None:
        """Wait until updates that run beside the training are done.

        Raises:
            TrackingError: one of them has failed.
        """
        if self._offload is not None:
            self._offload.wait()

    def close(self) -> None:
        """End what runs beside the training; the averages can still be read."""
        if self._offload is not None:
            self._offload.close()
