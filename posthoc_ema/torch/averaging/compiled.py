"""The update as one loop that torch.compile writes: all profiles while a parameter passes by.

One function for each number of profiles and dtype of the parameters, over flat memory of any length:
nothing is compiled again for other shapes. The C++ that comes out needs a compiler on the machine; where
there is none the eager kernel stands in.
"""

from __future__ import annotations

import functools
import logging
import types
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch

from posthoc_ema.torch.averaging.eager import EagerKernel
from posthoc_ema.torch.averaging.gathering import Gathering
from posthoc_ema.torch.averaging.memory import Shelf

_log = logging.getLogger("posthoc_ema")

SMALL = 131_072
"""Parameters of at most so many elements are gathered: a call costs as much as copying that many."""
_Update = Callable[[list[torch.Tensor], torch.Tensor, list[torch.Tensor]], None]


def _update(
    averages: list[torch.Tensor], parameter: torch.Tensor, weights: list[torch.Tensor]
) -> None:
    """Set a <- a + w (parameter - a) for each profile."""
    theta = parameter.to(torch.float32)
    for average, weight in zip(averages, weights, strict=True):
        average.copy_(average + weight * (theta - average))


@functools.cache
def compiled_update(num_profiles: int, dtype: torch.dtype, device: str) -> _Update:
    """The compiled update for parameters of one dtype; it has run once, on numbers of its own.

    Code of its own for each: torch.compile counts, and limits, what it compiles for one function.

    Raises:
        Exception: whatever the compiler says, for example that there is no C++ compiler.
    """
    code = _update.__code__.replace(co_name=f"update_{num_profiles}_{dtype}".replace(".", "_"))
    function = types.FunctionType(code, globals())
    update: _Update = torch.compile(function, dynamic=True, fullgraph=True)
    averages = [torch.zeros(48, dtype=torch.float32, device=device) for _ in range(num_profiles)]
    weights = [torch.tensor(0.25, dtype=torch.float32, device="cpu") for _ in range(num_profiles)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about parts of PyTorch
        update(averages, torch.zeros(48, dtype=dtype, device=device), weights)
    return update


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that shares no storage object with others.

    torch.compile would treat the rows of one tensor as one argument that is written twice, and copy it.
    """
    return torch.utils.dlpack.from_dlpack(tensor)


class CompiledKernel:
    """Updates the averages of a shelf by compiled loops; float32 averages only.

    Args:
        shelf: made with `small=SMALL` and `alignment=1`.
        dtypes: of the parameters, to compile for now; others are compiled for when they come.
    """

    def __init__(self, shelf: Shelf, dtypes: Iterable[torch.dtype]) -> None:
        self._shelf = shelf
        self._rows = [[apart(row) for row in region.rows] for region in shelf.regions]
        self._gatherings = {
            id(region): Gathering(region, parallel=True)
            for region in shelf.regions
            if not region.is_single
        }
        self._eager = EagerKernel(shelf)
        self._eager_knows: set[int] = set()
        self._works = self._compile(dtypes)

    def update(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        seed: int,
        source: int,
        changed: bool,
    ) -> None:
        """One update, see `EagerKernel.update`.

        The first updates have weights near 1: for those `lerp_` is exact, and the compiled form is not.
        """
        if changed:
            self._eager_knows.clear()
            self._works = self._works and self._compile(tensor.dtype for tensor in tensors)
            self._prepare(tensors, source)
        if not self._works or max(weights) >= 0.5:
            new = source not in self._eager_knows
            self._eager.update(tensors, weights, seed, source, new)
            self._eager_knows.add(source)
            return
        # The device is named here and above: torch.set_default_device may name another.
        scalars = [torch.tensor(weight, dtype=torch.float32, device="cpu") for weight in weights]
        for region, rows in zip(self._shelf.regions, self._rows, strict=True):
            if region.is_single:
                theta = region.slots[0].flat(tensors[region.indices[0]])
            else:
                theta = self._gatherings[id(region)].values(source)
            update = compiled_update(len(rows), theta.dtype, self._shelf.device.type)
            update(rows, theta, scalars)

    def _prepare(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        for region in self._shelf.regions:
            if not region.is_single:
                mine = [tensors[i] for i in region.indices]
                self._gatherings[id(region)].prepare(mine, source)

    def _compile(self, dtypes: Iterable[torch.dtype]) -> bool:
        """Compile for these dtypes before an average is touched; whether that works here."""
        try:
            for dtype in {torch.float32, *dtypes}:  # gathered parameters are float32
                compiled_update(self._shelf.num_profiles, dtype, self._shelf.device.type)
        except Exception as error:  # of many kinds: compilers, back ends, missing packages
            _log.warning(
                "kernel='compiled' does not work here (%s): the averages are updated by the eager kernel.",
                " ".join(str(error).split())[:200] or type(error).__name__,
            )
            return False
        return True
