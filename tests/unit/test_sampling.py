import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from posthoc_ema.errors import ConfigError
from reference_trainer.sampling import (
    heun_sample,
    image_grid,
    sample_images,
    save_png,
    seeded_noise,
    sigma_schedule,
    to_pixels,
)

MEAN, STD = 0.3, 0.5


def gaussian_denoiser(x, sigma, labels):
    """The ideal denoiser of data distributed as N(MEAN, STD^2)."""
    variance = sigma.reshape(-1, 1, 1, 1) ** 2
    return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def gaussian_flow(noise, sigma_max=80.0):
    """The exact end point of the flow for that data."""
    return MEAN + (sigma_max * noise - MEAN) * STD / (STD**2 + sigma_max**2) ** 0.5


def worst_error(num_steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 1, 2, 2, generator=generator, dtype=torch.float64)
    samples = heun_sample(gaussian_denoiser, noise.to(dtype), num_steps=num_steps)
    return float((samples - gaussian_flow(noise)).abs().max())


class ClassPainter(nn.Module):
    """Denoises anything to a flat image whose pixel value is 20 times its class."""

    def __init__(self, label_dim=10):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(20.0))
        self.img_channels, self.img_resolution, self.label_dim = 1, 8, label_dim
        self.data_mean, self.data_scale = (-0.4,), (0.7,)
        self.modes = []

    def forward(self, x, sigma, labels=None):
        assert sigma.shape == (len(x),)
        self.modes.append(self.training)
        classes = torch.zeros(len(x)) if labels is None else labels
        pixels = self.level * classes.reshape(-1, 1, 1, 1)
        return ((pixels / 127.5 - 1 - self.data_mean[0]) * self.data_scale[0]).expand_as(x)


class PixelMixer(ClassPainter):
    """Keeps the noise in the picture, so that seeds are told apart."""

    def forward(self, x, sigma, labels=None):
        return torch.tanh(x / sigma.reshape(-1, 1, 1, 1)) * 0.4 + 0.03 * labels.reshape(-1, 1, 1, 1)


def test_schedule_has_the_published_levels():
    published = [80, 66.93, 55.74, 46.19, 38.07, 31.22, 25.45, 20.61, 16.59, 13.26, 10.52, 8.282]
    published += [6.464, 4.999, 3.829, 2.902, 2.174, 1.609, 1.174, 0.8446, 0.5977, 0.4154, 0.2830]
    published += [0.1886, 0.1226, 0.07743, 0.04736, 0.02792, 0.01576, 0.008453, 0.004267, 0.002, 0]
    assert sigma_schedule(32) == pytest.approx(published, rel=4e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"num_steps": 4, "sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0.0"),
        ({"num_steps": 4, "sigma_max": float("inf")}, "got 0.002 and inf"),
        ({"num_steps": 4, "sigma_max": float("nan")}, "got 0.002 and nan"),
        ({"num_steps": 4, "rho": 0.0}, "rho must be positive, got 0.0"),
    ],
)
def test_schedule_names_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sigma_schedule(**arguments)


def test_heun_follows_the_exact_flow_of_gaussian_data():
    assert worst_error(32) < 0.03
    assert worst_error(512) < 1.5e-4


def test_heun_is_of_second_order():
    ratios = [worst_error(n) / worst_error(2 * n) for n in (32, 64, 128)]
    assert all(3 < ratio < 5 for ratio in ratios)


def test_heun_in_float32_agrees_with_float64():
    assert worst_error(32, torch.float32) == pytest.approx(worst_error(32), abs=1e-5)


@pytest.mark.parametrize("num_steps", [2, 5, 32])
def test_heun_evaluates_the_denoiser_2n_minus_1_times(num_steps):
    levels = []

    def denoise(x, sigma, labels):
        levels.append(float(sigma[0]))
        return x * 0

    heun_sample(denoise, torch.zeros(1, 1, 2, 2), num_steps=num_steps)
    assert len(levels) == 2 * num_steps - 1
    assert min(levels) > 0


def test_heun_passes_the_labels_and_keeps_the_dtype():
    seen = []

    def denoise(x, sigma, labels):
        seen.append(labels)
        return (x * 0).to(torch.float64)

    labels = torch.tensor([3])
    samples = heun_sample(denoise, torch.ones(1, 1, 2, 2), labels=labels, num_steps=3)
    assert all(given is labels for given in seen)
    assert samples.dtype == torch.float32


