"""How a float32 average becomes stored bytes and back: float32, float16, bfloat16, deltas.

A delta codec stores the difference to an earlier stored average (`snapshot_files` and `chains` say which);
here is only how the numbers of that difference are written.

Numbers here are plain NumPy; bfloat16, which NumPy does not know, is held as its 16 bits in uint16.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError

StoreDtype = Literal["float32", "float16", "bfloat16"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)
Codec = Literal["float32", "float16", "bfloat16", "delta", "delta-float16", "delta-int8"]
CODECS: tuple[str, ...] = get_args(Codec)
"""What can be asked for: "delta" chooses a width for each average."""
DEFAULT_CODEC: Codec = "delta"
"""How averages are stored unless something else is asked for (docs/explanation/storage.md)."""
FILE_CODECS: tuple[str, ...] = (*STORE_DTYPES, "delta-float16", "delta-int8")
"""What a file can be."""
_ELEMENTS = {"delta-float16": "float16", "delta-int8": "int8"}
DELTA_WIDTHS: dict[str, tuple[str, str]] = {
    "delta": ("delta-float16", "delta-int8"),
    "delta-float16": ("delta-float16", "delta-float16"),
    "delta-int8": ("delta-int8", "delta-int8"),
}
"""codec -> how differences of the shortest profile and of the others are stored."""
BLOCK = 64
"""Elements that share one scale in delta-int8."""
SCALES = ":scales"
"""What the name of a delta-int8 tensor's scales adds to the tensor's."""

AnyArray = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

# safetensors code -> (name that PyTorch and NumPy use, NumPy dtype that holds its bits)
_TABLE: dict[str, tuple[str, str]] = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "|i1"),
    "U64": ("uint64", "<u8"),
    "U32": ("uint32", "<u4"),
    "U16": ("uint16", "<u2"),
    "U8": ("uint8", "|u1"),
    "BOOL": ("bool", "|b1"),
    "C64": ("complex64", "<c8"),
    "F8_E4M3": ("float8_e4m3fn", "|u1"),
    "F8_E5M2": ("float8_e5m2", "|u1"),
}
DTYPE_NAMES: dict[str, str] = {code: name for code, (name, _) in _TABLE.items()}
"""safetensors code -> dtype name, for example "BF16" -> "bfloat16"."""
DTYPE_CODES: dict[str, str] = {name: code for code, name in DTYPE_NAMES.items()}
"""dtype name -> safetensors code."""
FLOATING: frozenset[str] = frozenset({"float64", "float32", "float16", "bfloat16"})
"""dtypes that can be averaged."""

_FLOAT16_MAX = float(np.finfo(np.float16).max)


FLOAT8: tuple[str, ...] = ("float8_e4m3fn", "float8_e5m2")


def storage_dtype(name: str) -> np.dtype[Any]:
    """NumPy dtype that holds the bits of dtype `name` (bfloat16 -> uint16)."""
    return np.dtype(_TABLE[DTYPE_CODES[name]][1])


def check_codec(codec: str) -> Codec:
    """Return `codec` if averages can be stored by it.

    Raises:
        ConfigError: it is not one of `CODECS`.
    """
    if codec not in CODECS:
        raise ConfigError(f"dtype must be one of {', '.join(CODECS)}, got {codec!r}.")
    return codec  # type: ignore[return-value]  # membership in the Literal was just checked


def is_delta(codec: str) -> bool:
    """Whether this codec stores differences to other averages."""
    return codec in DELTA_WIDTHS


def element_dtype(codec: str) -> str:
    """Dtype of the numbers in a file of `codec`, for example "delta-float16" -> "float16"."""
    return _ELEMENTS.get(codec, codec)


def fits(values: Float32Array, dtype: str) -> bool:
    """Whether `values` survive `dtype` without overflow. Only float16 has a small range (65504)."""
    if dtype != "float16" or values.size == 0:
        return True
    # fmin and fmax pass over nan, which any dtype can hold. Infinities hide how large their finite
    # neighbours are, so a tensor with one is kept in float32.
    low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
    return not max(-float(low), float(high)) > _FLOAT16_MAX


def encode(values: AnyArray, dtype: str) -> AnyArray:
    """Round a float array to `dtype` (to nearest, ties to even); bfloat16 comes back as uint16 bits.

    Args:
        values: floating array, any shape.
        dtype: name of a floating dtype.

    Returns:
        Array of `storage_dtype(dtype)`, same shape, C-contiguous.

    Example:
        >>> hex(int(encode(np.array([1.0]), "bfloat16")[0]))
        '0x3f80'
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # callers ask `fits` first where overflow matters
            # asarray and not ascontiguousarray, which would turn a scalar into one element
            return np.asarray(values, dtype=storage_dtype(dtype), order="C")
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, rounded).astype("<u2").reshape(np.shape(values))


