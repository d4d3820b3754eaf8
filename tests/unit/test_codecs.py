from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import ConfigError
from posthoc_ema.codecs import (
    DTYPE_CODES,
    DTYPE_NAMES,
    STORE_DTYPES,
    check_codec,
    decode,
    encode,
    fits,
    storage_dtype,
)


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_codec_keeps_the_shape(dtype, shape):
    stored = encode(np.ones(shape, dtype=np.float32), dtype)
    assert stored.shape == shape
    assert stored.dtype == storage_dtype(dtype)
    assert decode(stored, dtype).shape == shape


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_values_of_a_dtype_survive_it_exactly(dtype, rng):
    """Every value that the dtype can hold: encode after decode is the identity on bits."""
    if dtype == "float32":
        bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    else:
        bits = np.arange(2**16, dtype=np.uint16).view(storage_dtype(dtype))
    values = decode(bits, dtype)
    number = ~np.isnan(values)
    again = encode(values, dtype)
    assert (again.view(np.uint8) == bits.view(np.uint8)).reshape(len(bits), -1)[number].all()
    assert np.isnan(decode(again, dtype)[~number]).all()


def test_every_finite_float16_is_widened_exactly():
    """Finite values take a way of their own: subnormal numbers and both zeros included."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    widened = decode(values, "float16")
    assert (widened.view(np.uint32) == values.astype(np.float32).view(np.uint32)).all()
    assert decode(values[5], "float16") == np.float32(values[5])


def test_bfloat16_rounds_to_nearest_with_ties_to_even():
    one, step = 1.0, 2.0**-7
    values = np.float32([one + step / 2, one + step * 1.5, one + step * 0.51, one + step * 0.49])
    assert decode(encode(values, "bfloat16"), "bfloat16").tolist() == [1, 1 + 2 * step, 1 + step, 1]


def test_bfloat16_keeps_infinities_and_nan():
    values = np.float32([np.inf, -np.inf, np.nan, np.finfo(np.float32).max])
    back = decode(encode(values, "bfloat16"), "bfloat16")
    assert back[[0, 1, 3]].tolist() == [np.inf, -np.inf, np.inf]
    assert np.isnan(back[2])
    signalling = np.array([0x7F800001], dtype=np.uint32).view(np.float32)
    assert np.isnan(decode(encode(signalling, "bfloat16"), "bfloat16"))


def test_encode_takes_strided_arrays():
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    for dtype in STORE_DTYPES:
        np.testing.assert_array_equal(decode(encode(values, dtype), dtype), values)


def test_decode_writes_to_the_array_that_is_given():
    out = np.zeros(2, dtype=np.float32)
    assert decode(encode(np.float32([1, 2]), "bfloat16"), "bfloat16", out) is out
    assert out.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -65504.0], True),
        ([65504.0], True),
        ([65505.0], False),
        ([-1e5], False),
        ([], True),
        ([np.nan, 1.0], True),
        ([np.nan], True),
        ([np.nan, 1e5], False),
        ([1e5, np.nan], False),
        ([np.inf, 1.0], False),
        ([-np.inf], False),
    ],
)
def test_fits_sees_what_float16_would_overflow(values, expected):
    assert fits(np.float32(values), "float16") is expected
    assert fits(np.float32(values), "float32") is True
    assert fits(np.float32(values), "bfloat16") is True


@pytest.mark.parametrize("dtype", ["float64", "int8", "", "fp16", None])
def test_other_store_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError, match="float32, float16, bfloat16"):
        check_codec(dtype)


def test_dtype_names_and_codes_are_inverse():
    assert {DTYPE_CODES[name] for name in DTYPE_NAMES.values()} == set(DTYPE_NAMES)
    assert storage_dtype("bfloat16") == np.uint16


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_decoded_to_the_values_that_torch_reads(dtype):
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits).view(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(decode(bits, dtype), expected)
