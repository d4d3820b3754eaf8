import numpy as np
import pytest
import torch

from posthoc_ema.errors import ConfigError, MetricError
from reference_trainer.data import load_dataset
from reference_trainer.metrics import FeatureStatistics, evaluate_images, frechet_distance
from reference_trainer.metrics.digit_classifier import (
    FEATURE_DIM,
    WEIGHTS_FILE,
    classifier_card,
    digit_features,
    digit_reference_statistics,
    held_out,
    load_digit_classifier,
)
from reference_trainer.metrics.train_digit_classifier import held_out_accuracy, shifted


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def noisy(images, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def statistics(images):
    return FeatureStatistics.empty(FEATURE_DIM).updated(digit_features(images))


def test_shipped_classifier_has_the_stated_test_accuracy():
    card = classifier_card()
    accuracy = held_out_accuracy(load_digit_classifier())
    assert accuracy >= 0.985
    # Other processors round differently; one digit of 359 may change sides.
    assert accuracy == pytest.approx(card["test_accuracy"], abs=1.5 / card["test_images"])


def test_shipped_classifier_is_small_and_frozen():
    classifier = load_digit_classifier()
    assert sum(p.numel() for p in classifier.parameters()) == 28_426
    assert WEIGHTS_FILE.stat().st_size < 150_000
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_split_holds_out_every_fifth_digit():
    assert np.flatnonzero(held_out(12)).tolist() == [4, 9]


def test_features_are_float64_and_do_not_depend_on_the_batch(digits):
    features = digit_features(digits.images)
    assert (features.shape, features.dtype) == ((1797, 48), np.float64)
    assert digit_features(digits.images[1000:1003]) == pytest.approx(features[1000:1003], abs=1e-5)
    assert digit_features(digits.images[:0]).shape == (0, 48)


def test_reference_covers_all_digits_with_full_rank():
    reference = digit_reference_statistics()
    assert reference.count == 1797
    assert np.linalg.eigvalsh(reference.covariance)[0] > 1e-3


def test_real_digits_have_distance_zero_and_their_own_classes(digits):
    result = evaluate_images(digits.images, labels=digits.labels)
    assert result["fd"] < 1e-9
    assert result["num_images"] == 1797
    assert result["accuracy"] > 0.99


def test_accuracy_is_given_only_with_labels(digits):
    assert set(evaluate_images(digits.images[:10])) == {"fd", "num_images"}
    wrong = (digits.labels[:100] + 1) % 10
    assert evaluate_images(digits.images[:100], labels=wrong)["accuracy"] < 0.05


def test_distance_tells_real_digits_from_degraded_ones(digits):
    """Odd against even digits is the noise floor; it must lie far below any visible damage."""
    odd, even = statistics(digits.images[1::2]), statistics(digits.images[::2])
    floor = frechet_distance(odd, even)
    damaged = frechet_distance(statistics(noisy(digits.images[1::2], 40)), even)
    assert floor < 0.8
    assert damaged > 6 * floor


def test_distance_grows_with_the_damage(digits):
    distances = [evaluate_images(noisy(digits.images, s))["fd"] for s in (0, 5, 10, 20, 40, 80)]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[-3]


def test_distance_sees_a_missing_class(digits):
    result = evaluate_images(digits.images[digits.labels != 3])
    assert result["fd"] > 1.5


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 8, 8), np.uint8),
        np.zeros((4, 3, 8, 8), np.uint8),
        np.zeros((4, 1, 16, 16), np.uint8),
        np.zeros((4, 1, 8, 8), np.float32),
    ],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(MetricError, match=r"needs uint8 images of shape \[n, 1, 8, 8\], got"):
        evaluate_images(images)


def test_one_image_is_not_enough(digits):
    with pytest.raises(MetricError, match="at least 2 images, got 1"):
        evaluate_images(digits.images[:1])


def test_labels_must_be_one_per_image(digits):
    with pytest.raises(MetricError, match=r"one per image, got shape \[3\] for 4 images"):
        evaluate_images(digits.images[:4], labels=[1, 2, 3])


def test_an_unknown_metric_names_the_nearest(digits):
    with pytest.raises(ConfigError, match=r"got 'fdd'\. Did you mean 'fid'"):
        evaluate_images(digits.images, "fdd")


def test_shifts_move_by_at_most_one_pixel_and_fill_with_black():
    image = np.zeros((200, 1, 8, 8), np.uint8)
    image[:, :, 4, 4] = 7
    rows, columns = np.nonzero(shifted(image, np.random.default_rng(0)).sum(axis=(0, 1)))
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (r, c) for r in (3, 4, 5) for c in (3, 4, 5)
    }


def test_evaluation_leaves_the_random_state_alone(digits):
    before = torch.get_rng_state()
    evaluate_images(digits.images[:10])
    assert torch.equal(before, torch.get_rng_state())
