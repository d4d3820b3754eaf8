from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import ConfigError
from posthoc_ema.codecs import (
    BLOCK,
    DTYPE_CODES,
    DTYPE_NAMES,
    STORE_DTYPES,
    check_codec,
    decode,
    decode_int8_blocks,
    encode,
    encode_int8_blocks,
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


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_int8_blocks_lose_at_most_half_a_step_and_nothing_is_clipped(size, rng):
    values = (rng.normal(size=size) * 10.0 ** rng.uniform(-12, 4, size)).astype(np.float32)
    stored, scales = encode_int8_blocks(values)
    assert (stored.dtype, stored.shape) == (np.int8, (size,))
    assert (scales.dtype, scales.shape) == (np.uint16, (-(-size // BLOCK),))
    assert np.abs(stored.astype(int)).max(initial=0) <= 127
    back = decode_int8_blocks(stored, scales, np.empty(size, dtype=np.float32))
    step = np.repeat(decode(scales, "bfloat16"), BLOCK)[:size].astype(np.float64)
    assert (np.abs(back - values.astype(np.float64)) <= step * 0.50001).all()
    largest = np.abs(np.pad(values, (0, -size % BLOCK))).reshape(-1, BLOCK).max(axis=1)
    assert (decode(scales, "bfloat16") <= largest / 127 * (1 + 2.0**-6)).all()


def test_int8_blocks_keep_zeros_and_do_not_mix_blocks():
    values = np.zeros(3 * BLOCK, dtype=np.float32)
    values[BLOCK : 2 * BLOCK] = 1e-20
    values[-1] = 127.0
    stored, scales = encode_int8_blocks(values)
    back = decode_int8_blocks(stored, scales, np.full(len(values), np.nan, dtype=np.float32))
    assert (back[:BLOCK] == 0).all()
    np.testing.assert_allclose(back[BLOCK : 2 * BLOCK], 1e-20, rtol=2.0**-7)
    assert (back[2 * BLOCK : -1] == 0).all()
    assert back[-1] == 127.0


@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45])
def test_int8_blocks_hold_the_extremes_of_float32(largest):
    values = np.float32([largest, -largest, largest / 2, 0])
    back = decode_int8_blocks(*encode_int8_blocks(values), np.empty(4, dtype=np.float32))
    assert np.isfinite(back).all()
    assert np.abs(back - values.astype(np.float64)).max() <= max(largest / 250, 127e-45)


def test_int8_blocks_are_exact_where_the_steps_are(rng):
    """A block whose largest value is 127 times a bfloat16 number loses nothing that is on its steps."""
    values = rng.integers(-127, 128, (5, BLOCK)).astype(np.float32)
    values[:, 7] = 127
    values *= np.float32(2.0) ** np.arange(-20, 20, 8, dtype=np.float32)[:, None]
    stored, scales = encode_int8_blocks(values.ravel())
    back = decode_int8_blocks(stored, scales, np.empty(values.size, dtype=np.float32))
    np.testing.assert_array_equal(back, values.ravel())
