"""The sums of a synthesis: weights times a stack of stored tiles, by NumPy or by PyTorch.

Both give the same results to the rounding of float32. PyTorch is several times faster, and half a second
to import: it is used when it is there already or when there is much to read.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import linalg

from posthoc_ema.codecs import AnyArray, Float32Array, decode, storage_dtype
from posthoc_ema.errors import ConfigError

MUCH = 1 << 30
"""Bytes to read from which importing PyTorch pays."""
BASIS_ERROR = 2.0**-23
"""Error allowed to a target that is made of others, over max |value| * sum |x|: float32's epsilon."""
_MAGNIFIED = 10.0  # how much rounding errors of the basis may grow in the targets made of it
_BASIS_FROM = 8  # targets from which looking for a basis pays
_CHUNK = 1 << 18  # elements that NumPy widens at once: 1 MiB of float32
# Products below this size OpenBLAS leaves to the thread that asks. Its own threads, asked by several at
# once, wait for each other: 31 targets took more than twice as long.
_ALONE = 1 << 18


class Arithmetic(Protocol):
    """Sums of tiles. An object serves one thread; `sums` may go from one thread's to another's."""

    def stack(self, dtype: str, rows: int, width: int) -> AnyArray:
        """Memory for stored tiles, (rows, width), that `add` takes."""
        ...

    def weights(self, values: Float32Array) -> Any:
        """Weights as `add` and `derive` take them."""
        ...

    def sums(self, rows: int, width: int) -> Any:
        """Memory for sums, (rows, width)."""
        ...

    def add(self, sums: Any, weights: Any, stack: AnyArray, dtype: str, first: bool) -> None:
        """Set sums = (0 if first else sums) + weights @ stack.

        Args:
            sums: from `sums`, (num_sums, width).
            weights: from `weights`, (num_sums, rows).
            stack: stored bits, (rows, length), length at most width.
            dtype: dtype name of the stored values.
            first: whether what is in `sums` counts as zero.
        """
        ...

    def derive(self, sums: Any, weights: Any, out: Float32Array) -> None:
        """Set out = weights @ sums, shape (num_targets, length)."""
        ...

    def fetch(self, sums: Any, out: Float32Array) -> Float32Array:
        """The sums as NumPy's, shape of `out`: in `out`, or where they are."""
        ...


