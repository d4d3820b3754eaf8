from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc_ema.profiles import gamma_from_sigma_rel, power_update_weight
from posthoc_ema.torch.averaging import Averages
from posthoc_ema.torch.averaging.rounding import StochasticRounding

CPU = torch.device("cpu")


def rounded(values, seed):
    rounding = StochasticRounding(CPU)
    rounding.start(seed)
    return rounding.round_(values.clone())


def test_values_are_rounded_to_a_neighbour_and_right_on_average():
    low, high = 1.0, 1.0 + 2.0**-7  # neighbours in bfloat16
    for share in (0.0, 0.1, 0.5, 0.97):
        values = torch.full((200_000,), low + share * (high - low))
        found = rounded(values, seed=3)
        assert set(found.unique().tolist()) <= {low, high}
        ups = (found == high).double().mean().item()
        assert ups == pytest.approx(share, abs=4 * np.sqrt(0.25 / 200_000))


def test_negative_values_are_rounded_without_bias_too():
    values = -torch.rand(200_000, generator=torch.Generator().manual_seed(0)) - 1
    error = (rounded(values, seed=1).double() - values.double()).mean().item()
    assert abs(error) < 4 * 2.0**-7 / np.sqrt(6 * 200_000)


def test_all_sixteen_bits_are_random_and_neighbours_are_independent():
    third = torch.full((100_000,), 1 + 2.0**-7 / 3)
    ups = (rounded(third, seed=0) > third).double()
    assert abs(np.corrcoef(ups[:-1], ups[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(ups[:-4], ups[4:])[0, 1]) < 0.02
    tiny = torch.full((2**20,), 1 + 2.0**-7 / 2**12)  # up once in 4096
    assert (rounded(tiny, seed=0) > 1).sum().item() == pytest.approx(256, abs=64)


def test_what_bfloat16_holds_stays_and_what_is_not_finite_too():
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-126, 2.0**-133, float("inf"), -float("inf")])
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    nans = payloads.view(torch.float32)
    for seed in range(50):
        assert torch.equal(rounded(exact, seed).view(torch.int32), exact.view(torch.int32))
        assert rounded(nans, seed).isnan().all()
        assert rounded(nans, seed).bfloat16().isnan().all()


def test_the_seed_decides():
    values = torch.rand(1001)
    assert torch.equal(rounded(values, 5), rounded(values, 5))
    assert not torch.equal(rounded(values, 5), rounded(values, 6))


def test_random_numbers_of_the_training_are_not_drawn():
    values = {"w": torch.rand(300, 300), "s": torch.rand(5)}
    averages = Averages(values, 2, dtype="bfloat16")
    before = torch.get_rng_state()
    averages.update(values, [0.5, 0.25])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_state_and_seed_give_the_same_bits():
    values = {"w": torch.rand(300, 300), "s": torch.rand(5)}
    one, other = (Averages(values, 2, dtype="bfloat16") for _ in range(2))
    one.update(values, [1.0, 0.5], seed=1)
    for name in values:
        other.load(name, one.stack(name))
    for seed in (2, 3):
        one.update(values, [0.1, 0.01], seed=seed)
        other.update(values, [0.1, 0.01], seed=seed)
    assert all(torch.equal(one.stack(name), other.stack(name)) for name in values)
    one.update(values, [0.1, 0.01], seed=4)
    other.update(values, [0.1, 0.01], seed=5)
    assert not torch.equal(one.stack("w"), other.stack("w"))


def test_updates_without_a_seed_are_rounded_differently_each_time():
    value = {"w": torch.full((1000,), 1 + 2.0**-8)}
    averages = Averages(value, 1, dtype="bfloat16")
    seen = []
    for _ in range(2):
        averages.update(value, [1.0])
        seen.append(averages.stack("w").clone())
    assert not torch.equal(*seen)


def test_bfloat16_averages_do_not_stall():
    """20 000 updates from step 20 000 on, from 1.0 towards 1.5: rounded to nearest they stay at 1.0."""
    gamma = float(gamma_from_sigma_rel([0.05])[0])
    count = 256
    averages = Averages({"w": torch.zeros(count)}, 1, dtype="bfloat16")
    averages.load("w", torch.ones(1, count))
    target = {"w": torch.full((count,), 1.5)}
    nearest, exact = torch.ones(1, dtype=torch.bfloat16), 1.0
    for time in range(20_001, 40_001):
        weight = power_update_weight(gamma, time, 1)
        averages.update(target, [float(weight)], seed=time)
        nearest = (nearest.float() + weight * (1.5 - nearest.float())).bfloat16()
        exact += weight * (1.5 - exact)
    assert nearest.item() == 1.0
    found = averages.average("w", 0)
    assert found.double().mean().item() == pytest.approx(exact, abs=2e-3)
    assert (found - exact).abs().max().item() < 0.06
