from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc_ema import ConfigError, TrackingError
from posthoc_ema.averaging import power_average
from posthoc_ema.profiles import gamma_from_sigma_rel, power_update_weight
from posthoc_ema.torch.averaging import Averages, eager

from .averaging_cases import FLOAT_DTYPES, WEIGHTS, assert_same, changed, parameters, run


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_averages_of_every_kind_of_parameter_follow_the_formula(dtype, device):
    values = parameters(dtype)
    averages = Averages(values, 3, device=device)
    expected = run(averages, values)
    assert_same(averages, expected)
    averages.close()


def test_averages_equal_the_numpy_oracle():
    generator = np.random.default_rng(0)
    shapes = {"scalar": (), "small": (7, 3), "large": (300, 300)}
    trajectory = [{n: generator.normal(size=s) for n, s in shapes.items()} for _ in range(9)]
    times = np.cumsum(generator.integers(1, 50, size=9)).tolist()
    gammas = gamma_from_sigma_rel([0.05, 0.2])
    averages = None
    for values, time, before in zip(trajectory, times, [0, *times[:-1]], strict=True):
        tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        averages = averages or Averages(tensors, 2)
        averages.update(tensors, power_update_weight(gammas, time, time - before).tolist())
    for name in shapes:
        history = [values[name] for values in trajectory]
        for i, gamma in enumerate(gammas):
            expected = power_average(history, times, gamma)
            np.testing.assert_allclose(averages.average(name, i), expected, rtol=2e-6, atol=2e-6)


