"""The update as one Triton kernel for all parameters and all profiles: the device's side.

Each program takes one chunk of one parameter: it reads the parameter once, converts it in registers, and
brings all averages of it up to date.
"""

# ruff: noqa: ANN001, ANN202, ANN201
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _to_bfloat16(values, random):
    """Float32 to bfloat16 by adding 16 random bits to those that are cut off; NaN stays NaN."""
    bits = values.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
    cut = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(values == values, cut, values).to(tl.bfloat16)


@triton.jit
def _move(average, theta, weight, mask, random, ROUNDS: tl.constexpr):
    """Average <- average + weight (theta - average), in the form of `torch.lerp`: exact at weight 1."""
    before = tl.load(average, mask=mask).to(tl.float32)
    difference = theta - before
    forth, back = before + weight * difference, theta - (1.0 - weight) * difference
    after = tl.where(weight < 0.5, forth, back)
    if ROUNDS:
        tl.store(average, _to_bfloat16(after, random), mask=mask)
    else:
        tl.store(average, after, mask=mask)


@triton.jit
def _move_all(
    parameter,
    average,
    stride,
    w0,
    w1,
    w2,
    w3,
    mask,
    counter,
    seed,
    PROFILES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """One chunk: the parameter is read once for all profiles."""
    theta = tl.load(parameter, mask=mask).to(tl.float32)
    r0, r1, r2, r3 = counter, counter, counter, counter
    if ROUNDS:
        r0, r1, r2, r3 = tl.randint4x(seed, counter)
    _move(average, theta, w0, mask, r0, ROUNDS)
    if PROFILES > 1:
        _move(average + stride, theta, w1, mask, r1, ROUNDS)
    if PROFILES > 2:
        _move(average + 2 * stride, theta, w2, mask, r2, ROUNDS)
    if PROFILES > 3:
        _move(average + 3 * stride, theta, w3, mask, r3, ROUNDS)


@triton.jit(do_not_specialize=["first", "seed"])
def update(
    parameters,  # int64: address of each parameter
    averages,  # int64: address of the first of its averages
    strides,  # int64: elements from one of its averages to the next
    sizes,  # int64: its elements
    owners,  # int32: parameter of each chunk
    starts,  # int64: first element of each chunk within its parameter
    w0,
    w1,
    w2,
    w3,
    first,  # the first profile of this launch
    seed,
    PROFILES: tl.constexpr,
    THETA: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter and all its averages."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(starts + chunk)
    left = tl.load(sizes + owner) - start
    stride = tl.load(strides + owner)
    parameter = tl.load(parameters + owner).to(tl.pointer_type(THETA)) + start
    average = tl.load(averages + owner).to(tl.pointer_type(AVERAGE)) + start + first * stride
    if ALIGNED:  # 16 bytes are then moved by one instruction
        parameter = tl.multiple_of(parameter, 16)
        average = tl.multiple_of(average, 16)
        stride = tl.multiple_of(stride, 16)
    lanes = tl.arange(0, BLOCK)
    counter = chunk * BLOCK + lanes
    if left >= BLOCK:  # without a mask, which would be checked element by element
        _move_all(
            parameter + lanes,
            average + lanes,
            stride,
            w0,
            w1,
            w2,
            w3,
            None,
            counter,
            seed,
            PROFILES,
            ROUNDS,
        )
    else:
        mask = lanes < left
        _move_all(
            parameter + lanes,
            average + lanes,
            stride,
            w0,
            w1,
            w2,
            w3,
            mask,
            counter,
            seed,
            PROFILES,
            ROUNDS,
        )
