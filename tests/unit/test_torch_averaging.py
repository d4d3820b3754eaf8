from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc_ema.torch.averaging.eager import new_stack, update_stack, weight_columns


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4), (300, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_update_moves_each_average_by_its_own_weight(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(shape, generator=generator).to(dtype)
    stack = torch.randn(3, *shape, generator=generator)
    before, weights = stack.double(), [1.0, 0.25, 1e-7]
    columns = weight_columns(weights, [torch.device("cpu")])
    update_stack(stack, parameter, columns[torch.device("cpu")])
    column = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * len(shape))
    expected = before + column * (parameter.float().double() - before)
    torch.testing.assert_close(stack.double(), expected, rtol=3e-7, atol=3e-7)


def test_first_update_is_an_exact_copy():
    parameter = torch.tensor([1e30, -1e-30, np.pi])
    stack = new_stack(parameter, 2)
    column = weight_columns([1.0, 1.0], [parameter.device])[parameter.device]
    update_stack(stack, parameter, column)
    assert torch.equal(stack[0], parameter)
    assert torch.equal(stack[1], parameter)


def test_parameters_that_are_not_contiguous_are_averaged():
    parameter = torch.arange(6.0).reshape(2, 3).t()
    channels_last = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    for value in (parameter, channels_last):
        stack = new_stack(value, 2)
        update_stack(stack, value, weight_columns([1.0, 0.5], [value.device])[value.device])
        assert torch.equal(stack[0], value)
        assert torch.equal(stack[1], value / 2)


def test_weights_reach_every_device_as_float32():
    columns = weight_columns([0.5, 1e-9], [torch.device("cpu")])
    (column,) = columns.values()
    assert column.dtype == torch.float32
    assert column.tolist() == [0.5, pytest.approx(1e-9, rel=1e-7)]
