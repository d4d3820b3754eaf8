"""Tensors of foreign files, read by ranges of their flattened elements."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from posthoc_ema.codecs import AnyArray, storage_dtype
from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.tensor_files import TensorFile, TensorInfo, read_header


class FlatTensor(Protocol):
    """A tensor of a file, read by ranges of its flattened elements."""

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        ...

    def read(self, start: int, stop: int) -> AnyArray:
        """Bits of elements `start` to `stop`, (stop - start,)."""
        ...


@contextlib.contextmanager
def told(path: Path, name: str) -> Iterator[None]:
    """Name file and tensor when its data turns out to be malformed."""
    try:
        yield
    except ValueError as error:
        raise SnapshotFormatError(
            f"{path}: tensor {name!r} cannot be read: {error}. Restore the checkpoint from a copy, or "
            "leave it out with --exclude."
        ) from error


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file."""

    file: TensorFile
    info: TensorInfo

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        return id(self.file), self.info.name

    def read(self, start: int, stop: int) -> AnyArray:
        """Bits of elements `start` to `stop`, (stop - start,)."""
        first = self.info.start
        raw = self.file.read_bytes(
            first + start * self.info.itemsize, first + stop * self.info.itemsize
        )
        return raw.view(storage_dtype(self.info.dtype))


class LazyFile(TensorFile):
    """A safetensors file that is opened for each read.

    A run may have thousands of shards; a process has fewer descriptors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)

    def read_bytes(self, start: int, end: int) -> AnyArray:
        """Bytes `start` to `end` of the file."""
        with TensorFile(self.path, self.header) as file:
            return file.read_bytes(start, end)


def read_safetensors(path: Path) -> dict[str, FlatTensor]:
    """All tensors of a safetensors file.

    Raises:
        SnapshotFormatError: it is damaged.
    """
    file = LazyFile(path)
    return {name: SafeTensor(file, info) for name, info in file.header.tensors.items()}


@dataclass
class SavedTensor:
    """A tensor of `torch.save`; one that is not contiguous is read whole and kept until the next."""

    tensor: PickledTensor
    _whole: AnyArray | None = field(default=None, repr=False)

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.tensor.shape

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        return self.tensor.view

    def read(self, start: int, stop: int) -> AnyArray:
        """Bits of elements `start` to `stop`, (stop - start,)."""
        kind = storage_dtype(self.dtype)
        if self.tensor.strides == _contiguous(self.shape):
            first = (self.tensor.offset + start) * kind.itemsize
            raw = self.tensor.storage.span.read(first, first + (stop - start) * kind.itemsize)
            return np.frombuffer(raw, kind)
        if self._whole is None:
            self._whole = self.tensor.read().reshape(-1)
        values = self._whole[start:stop]
        if stop == len(self._whole):
            self._whole = None
        return values


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a C-contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass
class ChunkedTensor:
    """A tensor in pieces, each saved by one rank.

    Attributes:
        chunks: (first index per axis, tensor) of each piece.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], FlatTensor]]
    _whole: AnyArray | None = field(default=None, repr=False)

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        return id(self)

    def read(self, start: int, stop: int) -> AnyArray:
        """Bits of elements `start` to `stop`, (stop - start,)."""
        out = np.empty(stop - start, storage_dtype(self.dtype))
        if not all(_is_rows(offset, t.shape, self.shape) for offset, t in self.chunks):
            if self._whole is None:
                self._whole = self._assembled()
            out[:] = self._whole[start:stop]
            if stop == len(self._whole):
                self._whole = None
            return out
        row = math.prod(self.shape[1:])
        for offset, tensor in self.chunks:
            first = offset[0] * row if offset else 0
            begin, end = max(start, first), min(stop, first + math.prod(tensor.shape))
            if begin < end:
                out[begin - start : end - start] = tensor.read(begin - first, end - first)
        return out

    def _assembled(self) -> AnyArray:
        whole = np.empty(self.shape, storage_dtype(self.dtype))
        for offset, tensor in self.chunks:
            place = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            whole[place] = tensor.read(0, math.prod(tensor.shape)).reshape(tensor.shape)
        return whole.reshape(-1)


def _is_rows(offset: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a piece is a run of whole rows, which is a run of flattened elements."""
    return not any(offset[1:]) and tuple(sizes[1:]) == tuple(shape[1:])
