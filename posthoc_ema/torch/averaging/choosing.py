"""Which kernel updates the averages, by what was asked for, the device and what is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from posthoc_ema.errors import ConfigError
from posthoc_ema.torch.averaging import compiled, eager
from posthoc_ema.torch.averaging.memory import Shelf

KERNELS = ("auto", "eager", "compiled", "triton")


class Kernel(Protocol):
    """What updates the averages of one shelf."""

    def update(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        seed: int,
        source: int,
        changed: bool,
    ) -> None:
        """One update in place: a[p] <- a[p] + weights[p] (parameter - a[p]).

        Args:
            tensors: the parameters in the order of the shelf.
            weights: 1 - beta of each profile.
            seed: of stochastic rounding.
            source: which of several sets of tensors that take turns this is.
            changed: its tensors are others than last time.
        """


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run on the processor, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def choose(kernel: str, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that does what was asked for on this device.

    On a processor the compiled kernel is somewhat faster than the eager one (docs/benchmarks) but needs a C++
    compiler and some seconds, so it is never taken unasked.

    Args:
        kernel: one of KERNELS.
        dtype: of the averages.
        device: where they live.

    Raises:
        ConfigError: "triton" was asked for where it cannot run.
    """
    if kernel == "auto":
        installed = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return "triton" if installed else "eager"
    if kernel == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("kernel='triton' needs the package triton, which is not installed.")
        if device.type != "cuda" and not triton_is_interpreted():
            raise ConfigError(
                f"kernel='triton' needs averages on a CUDA device, these are on {str(device)!r}. Leave "
                "the kernel at 'auto'."
            )
    if kernel == "compiled" and dtype != torch.float32:
        return "eager"  # torch.compile draws random numbers from the sequence of the training
    return kernel


def new_kernel(
    kernel: str,
    parameters: Mapping[str, torch.Tensor],
    indices: Sequence[int],
    num_profiles: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Shelf, Kernel]:
    """Averages of parameters on one device, all zero, and what updates them; see `Shelf`.

    Raises:
        ConfigError: see `choose`.
    """
    chosen = choose(kernel, dtype, device)
    if chosen == "triton":
        from posthoc_ema.torch.averaging import triton_kernel

        shelf = Shelf(parameters, indices, num_profiles, dtype, device, triton_kernel.SMALL, 16)
        return shelf, triton_kernel.TritonKernel(shelf)
    if chosen == "compiled":
        shelf = Shelf(parameters, indices, num_profiles, dtype, device, compiled.SMALL, 1)
        return shelf, compiled.CompiledKernel(shelf, {p.dtype for p in parameters.values()})
    shelf = Shelf(parameters, indices, num_profiles, dtype, device, eager.SMALL, 1)
    return shelf, eager.EagerKernel(shelf)