def test_where_a_parameter_lies_does_not_change_a_bit(monkeypatch):
    """Sharded, gathered, cut into chunks or alone: always what lerp_ of the one tensor gives."""
    values = parameters()
    averages = Averages(values, 3)
    run(averages, values)
    monkeypatch.setattr(eager, "CACHED", 1000)
    in_chunks = Averages(values, 3)
    run(in_chunks, values)
    for name in values:
        alone = [torch.zeros_like(values[name]).clone() for _ in range(3)]
        for number, row in enumerate(WEIGHTS):
            for average, weight in zip(alone, row, strict=True):
                average.lerp_(changed(values, number)[name], weight)
        assert torch.equal(averages.stack(name), torch.stack(alone)), name
        assert torch.equal(in_chunks.stack(name), torch.stack(alone)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_update_is_an_exact_copy(dtype):
    values = {
        "a": torch.tensor([1e30, -(2.0**-100), 3.0]).bfloat16().float(),
        "b": torch.tensor(7.0),
    }
    averages = Averages(values, 2, dtype=dtype)
    averages.update(values, [1.0, 1.0])
    for name, value in values.items():
        assert torch.equal(averages.stack(name), torch.stack([value, value]))


def test_averages_keep_the_memory_order_of_their_parameter():
    values = parameters()
    averages = Averages(values, 2)
    for name in ("transposed", "channels_last", "large_channels_last"):
        assert averages.average(name, 1).stride() == values[name].stride()
    assert averages.average("columns", 0).is_contiguous()


def test_a_parameter_with_new_memory_order_dtype_or_address_is_followed():
    value = torch.randn(300, 300)
    small = torch.randn(30, 30)
    averages = Averages({"w": value, "s": small}, 1)
    expected, expected_small = torch.zeros(300, 300), torch.zeros(30, 30)
    versions = [
        value,
        value.t().contiguous().t(),
        value.double(),
        value.bfloat16(),
        value[:, :1].expand(300, 300),
        value.clone(),
    ]
    for version in versions:
        averages.update({"w": version, "s": version[:30, :30]}, [0.25])
        expected.lerp_(version.float(), 0.25)
        expected_small.lerp_(version[:30, :30].float(), 0.25)
    assert torch.equal(averages.stack("w")[0], expected)
    assert torch.equal(averages.stack("s")[0], expected_small)


def test_new_values_in_the_same_memory_are_seen():
    values = parameters()
    averages = Averages(values, 1)
    for _ in range(3):
        for name, value in values.items():
            if name != "expanded":
                value.add_(1)
        averages.update(values, [1.0])
        assert all(torch.equal(averages.average(name, 0), value) for name, value in values.items())


def test_a_square_parameter_that_is_transposed_in_place_is_followed():
    parameter = torch.nn.Parameter(torch.randn(20, 20))
    averages = Averages({"w": parameter}, 1)
    averages.update({"w": parameter}, [1.0])
    parameter.data = parameter.data.t()  # the same address
    averages.update({"w": parameter}, [1.0])
    assert torch.equal(averages.average("w", 0), parameter.detach())


def test_averages_move_with_their_parameters():
    values = {"w": torch.randn(300, 300), "s": torch.randn(3), "stays": torch.randn(3)}
    averages = Averages(values, 2)
    averages.update(values, [1.0, 0.5])
    moved = {**values, "w": values["w"].to("meta"), "s": values["s"].to("meta")}
    averages.update(moved, [0.5, 0.5])
    assert averages.stack("w").is_meta
    assert averages.stack("s").is_meta
    assert torch.equal(averages.average("stays", 0), values["stays"])


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_averages_are_read_and_loaded_exactly(source, target):
    values = parameters()
    averages = Averages(values, 2, dtype=source)
    averages.update(values, [1.0, 0.5])
    stacks = {name: averages.stack(name).bfloat16().float() for name in values}
    other = Averages(values, 2, dtype=target, device="cpu")
    for name, stack in stacks.items():
        other.load(name, stack)
        assert torch.equal(other.stack(name), stack)
        assert torch.equal(other.average(name, 1), stack[1])
    other.close()


def test_loaded_averages_go_on_bit_for_bit():
    values = parameters()
    whole, first, second = Averages(values, 3), Averages(values, 3), Averages(values, 3)
    run(whole, values)
    run(first, values, WEIGHTS[:2])
    for name in values:
        second.load(name, first.stack(name))
    for number, row in list(enumerate(WEIGHTS))[2:]:
        second.update(changed(values, number), row)
    assert all(torch.equal(whole.stack(name), second.stack(name)) for name in values)


def test_what_the_training_needs_is_left_alone():
    parameter = torch.nn.Parameter(torch.ones(3))
    averages = Averages({"w": parameter}, 2)
    averages.update({"w": parameter}, [1.0, 0.5])
    assert not averages.stack("w").requires_grad
    assert parameter.requires_grad
    assert parameter.grad is None
    parameter.sum().backward()


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"w": torch.ones(2)}, "'v' was removed"),
        ({"w": torch.ones(2), "v": torch.ones(1), "x": torch.ones(1)}, "'x' was added"),
        ({"w": torch.ones(1), "v": torch.ones(1)}, r"'w' had shape \(2,\).* has \(1,\) now"),
        ({"w": torch.ones(2, dtype=torch.int64), "v": torch.ones(1)}, "'w' has dtype torch.int64"),
    ],
)
def test_other_parameters_are_refused_before_an_average_is_touched(update, sentence):
    averages = Averages({"v": torch.ones(1), "w": torch.ones(2)}, 1)
    with pytest.raises(TrackingError, match=sentence):
        averages.update(update, [1.0])
    assert not averages.stack("v").any()
    averages.update({"v": torch.ones(1), "w": torch.ones(2)}, [1.0])  # nothing is broken
    assert averages.stack("v").all()


def test_an_interrupted_update_leaves_averages_that_refuse_to_go_on(monkeypatch):
    values = parameters()
    averages = Averages(values, 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eager.EagerKernel, "_move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            averages.update(values, [1.0])
    with pytest.raises(TrackingError, match="interrupted between two tensors"):
        averages.update(values, [1.0])


def test_arguments_that_make_no_sense_are_refused():
    values = {"w": torch.ones(2)}
    with pytest.raises(ConfigError, match="kernel must be one of"):
        Averages(values, 1, kernel="fast")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        Averages(values, 1, dtype="float16")
    with pytest.raises(ConfigError, match="device must be None or 'cpu'"):
        Averages(values, 1, device="meta")
    with pytest.raises(ConfigError, match="2 weights are needed"):
        Averages(values, 2).update(values, [1.0])
    with pytest.raises(ConfigError, match="CUDA"):
        Averages(values, 1, kernel="triton")
    with pytest.raises(TrackingError, match="shape"):
        Averages(values, 1).load("w", torch.ones(1, 1))


def test_no_parameters_at_all_are_no_error():
    averages = Averages({}, 2)
    averages.update({}, [1.0, 1.0])
    assert list(averages.names) == []