class NumpyArithmetic:
    """Sums of tiles with NumPy."""

    def __init__(self) -> None:
        self._widened = np.empty((0, 0), dtype=np.float32)
        self._product = np.empty((0, 0), dtype=np.float32)

    def stack(self, dtype: str, rows: int, width: int) -> AnyArray:
        """Memory for stored tiles, (rows, width), that `add` takes."""
        return np.empty((rows, width), dtype=storage_dtype(dtype))

    def weights(self, values: Float32Array) -> Float32Array:
        """Weights as `add` and `derive` take them."""
        return np.ascontiguousarray(values)

    def sums(self, rows: int, width: int) -> Float32Array:
        """Memory for sums, (rows, width)."""
        return np.empty((rows, width), dtype=np.float32)

    def add(
        self, sums: Float32Array, weights: Float32Array, stack: AnyArray, dtype: str, first: bool
    ) -> None:
        """Set sums = (0 if first else sums) + weights @ stack, see `Arithmetic.add`."""
        rows, length = stack.shape
        step = max(_CHUNK // rows, 256)
        self._widened = _at_least(self._widened, rows, step)
        self._product = _at_least(self._product, len(sums), step)
        width = step if len(sums) == 1 else max(_ALONE // (len(sums) * rows), 64)
        for begin in range(0, length, step):
            part = stack[:, begin : begin + step]
            values = decode(part, dtype, self._widened[:rows, : part.shape[1]])
            total = sums[:, begin : begin + part.shape[1]]
            for i in range(0, part.shape[1], width):
                some = total[:, i : i + width]
                product = some if first else self._product[: len(sums), : some.shape[1]]
                np.matmul(weights, values[:, i : i + width], out=product)
                if not first:
                    some += product

    def derive(self, sums: Float32Array, weights: Float32Array, out: Float32Array) -> None:
        """Set out = weights @ sums, see `Arithmetic.derive`."""
        np.matmul(weights, sums[:, : out.shape[1]], out=out)

    def fetch(self, sums: Float32Array, out: Float32Array) -> Float32Array:
        """The sums, where they are."""
        return sums[:, : out.shape[1]]


def _at_least(buffer: Float32Array, rows: int, width: int) -> Float32Array:
    if buffer.shape[0] >= rows and buffer.shape[1] >= width:
        return buffer
    return np.empty((rows, width), dtype=np.float32)


def choose(
    device: str | None, num_bytes: int
) -> tuple[Callable[[], Arithmetic], AbstractContextManager[object]]:
    """Who does the sums: makes one `Arithmetic` for a thread, and what must be around all work.

    Args:
        device: "numpy"; a device of PyTorch, "cpu" or "cuda"; None to choose between NumPy and
            PyTorch's "cpu".
        num_bytes: how much will be read.

    Raises:
        ConfigError: PyTorch or the device is not there.
    """
    if device is None:
        there = "torch" in sys.modules or (
            num_bytes > MUCH and importlib.util.find_spec("torch") is not None
        )
        device = "cpu" if there else "numpy"
    if device == "numpy":
        return NumpyArithmetic, nullcontext()
    try:
        from posthoc_ema.torch import arithmetic
    except ImportError as error:
        raise ConfigError(
            f"device {device!r} needs PyTorch, which cannot be imported ({error}). Install "
            "posthoc-ema[torch], or leave the device out."
        ) from error
    checked = arithmetic.check_device(device)
    around = ExitStack()
    around.enter_context(arithmetic.full_precision())
    around.enter_context(arithmetic.threads_restored())
    return lambda: arithmetic.TorchArithmetic(checked), around


def basis(
    weights: npt.NDArray[np.float64],
) -> tuple[list[int], npt.NDArray[np.float64]] | None:
    """Few targets of which all others are combinations, to the rounding of float32.

    Targets of a dense range of lengths are nearly linearly dependent: 31 of them over 128 snapshots have
    rank 18. Summing only a basis, chosen by QR with pivoting, saves the rest of the work.

    Args:
        weights: coefficient of each input in each target, (num_targets, num_sources).

    Returns:
        (targets of the basis, matrix (num_targets, size of the basis) that gives all of them); None if
        there is nothing to gain, or if combining would magnify rounding errors.

    Example:
        >>> basis(np.ones((2, 3))) is None
        True
    """
    if len(weights) < _BASIS_FROM:
        return None
    sizes = np.abs(weights).sum(axis=1)
    sizes[sizes == 0] = 1.0
    scaled = (weights / sizes[:, None]).T  # columns are targets of size one
    r, order = linalg.qr(scaled, mode="r", pivoting=True)
    least = int(np.count_nonzero(np.abs(np.diagonal(r)) > BASIS_ERROR))
    for rank in range(max(least, 1), 3 * len(weights) // 4 + 1):
        derived = linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:]).T
        error = np.abs(scaled[:, order[rank:]] - scaled[:, order[:rank]] @ derived.T).sum(axis=0)
        if error.max() <= BASIS_ERROR and np.abs(derived).sum(axis=1).max() <= _MAGNIFIED:
            matrix = np.zeros((len(weights), rank))
            matrix[order[:rank], np.arange(rank)] = 1.0
            matrix[order[rank:]] = derived
            chosen = order[:rank].tolist()
            return chosen, matrix * sizes[:, None] / sizes[chosen]
    return None


__all__ = ["BASIS_ERROR", "MUCH", "Arithmetic", "NumpyArithmetic", "basis", "choose"]
