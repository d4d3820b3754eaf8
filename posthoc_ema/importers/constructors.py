"""The calls of a pickle that are understood: plain containers, PyTorch's tensors, NumPy's arrays.

Names are compared as strings; everything is built here, from numbers and ranges of the file that have
been checked. PyTorch writes a tensor as a call of `_rebuild_tensor_v2` with a storage, an offset, a
shape and strides. The storage is either a persistent id (in files of `torch.save`) or, in a plain
pickle, bytes that hold a small file of `torch.save` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posthoc_ema.codecs import DTYPE_CODES, storage_dtype
from posthoc_ema.importers.restricted_pickle import Budget, Global, NotUnderstood, check_key
from posthoc_ema.importers.spans import Span
from posthoc_ema.importers.tensors import PickledTensor, Storage

_TORCH_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}
_NUMPY_CODES = {
    "f8": "float64",
    "f4": "float32",
    "f2": "float16",
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
    "u8": "uint64",
    "u4": "uint32",
    "u2": "uint16",
    "u1": "uint8",
    "b1": "bool",
    "c8": "complex64",
}
_PLAIN_MODULES = ("builtins", "__builtin__", "collections", "_codecs")


def storage_kind(what: Any) -> str | None:
    """Dtype name of a storage class; None for untyped ones."""
    if isinstance(what, Global) and what.module in ("torch", "torch.cuda", "torch.storage"):
        if what.name == "UntypedStorage":
            return None
        if what.name in _TORCH_STORAGES:
            return _TORCH_STORAGES[what.name]
    name = f"{what.module}.{what.name}" if isinstance(what, Global) else "a value that is no class"
    raise ValueError(f"it holds elements of an unknown kind, {name}")


class NumpyDtype:
    """A NumPy dtype that is being built: its code, then whether it is big-endian."""

    def __init__(self, code: str) -> None:
        self.name = _NUMPY_CODES.get(code.lstrip("<>|="))
        self.big_endian = code.startswith(">")

    def set_state(self, state: Any) -> None:
        """Second half of NumPy's dtype pickles: (version, byte order, ...)."""
        if not isinstance(state, tuple) or len(state) < 2:
            raise ValueError("a NumPy dtype in it is malformed")
        self.big_endian = state[1] == ">"