def test_a_seed_means_the_same_noise_and_label_in_any_batch():
    noise, labels = seeded_noise([4, 9, 2], (1, 8, 8), 10)
    for i, seed in enumerate([4, 9, 2]):
        alone, label = seeded_noise([seed], (1, 8, 8), 10)
        assert torch.equal(noise[i : i + 1], alone)
        assert torch.equal(labels[i : i + 1], label)


def test_labels_are_drawn_after_the_noise_and_cover_all_classes():
    unconditional, none = seeded_noise(range(2000), (1, 8, 8), 0)
    noise, labels = seeded_noise(range(2000), (1, 8, 8), 10)
    assert none is None
    assert torch.equal(noise, unconditional)
    assert torch.bincount(labels, minlength=10).min() > 140
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_every_pixel_value_survives_the_way_to_the_network_and_back():
    pixels = torch.arange(256)
    x = (pixels / 127.5 - 1 + 0.39) * 0.665
    assert to_pixels(x, data_mean=(-0.39,), data_scale=(0.665,)).tolist() == pixels.tolist()


def test_pixels_outside_the_range_are_clipped():
    assert to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_samples_show_the_classes_that_were_asked_for():
    images = sample_images(ClassPainter(), range(5), num_steps=2, labels=[0, 1, 5, 9, 9])
    assert images.shape == (5, 1, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [0, 20, 100, 180, 180]


def test_samples_without_labels_show_the_class_of_their_seed():
    _, labels = seeded_noise(range(6), (1, 8, 8), 10)
    images = sample_images(ClassPainter(), range(6), num_steps=2)
    assert images[:, 0, 0, 0].tolist() == (20 * labels).tolist()


def test_samples_do_not_depend_on_the_batch_size():
    network = PixelMixer()
    whole = sample_images(network, range(7), batch_size=7, num_steps=4)
    parts = sample_images(network, range(7), batch_size=3, num_steps=4)
    assert np.array_equal(whole, parts)
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7


def test_sampling_evaluates_in_eval_mode_and_restores_the_mode():
    network = ClassPainter().train()
    sample_images(network, [0], num_steps=2)
    assert network.training
    assert network.modes == [False] * 3


def test_sampling_reports_its_progress():
    calls = []
    sample_images(
        ClassPainter(), range(5), batch_size=2, num_steps=2, on_batch=lambda *a: calls.append(a)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("network", "seeds", "options", "message"),
    [
        (ClassPainter(), [1], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (ClassPainter(), [], {}, "seeds must name at least one image"),
        (ClassPainter(), [1], {"labels": [1, 2]}, "labels must be one per seed"),
        (ClassPainter(), [1], {"labels": [10]}, r"labels must lie in 0\.\.9"),
        (ClassPainter(), [1], {"labels": [-1]}, r"labels must lie in 0\.\.9"),
        (ClassPainter(label_dim=0), [1], {"labels": [0]}, "unconditional"),
    ],
)
def test_sampling_names_bad_arguments(network, seeds, options, message):
    with pytest.raises(ConfigError, match=message):
        sample_images(network, seeds, **options)


def test_grid_lays_images_out_by_rows_and_enlarges_them():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) + 1
    assert image_grid(images, columns=2).tolist() == [[1, 2], [3, 255]]
    assert image_grid(images[:2], columns=2, scale=2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_grid_keeps_the_orientation_of_an_image():
    image = np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)
    assert np.array_equal(image_grid(image, columns=1), image[0, 0])


def test_grid_of_colour_images_has_three_channels():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    images[1, 2] = 9
    grid = image_grid(images, columns=2)
    assert grid.shape == (4, 8, 3)
    assert grid[0, 4].tolist() == [0, 0, 9]


@pytest.mark.parametrize(
    ("shape", "columns", "scale"),
    [((2, 2, 4, 4), 1, 1), ((4, 4), 1, 1), ((0, 1, 4, 4), 1, 1), ((1, 1, 4, 4), 0, 1)],
)
def test_grid_names_bad_arguments(shape, columns, scale):
    with pytest.raises(ConfigError, match="must"):
        image_grid(np.zeros(shape, np.uint8), columns, scale)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_png_keeps_every_pixel(tmp_path, shape):
    array = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    save_png(tmp_path / "grid.png", array)
    with Image.open(tmp_path / "grid.png") as image:
        assert np.array_equal(np.asarray(image), array)
