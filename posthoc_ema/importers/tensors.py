"""Tensors that still lie in the file that they were found in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from posthoc_ema.codecs import AnyArray, storage_dtype
from posthoc_ema.importers.spans import Span


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor of a foreign file: what it is, and its bits when they are asked for."""

    @property
    def dtype(self) -> str:
        """Dtype name as PyTorch spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def read(self) -> AnyArray:
        """Its bits, in its shape (bfloat16 as uint16)."""
        ...


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of elements that tensors are views of.

    Attributes:
        dtype: dtype name; None for untyped storages, whose tensors bring their own.
        span: its bytes.
    """

    dtype: str | None
    span: Span


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A view of a storage, as `torch.Tensor`: element strides, offset and shape.

    Attributes:
        dtype: dtype name.
        shape: its shape.
        strides: elements from one index to the next, per axis, >= 0.
        offset: first element in the storage.
        storage: where its elements lie.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def view(self) -> tuple[Any, ...]:
        """What two tied tensors have in common."""
        return (id(self.storage), self.dtype, self.shape, self.strides, self.offset)

    def read(self) -> AnyArray:
        """Its bits, in its shape, C-contiguous."""
        kind = storage_dtype(self.dtype)
        if self.size == 0:
            return np.empty(self.shape, kind)
        first = self.offset * kind.itemsize
        last = first + (self._extent()) * kind.itemsize
        flat = np.frombuffer(self.storage.span.read(first, last), kind)
        strides = tuple(stride * kind.itemsize for stride in self.strides)
        return np.ascontiguousarray(
            np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        ).reshape(self.shape)

    def _extent(self) -> int:
        """Elements from its first to its last, both included."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    def check(self) -> None:
        """Raise ValueError unless every element lies in the storage and none is used twice over."""
        kind = storage_dtype(self.dtype)
        numbers = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or len(self.shape) > 64:
            raise ValueError("a tensor in it has a malformed shape")
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError("a tensor in it has a malformed shape")
        if self.size:
            held = self.storage.span.size // kind.itemsize
            if self.offset + self._extent() > held or self.size > held:
                raise ValueError("a tensor in it reaches beyond its storage")


@dataclass(frozen=True, eq=False)
class CountTensor:
    """A counter that another tool stored as a float: whole numbers again, 0 for lost ones.

    Attributes:
        source: the float tensor.
    """

    source: LazyTensor

    @property
    def dtype(self) -> str:
        """Always int64."""
        return "int64"

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    def read(self) -> AnyArray:
        """The numbers; what is not finite is 0."""
        values = to_float64(self.source)
        finite = np.where(np.isfinite(values), values, 0.0)
        return np.asarray(np.clip(np.rint(finite), -(2.0**53), 2.0**53).astype("<i8"))


def to_float64(tensor: LazyTensor) -> AnyArray:
    """Values of a tensor of numbers in float64."""
    bits = tensor.read()
    if tensor.dtype == "bfloat16":
        bits = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return np.asarray(bits, dtype=np.float64)