class NumpyArray:
    """A NumPy array that is being built.

    Attributes:
        tensor: its values, once its state is set.
    """

    def __init__(self) -> None:
        self.tensor: PickledTensor | None = None

    def set_state(self, state: Any) -> None:
        """Second half of NumPy's array pickles: (version, shape, dtype, Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a NumPy array in it is malformed")
        _, shape, dtype, fortran, data = state
        self.tensor = _numpy_tensor(shape, dtype, bool(fortran), data)


def _numpy_tensor(shape: Any, dtype: Any, fortran: bool, data: Any) -> PickledTensor:
    if not isinstance(dtype, NumpyDtype) or dtype.name is None or dtype.big_endian:
        raise ValueError("it holds a NumPy array of an unknown kind")
    span = Span.of(data) if isinstance(data, bytes) else data
    if not isinstance(span, Span) or not isinstance(shape, tuple):
        raise ValueError("a NumPy array in it is malformed")
    strides = []
    step = 1
    for n in shape if fortran else reversed(shape):
        strides.append(step)
        step *= n if type(n) is int else 0
    tensor = PickledTensor(
        dtype.name,
        shape,
        tuple(strides if fortran else reversed(strides)),
        0,
        Storage(dtype.name, span),
    )
    tensor.check()
    return tensor


class Constructors:
    """Builds the values of understood calls, for one file.

    Args:
        budget: what the file may take.
        load_storage: reads the storage out of an embedded file of `torch.save`.
    """

    def __init__(self, budget: Budget, load_storage: Callable[[Span], Any]) -> None:
        self._budget = budget
        self._load_storage = load_storage
        self._table: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
            ("collections", "OrderedDict"): self._dict,
            ("collections", "defaultdict"): lambda args: self._dict(args[1:]),
            ("builtins", "dict"): self._dict,
            ("builtins", "list"): lambda args: list(self._elements(args)),
            ("builtins", "set"): self._set,
            ("builtins", "frozenset"): lambda args: frozenset(self._set(args)),
            ("builtins", "bytearray"): self._bytes,
            ("builtins", "bytes"): self._bytes,
            ("_codecs", "encode"): self._encode,
            ("torch", "Size"): lambda args: tuple(self._elements(args)),
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_with_dtype,
            ("torch._utils", "_rebuild_parameter"): _first_tensor,
            ("torch._utils", "_rebuild_parameter_with_state"): _first_tensor,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("numpy", "dtype"): _numpy_dtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda args: NumpyArray(),
            ("numpy.core.multiarray", "scalar"): self._numpy_scalar,
            ("numpy.core.numeric", "_frombuffer"): self._numpy_from_buffer,
        }

    def __call__(self, what: Global, args: tuple[Any, ...]) -> Any:
        """The value of a call.

        Raises:
            NotUnderstood: the name is none of ours.
            ValueError: it is, and its arguments are malformed.
        """
        module = what.module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        build = self._table.get((module, what.name))
        if build is None:
            raise NotUnderstood
        self._budget.charge(400)
        return build(args)

    def _elements(self, args: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        values = args[0] if args else ()
        if not isinstance(values, list | tuple):
            raise ValueError("it makes a container of a value that is none")
        # The values may come from the memo again and again: every copy counts.
        self._budget.charge(64 * len(values))
        return values

    def _dict(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        if args and isinstance(args[0], dict):
            self._budget.charge(128 * len(args[0]))
            return dict(args[0])
        result = {}
        for pair in self._elements(args):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("it makes a dict of values that are no pairs")
            result[check_key(pair[0])] = pair[1]
        return result

    def _set(self, args: tuple[Any, ...]) -> set[Any]:
        return {check_key(value) for value in self._elements(args)}

    def _bytes(self, args: tuple[Any, ...]) -> bytes | Span:
        if len(args) == 2:
            return self._encode(args)
        if not args:
            return b""
        if not isinstance(args[0], bytes | Span):
            raise ValueError("it makes bytes of a value that holds none")
        return args[0]

    def _encode(self, args: tuple[Any, ...]) -> bytes:
        """How protocol 2 writes bytes: text of the first 256 characters."""
        text, encoding = args
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("it encodes text in an unknown way")
        self._budget.charge(len(text))
        return text.encode("latin-1")

    def _storage(self, args: tuple[Any, ...]) -> Any:
        (data,) = args
        span = Span.of(data) if isinstance(data, bytes) else data
        if not isinstance(span, Span):
            raise ValueError("a storage in it is no byte string")
        return self._load_storage(span)

    def _tensor(self, args: tuple[Any, ...], dtype: str | None = None) -> PickledTensor:
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, Storage):
            raise ValueError("a tensor in it has no storage")
        if not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise ValueError("a tensor in it has a malformed shape")
        name = dtype or storage.dtype
        if name is None:
            raise ValueError("a tensor in it has no dtype")
        self._budget.charge(16 * (len(shape) + len(strides)))
        tensor = PickledTensor(name, shape, strides, offset, storage)
        tensor.check()
        return tensor

    def _tensor_with_dtype(self, args: tuple[Any, ...]) -> PickledTensor:
        dtype = args[6]
        if (
            not isinstance(dtype, Global)
            or dtype.module != "torch"
            or dtype.name not in DTYPE_CODES
        ):
            raise ValueError("a tensor in it has an unknown dtype")
        return self._tensor(args, dtype.name)

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        """A tensor with attributes: (function, type, its arguments, state)."""
        what, _, inner, _ = args
        if not isinstance(what, Global) or not isinstance(inner, tuple):
            raise ValueError("a tensor in it is malformed")
        if what.name == "_rebuild_from_type_v2":  # itself: would nest without end
            raise ValueError("a tensor in it is malformed")
        return self(what, inner)

    def _numpy_scalar(self, args: tuple[Any, ...]) -> Any:
        dtype, data = args
        value = _numpy_tensor((), dtype, False, data).read()
        return value.item()

    def _numpy_from_buffer(self, args: tuple[Any, ...]) -> PickledTensor:
        data, dtype, shape, order = args
        return _numpy_tensor(shape, dtype, order == "F", data)


def _first_tensor(args: tuple[Any, ...]) -> Any:
    """A parameter is its tensor."""
    if not isinstance(args[0], PickledTensor):
        raise ValueError("a parameter in it holds no tensor")
    return args[0]


def _numpy_dtype(args: tuple[Any, ...]) -> NumpyDtype:
    if not args or not isinstance(args[0], str):
        raise ValueError("a NumPy dtype in it is malformed")
    return NumpyDtype(args[0])


def little_endian(values: Any) -> None:
    """Raise ValueError if the header of a file of `torch.save` says that it is big-endian."""
    if not isinstance(values, dict) or values.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")


def element_bytes(dtype: str | None) -> int:
    """Bytes per element of a storage; 1 for untyped ones."""
    return 1 if dtype is None else storage_dtype(dtype).itemsize
