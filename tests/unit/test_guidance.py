"""Guidance: the formula, which steps it acts at, how often guides are evaluated, what does not fit."""

import math

import pytest
import torch
from torch import nn

from posthoc_ema.errors import ConfigError
from reference_trainer.guidance import (
    Guide,
    GuidedNetwork,
    guided_denoiser,
    guided_per_step,
    guided_steps,
    mixed_weights,
)
from reference_trainer.sampling import (
    SamplerConfig,
    evaluated,
    run_sampler,
    sample_images,
    sigma_schedule,
)


def constant(value, calls=None):
    """A denoiser that always answers `value` and notes the noise levels it is asked at."""

    def denoise(x, sigma, labels):
        if calls is not None:
            calls.append(float(sigma[0]))
        return torch.full_like(x, value)

    return denoise


class Flat(nn.Module):
    """A network that always answers `value`."""

    def __init__(self, value, label_dim=10, **changes):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))
        self.img_channels, self.img_resolution, self.label_dim = 1, 8, label_dim
        self.data_mean, self.data_scale = (0.0,), (1.0,)
        for name, changed in changes.items():
            setattr(self, name, changed)
        self.labels = []

    def forward(self, x, sigma, labels=None):
        self.labels.append(labels)
        return self.value.expand_as(x)


X, SIGMA = torch.zeros(2, 1, 8, 8), torch.ones(2)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0), (2.5, 6.0)])
def test_one_guide_gives_w_d_plus_1_minus_w_times_its_own(weight, expected):
    denoise = guided_denoiser(constant(3.0), [Guide(constant(1.0), weight)])
    assert torch.all(denoise(X, SIGMA, None) == expected)


def test_two_guides_add_up():
    guides = [Guide(constant(1.0), 1.5), Guide(constant(2.0), 3.0)]
    assert torch.all(guided_denoiser(constant(3.0), guides)(X, SIGMA, None) == 3 + 0.5 * 2 + 2 * 1)


def test_mixed_weights_go_from_one_guide_to_the_other():
    assert mixed_weights(2.1, 0.0) == pytest.approx((2.1, 1.0))
    assert mixed_weights(2.1, 1.0) == pytest.approx((1.0, 2.1))
    unconditional, weaker = mixed_weights(3.0, 0.25)
    assert (unconditional - 1) + (weaker - 1) == pytest.approx(3.0 - 1)


@pytest.mark.parametrize(
    ("interval", "first", "last"),
    [
        ((0.28, 2.90), 15, 21),
        ((0.60, 5.00), 13, 19),
        ((0.19, 1.61), 17, 22),
        ((0.0, 2.90), 15, 31),
        ((0.0009, 2.90), 15, 31),
        ((0.28, math.inf), 0, 21),
        ((0.0, math.inf), 0, 31),
        ((0.002, 100.0), 0, 30),
    ],
)
def test_intervals_are_moved_to_the_published_steps(interval, first, last):
    assert guided_steps(interval, sigma_schedule(32)) == range(first, last + 1)


@pytest.mark.parametrize("interval", [(81.0, 90.0), (0.30, 0.31), (0.0, 0.0009)])
def test_an_interval_without_a_step_is_refused(interval):
    with pytest.raises(ConfigError, match="holds no step of this sampler, whose 32 steps begin"):
        guided_steps(interval, sigma_schedule(32))


@pytest.mark.parametrize(
    ("interval", "evaluations"),
    [((0.28, 2.90), 14), ((0.19, 1.61), 12), ((0.0, math.inf), 63), ((0.0, 2.90), 33)],
)
def test_the_guide_is_evaluated_inside_its_interval_only(interval, evaluations):
    mine, its = [], []

    class Stepwise:
        def per_step(self, sigmas):
            return guided_per_step(
                constant(0, mine), [Guide(constant(1, its), 2.0, interval)], sigmas
            )

    run_sampler(Stepwise(), X, SamplerConfig(num_steps=32))
    assert (len(mine), len(its)) == (63, evaluations)


def test_both_evaluations_of_a_step_are_guided_or_neither():
    levels, sigmas = [], sigma_schedule(32).tolist()

    class Stepwise:
        def per_step(self, sigmas):
            guide = Guide(constant(1, levels), 2.0, (0.28, 2.90))
            return guided_per_step(constant(0), [guide], sigmas)

    run_sampler(Stepwise(), X, SamplerConfig(num_steps=32))
    expected = [level for i in range(15, 22) for level in (sigmas[i], sigmas[i + 1])]
    assert levels == pytest.approx(expected)  # the last level, 0.283, is an end of a guided step


@pytest.mark.parametrize("guides", [[], [Guide(constant(9.0), 1.0, (50.0, 51.0))]])
def test_without_guidance_the_main_denoiser_stays_itself(guides):
    main = constant(0)
    assert guided_per_step(main, guides, sigma_schedule(8).tolist()) == [main] * 8


