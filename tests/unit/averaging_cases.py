"""Parameters of every kind, and the same updates in float64, for the tests of the kernels."""

from __future__ import annotations

import torch

WEIGHTS = [(1.0, 1.0, 1.0), (0.9, 0.25, 1e-3), (0.5, 0.1, 1e-7), (0.3, 0.7, 0.999)]
"""Of three profiles at four updates: first the whole, then all sizes on both sides of one half."""
FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def parameters(dtype=torch.float32, large=70_000):
    """Scalars, empty and odd ones, small and large ones, transposed, channels-last, cut out, expanded."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "scalar": random(),
        "empty": random(0, 3),
        "one": random(1),
        "odd": random(5),
        "cube": random(2, 3, 4),
        "matrix": random(64, 97),
        "large": random(large),
        "transposed": random(30, 50).t(),
        "channels_last": random(4, 3, 9, 9).to(memory_format=torch.channels_last),
        "large_channels_last": random(2, 5, 90, large // 800).to(memory_format=torch.channels_last),
        "columns": random(40, 30)[:, ::2],
        "expanded": random(1, 5).expand(7, 5),
    }


def changed(values, number):
    """The parameters at update `number`, of the same memory format where it is dense."""
    return {
        name: (value.float() * (1 - 0.3 * number)).to(value.dtype) for name, value in values.items()
    }


def run(averages, values, weights=WEIGHTS):
    """Update averages of three profiles, and return what they should be, in float64."""
    expected = {name: torch.zeros(3, *p.shape, dtype=torch.float64) for name, p in values.items()}
    for number, row in enumerate(weights):
        now = changed(values, number)
        averages.update(now, row)
        for name, stack in expected.items():
            column = torch.tensor(row, dtype=torch.float64).view(-1, *[1] * now[name].dim())
            stack += column * (now[name].to(torch.float32).double() - stack)
    return expected


def assert_same(averages, expected, tolerance=5e-7):
    """The averages are float32 and right to the rounding of a few updates."""
    averages.wait()
    for name, stack in expected.items():
        found = averages.stack(name)
        assert found.dtype == torch.float32
        assert found.shape == stack.shape
        torch.testing.assert_close(found.double(), stack, rtol=tolerance, atol=tolerance)