def decode(stored: AnyArray, dtype: str, out: Float32Array | None = None) -> Float32Array:
    """Float32 values of stored bits; exact for float16, bfloat16 and float32.

    Args:
        stored: array of `storage_dtype(dtype)`, any shape.
        dtype: name of a floating dtype.
        out: float32 array of the same shape to write to.

    Returns:
        float32 array, same shape (`out` if it was given).
    """
    if out is None:
        out = np.empty(stored.shape, dtype=np.float32)
    if dtype in FLOAT8:
        np.copyto(out, _float8_values(dtype)[stored])
    elif dtype == "bfloat16":
        np.left_shift(stored, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif dtype == "float16" and not _has_specials(stored):
        _widen_float16(stored, out)
    else:
        np.copyto(out, stored, casting="same_kind")
    return out


def _float8_values(dtype: str) -> Float32Array:
    """The 256 values of a float8 dtype (arXiv 2209.05433), by their bits."""
    bits = np.arange(256, dtype=np.uint16)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (bits << np.uint16(8)).astype(np.uint16).view(np.float16).astype(np.float32)
    sign, exponent, mantissa = 1.0 - 2.0 * (bits >> 7), (bits >> 3) & 15, bits & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where((bits & 127) == 127, np.nan, sign * magnitude).astype(np.float32)


def _has_specials(stored: AnyArray) -> bool:
    """Whether a float16 array holds infinities or nan, whose exponent is all ones."""
    exponents = stored.view(np.uint16) & np.uint16(0x7C00)
    return bool(exponents.max(initial=0) == 0x7C00)


def _widen_float16(stored: AnyArray, out: Float32Array) -> None:
    """Finite float16 to float32 by integers, exactly; five times faster than NumPy's own conversion.

    The bits move to float32's places, with the sign extended over the gap and cleared there; the
    product then makes up for the different exponent bias, subnormal numbers included.
    """
    bits = out.view(np.int32)
    np.left_shift(stored.view(np.int16), np.int32(13), out=bits, dtype=np.int32)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8FFFE000
    np.multiply(out, np.float32(2.0**112), out=out)


def encode_int8_blocks(values: Float32Array) -> tuple[AnyArray, AnyArray]:
    """Round to int8 with one scale per block of `BLOCK` elements, symmetric around zero.

    Args:
        values: finite float32, shape (n,).

    Returns:
        int8 of shape (n,) in [-127, 127], and the scales, bfloat16 bits (uint16), one per block. Scales
        are rounded up to bfloat16, so nothing is clipped: |value - scale * int8| <= scale / 2.

    Example:
        >>> stored, scales = encode_int8_blocks(np.array([1.0, -0.5], dtype=np.float32))
        >>> stored.tolist(), decode_int8_blocks(stored, scales, np.empty(2, "f4")).round(2).tolist()
        ([126, -63], [1.0, -0.5])
    """
    padded = np.zeros((-(-len(values) // BLOCK), BLOCK), dtype=np.float32)
    padded.reshape(-1)[: len(values)] = values
    largest = np.maximum(padded.max(axis=1, initial=0), -padded.min(axis=1, initial=0))
    bits = (largest / np.float32(127)).view(np.uint32)
    scales = ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype("<u2")
    widened = decode(scales, "bfloat16")[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(padded, widened, out=padded, where=widened > 0)
    stored = np.rint(padded, out=padded).astype(np.int8)
    return stored.reshape(-1)[: len(values)], scales


def decode_int8_blocks(stored: AnyArray, scales: AnyArray, out: Float32Array) -> Float32Array:
    """Inverse of `encode_int8_blocks`, into `out`, float32 of shape (n,)."""
    whole = len(stored) // BLOCK * BLOCK
    widened = decode(scales, "bfloat16")
    blocks = stored[:whole].reshape(-1, BLOCK)
    np.multiply(blocks, widened[: len(blocks), None], out=out[:whole].reshape(-1, BLOCK))
    if whole < len(stored):
        np.multiply(stored[whole:], widened[-1], out=out[whole:])
    return out
