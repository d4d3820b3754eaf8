"""Sums of stored tiles with PyTorch, on the processor or on a device: see `synthesis.arithmetic`.

PyTorch widens half precision several times faster than NumPy, and its products run in the thread that
asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from posthoc_ema.codecs import AnyArray, Float32Array, storage_dtype
from posthoc_ema.errors import ConfigError

CHUNK_BYTES = 1 << 20
"""Widened values that are in work at once on the processor: what a core's own cache holds."""
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
        self._widened = torch.empty(0, device="cpu")
        torch.set_num_threads(1)  # of this thread: the files are what is spread over threads

    def stack(self, dtype: str, rows: int, width: int) -> AnyArray:
        """Memory for stored tiles, (rows, width), that `add` takes."""
        nbytes = rows * width * storage_dtype(dtype).itemsize
        pinned = self._device.type == "cuda"
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        return memory.numpy().view(storage_dtype(dtype)).reshape(rows, width)

    def weights(self, values: Float32Array) -> torch.Tensor:
        """Weights as `add` and `derive` take them."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def sums(self, rows: int, width: int) -> torch.Tensor:
        """Memory for sums, (rows, width)."""
        return torch.empty((rows, width), dtype=torch.float32, device=self._device)

    def add(
        self, sums: torch.Tensor, weights: torch.Tensor, stack: AnyArray, dtype: str, first: bool
    ) -> None:
        """Set sums = (0 if first else sums) + weights @ stack, see `Arithmetic.add`."""
        stored = _from_numpy(stack, dtype)
        rows, length = stored.shape
        sums = sums[:, :length]
        beta = 0.0 if first else 1.0
        if not self._on_cpu:
            values = stored.to(self._device, non_blocking=False).float()
            torch.addmm(sums, weights, values, beta=beta, out=sums)
            return
        if dtype == "float32":
            torch.addmm(sums, weights, stored, beta=beta, out=sums)
            return
        width = max(CHUNK_BYTES // 4 // rows // 16 * 16, 256)
        widened = self._buffer(rows, width)
        single = len(sums) == 1
        for part, total in zip(stored.split(width, 1), sums.split(width, 1), strict=True):
            values = widened[:, : part.shape[1]]
            values.copy_(part)
            if single:
                torch.addmv(total[0], values.t(), weights[0], beta=beta, out=total[0])
            else:
                torch.addmm(total, weights, values, beta=beta, out=total)

    def _buffer(self, rows: int, width: int) -> torch.Tensor:
        """Widened values; rows 16 elements apart, since powers of two collide in the cache."""
        if len(self._widened) < rows or self._widened.shape[1] < width:
            self._widened = torch.empty((rows, width + 16), dtype=torch.float32, device="cpu")
        return self._widened[:rows, :width]

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
