"""Sums of stored tiles with PyTorch, on the processor or on a device: see `synthesis.arithmetic`.

PyTorch widens half precision several times faster than NumPy, and its products run in the thread that
asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from posthoc_ema.codecs import BLOCK, AnyArray, Float32Array
from posthoc_ema.errors import ConfigError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def check_device(name: str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1".

    Raises:
        ConfigError: PyTorch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be one that PyTorch can use here, got {name!r} ({reason}). Leave it out to "
            "use the processor."
        ) from None
    return device


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in full float32, whatever the program allows its own (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Put the caller's number of threads back: a worker's own choice becomes the default of later ones."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchArithmetic:
    """Sums of tiles with PyTorch. One for each thread.

    Args:
        device: where the sums are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        torch.set_num_threads(1)  # of this thread: the files are what is spread over threads

    def buffer(self, nbytes: int) -> AnyArray:
        """Memory for the bytes of one stored tile, uint8 of shape (nbytes,)."""
        pinned = self._device.type == "cuda"
        memory: AnyArray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        return memory

    def stack(self, rows: int, width: int) -> torch.Tensor:
        """Memory for tiles widened to float32, (rows, width), that `put` and `add` take."""
        # Rows 16 elements apart, since powers of two collide in the cache.
        stack = torch.empty((rows, width + 16), dtype=torch.float32, device=self._device)
        return stack[:, :width]

    def rows(self, stack: torch.Tensor) -> list[Float32Array] | None:
        """The rows of a stack as NumPy's, to write to; None where they are on a device."""
        return list(stack.numpy()) if self._on_cpu else None

    def put(self, stack: torch.Tensor, row: int, stored: AnyArray, dtype: str) -> None:
        """Widen stored bits of a dtype, shape (length,), into a row of a stack."""
        values = _from_numpy(stored, dtype)
        if not self._on_cpu:  # half as many bytes go over the bus when the device widens them
            values = values.to(self._device)
        stack[row, : len(stored)].copy_(values)

    def decode_int8(self, stored: AnyArray, scales: AnyArray, out: Float32Array) -> Float32Array:
        """`codecs.decode_int8_blocks`: the same bits, in half the time."""
        whole, values = len(stored) // BLOCK * BLOCK, torch.from_numpy(out)
        widened = _from_numpy(scales, "bfloat16").float()
        values.copy_(torch.from_numpy(stored))
        values[:whole].view(-1, BLOCK).mul_(widened[: whole // BLOCK, None])
        if whole < len(stored):
            values[whole:].mul_(widened[-1])
        return out

    def weights(self, values: Float32Array) -> torch.Tensor:
        """Weights as `add` and `derive` take them."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def sums(self, rows: int, width: int) -> torch.Tensor:
        """Memory for sums, (rows, width)."""
        return torch.empty((rows, width), dtype=torch.float32, device=self._device)

    def add(
        self,
        sums: torch.Tensor,
        weights: torch.Tensor,
        stack: torch.Tensor,
        length: int,
        first: bool,
    ) -> None:
        """Set sums = (0 if first else sums) + weights @ stack, see `Arithmetic.add`."""
        values, total = stack[: weights.shape[1], :length], sums[:, :length]
        beta = 0.0 if first else 1.0
        if self._on_cpu and len(total) == 1:
            torch.addmv(total[0], values.t(), weights[0], beta=beta, out=total[0])
        else:
            torch.addmm(total, weights, values, beta=beta, out=total)

    def derive(self, sums: torch.Tensor, weights: torch.Tensor, out: Float32Array) -> None:
        """Set out = weights @ sums, see `Arithmetic.derive`."""
        length = out.shape[1]
        target = torch.from_numpy(out)
        if self._on_cpu:
            torch.mm(weights, sums[:, :length], out=target)
        else:
            target.copy_(weights @ sums[:, :length])

    def fetch(self, sums: torch.Tensor, out: Float32Array) -> Float32Array:
        """The sums as NumPy's, in `out` or where they are."""
        if self._on_cpu:
            return sums.numpy()[:, : out.shape[1]]
        torch.from_numpy(out).copy_(sums[:, : out.shape[1]])
        return out


def _from_numpy(stack: AnyArray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":  # NumPy holds its bits as uint16
        return torch.from_numpy(stack.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stack)