def test_each_guide_has_an_interval_of_its_own():
    low, high = [], []
    guides = [Guide(constant(1, low), 2.0, (0.0, 1.0)), Guide(constant(1, high), 2.0, (1.0, 80.0))]
    steps = guided_per_step(constant(0), guides, [4.0, 2.0, 1.0, 0.5, 0.0])
    for denoise in steps:
        denoise(X, SIGMA, None)
    assert (len(high), len(low)) == (2, 2)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_must_be_finite(weight):
    with pytest.raises(ConfigError, match="weight must be a finite number"):
        Guide(constant(0), weight)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_interval_must_rise(interval):
    with pytest.raises(ConfigError, match="two rising noise levels"):
        Guide(constant(0), 2.0, interval)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Flat(0, img_resolution=16), "images of resolution 16, the main network 8"),
        (Flat(0, img_channels=3), "images of channels 3, the main network 1"),
        (Flat(0, data_mean=(0.1,)), r"data\.mean is 0\.1, the main network's 0"),
        (Flat(0, data_scale=(2.0,)), r"data\.scale is 2, the main network's 1"),
        (Flat(0, label_dim=7), "the guide has 7 classes, the main network has 10 classes"),
    ],
)
def test_a_guide_of_other_images_is_refused_and_what_differs_is_said(guide, message):
    with pytest.raises(ConfigError, match=message):
        GuidedNetwork(Flat(0), [Guide(guide, 2.0)])


def test_a_guide_with_classes_does_not_fit_a_network_without():
    with pytest.raises(ConfigError, match="the main network has no classes"):
        GuidedNetwork(Flat(0, label_dim=0), [Guide(Flat(0), 2.0)])


def test_one_number_for_all_channels_equals_one_for_each():
    many = {"img_channels": 2, "data_mean": (0.5, 0.5), "data_scale": torch.tensor([2.0, 2.0])}
    one = {"img_channels": 2, "data_mean": 0.5, "data_scale": 2.0}
    assert GuidedNetwork(Flat(0, **many), [Guide(Flat(0, **one), 2.0)]).img_channels == 2


def test_a_guided_network_is_sampled_like_a_network():
    main, guide = Flat(0.0), Flat(-0.1, label_dim=0)
    images = sample_images(GuidedNetwork(main, [Guide(guide, 3.0)]), range(5), num_steps=4)
    assert images.shape == (5, 1, 8, 8)
    assert set(images.reshape(-1).tolist()) == {int(127.5 * 0.2 + 128)}
    assert len(main.labels) == len(guide.labels) == 7
    assert all(labels is given for labels, given in zip(main.labels, guide.labels, strict=True))


def test_a_guided_network_is_evaluated_in_the_modes_of_its_members_restored():
    main, guide = Flat(0.0).train(), Flat(0.0).eval()
    sample_images(GuidedNetwork(main, [Guide(guide, 3.0)]), [0], num_steps=2)
    assert (main.training, guide.training) == (True, False)


def test_a_guided_network_folds_every_member(tiny_network):
    guided = GuidedNetwork(tiny_network(10), [Guide(tiny_network(0), 2.0, (0.1, 5.0))])
    folded = evaluated(guided, "bfloat16")
    assert [member.dtype for member in folded.members] == [torch.bfloat16] * 2
    assert (folded.guides[0].weight, folded.guides[0].interval) == (2.0, (0.1, 5.0))
    assert [member.dtype for member in guided.members] == [torch.float32] * 2


def test_an_evaluation_copy_is_not_folded_again(tiny_network):
    folded = evaluated(tiny_network(10))
    assert evaluated(folded) is folded
    assert evaluated(folded, "float32") is folded
    with pytest.raises(ConfigError, match="does not or is folded already"):
        evaluated(folded, "bfloat16")
    with pytest.raises(ConfigError, match="precision must be one of float32"):
        evaluated(folded, "int8")
    with pytest.raises(ConfigError, match="this Flat does not"):
        evaluated(Flat(0), "float32")


def test_guided_images_equal_those_of_the_formula(tiny_network):
    main, guide = tiny_network(10), tiny_network(0)
    images = sample_images(GuidedNetwork(main, [Guide(guide, 2.0)]), range(4), num_steps=4)

    class Formula(nn.Module):
        img_channels, img_resolution, label_dim = 1, 8, 10
        data_mean, data_scale = main.data_mean, main.data_scale

        def __init__(self):
            super().__init__()
            self.main = main

        def forward(self, x, sigma, labels=None):
            return 2 * main.eval()(x, sigma, labels) - guide.eval()(x, sigma)

    expected = sample_images(Formula(), range(4), num_steps=4)
    assert abs(images.astype(int) - expected.astype(int)).max() <= 1


@pytest.fixture
def tiny_network():
    from reference_trainer.config import NetworkConfig
    from reference_trainer.precond import Precond
    from reference_trainer.presets import DIGITS

    def make(label_dim):
        torch.manual_seed(label_dim)
        config = NetworkConfig(
            img_resolution=8,
            img_channels=1,
            label_dim=label_dim,
            model_channels=8,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
        )
        network = Precond(config, DIGITS)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "gain" in name:
                    parameter.fill_(0.5)
        return network

    return make
