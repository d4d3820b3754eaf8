"""Euler, Heun and churn against the exact flow and hand-made recursions of Gaussian data."""

import itertools
import math

import pytest
import torch

from posthoc_ema.errors import ConfigError
from reference_trainer.sampling import SamplerConfig, plan_steps, run_sampler

MEAN, STD = 0.3, 0.5


def gaussian_denoiser(x, sigma, labels):
    """The ideal denoiser of data distributed as N(MEAN, STD^2)."""
    variance = sigma.reshape(-1, 1) ** 2
    return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def flow(x, sigma, sigma_next):
    """The exact flow of that data between two noise levels."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_next**2) / (STD**2 + sigma**2))


def noise(n=64, seed=0):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst_error(method, num_steps):
    start = noise()
    config = SamplerConfig(method=method, num_steps=num_steps)
    return float(
        (run_sampler(gaussian_denoiser, start, config) - flow(80 * start, 80, 0)).abs().max()
    )


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_samplers_converge_to_the_exact_flow_at_their_order(method, order):
    errors = [worst_error(method, n) for n in (64, 128, 256)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.25)
    assert errors[-1] < {1: 0.03, 2: 6e-4}[order]


def test_a_plan_without_churn_follows_the_schedule():
    plan = plan_steps(SamplerConfig(num_steps=4, sigma_min=1.0, sigma_max=4.0, rho=1.0))
    assert [(s.sigma, s.sigma_hat, s.sigma_next, s.fresh) for s in plan] == [
        (4.0, 4.0, 3.0, 0.0),
        (3.0, 3.0, 2.0, 0.0),
        (2.0, 2.0, 1.0, 0.0),
        (1.0, 1.0, 0.0, 0.0),
    ]


def test_churn_raises_the_levels_inside_its_interval_by_the_published_factor():
    config = SamplerConfig(
        num_steps=4, sigma_min=1.0, sigma_max=4.0, rho=1.0, churn=0.8, churn_min=2.0, churn_max=3.0
    )
    plan = plan_steps(config)
    assert [s.sigma_hat for s in plan] == pytest.approx([4.0, 3.6, 2.4, 1.0])  # 1 + 0.8 / 4
    fresh = [0.0, math.sqrt(3.6**2 - 3**2), math.sqrt(2.4**2 - 2**2), 0.0]
    assert [s.fresh for s in plan] == pytest.approx(fresh)


def test_churn_is_bounded_by_the_square_root_of_two():
    plan = plan_steps(SamplerConfig(num_steps=4, churn=1e6, churn_noise=1.1))
    assert [s.sigma_hat / s.sigma for s in plan] == pytest.approx([math.sqrt(2)] * 4)
    assert [s.fresh / s.sigma for s in plan] == pytest.approx([1.1] * 4)


def test_euler_with_churn_equals_the_computation_by_hand():
    config = SamplerConfig(
        method="euler", num_steps=2, sigma_min=1.0, sigma_max=4.0, rho=1.0, churn=0.5
    )
    start, first, second = noise(3, 1), noise(3, 2), noise(3, 3)
    given = iter([first, second])
    result = run_sampler(gaussian_denoiser, start, config, fresh_noise=lambda: next(given))
    x = 4 * start + math.sqrt(5**2 - 4**2) * first
    x = x + (1 - 5) * (x - (STD**2 * x + 25 * MEAN) / (STD**2 + 25)) / 5
    x = x + math.sqrt(1.25**2 - 1) * second
    x = (STD**2 * x + 1.25**2 * MEAN) / (STD**2 + 1.25**2)  # a step down to 0 ends at D
    assert torch.allclose(result, x, rtol=1e-12)


def test_heun_with_churn_equals_the_computation_by_hand():
    config = SamplerConfig(num_steps=2, sigma_min=1.0, sigma_max=4.0, rho=1.0, churn=0.5)
    start, first, second = noise(3, 1), noise(3, 2), noise(3, 3)
    given = iter([first, second])
    result = run_sampler(gaussian_denoiser, start, config, fresh_noise=lambda: next(given))

    def slope(x, sigma):
        return (x - MEAN) * sigma / (STD**2 + sigma**2)

    x = 4 * start + 3 * first
    x = x + (1 - 5) * (slope(x, 5) + slope(x + (1 - 5) * slope(x, 5), 1)) / 2
    x = x + 0.75 * second
    x = x - 1.25 * slope(x, 1.25)
    assert torch.allclose(result, x, rtol=1e-12)


def test_churn_replaces_noise_that_was_lost():
    """Deterministic steps keep the variance that the start has; fresh noise brings the data's back."""
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(4000, 4, dtype=torch.float64)

    def spread(churn):
        config = SamplerConfig(num_steps=64, churn=churn)
        fresh = lambda: torch.randn(start.shape, generator=generator, dtype=start.dtype)  # noqa: E731
        return float(run_sampler(gaussian_denoiser, start, config, fresh_noise=fresh).std())

    assert spread(0) < 1e-12
    assert spread(20) == pytest.approx(STD, rel=0.03)


def test_fresh_noise_is_not_drawn_without_churn():
    config = SamplerConfig(num_steps=3, churn=10, churn_min=100, churn_max=200)
    run_sampler(gaussian_denoiser, noise(), config, fresh_noise=None)
    with pytest.raises(ConfigError, match="churn needs fresh_noise"):
        run_sampler(gaussian_denoiser, noise(), SamplerConfig(churn=1))


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [2, 5, 9])
def test_samplers_evaluate_as_often_as_they_say(method, num_steps):
    config = SamplerConfig(method=method, num_steps=num_steps)
    levels = []

    def denoise(x, sigma, labels):
        levels.append(float(sigma[0]))
        return x * 0

    run_sampler(denoise, noise(), config)
    assert (
        len(levels)
        == config.num_evaluations
        == (num_steps if method == "euler" else 2 * num_steps - 1)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rk4"}, "method must be heun or euler, got 'rk4'"),
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"rho": -1.0}, "rho must be positive"),
        ({"churn": -1.0}, "churn must be a number of at least 0, got -1.0"),
        ({"churn": math.nan}, "churn must be a number"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "0 <= churn_min <= churn_max, got 2.0 and 1.0"),
        ({"churn_noise": 0.0}, "churn_noise must be a positive number, got 0.0"),
        ({"dtype": "float16"}, "dtype must be float32 or float64, got 'float16'"),
    ],
)
def test_a_sampler_names_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SamplerConfig(**arguments)
