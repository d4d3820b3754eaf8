import threading

import numpy as np
import pytest
import torch

from posthoc_ema.errors import ConfigError, MetricError
from reference_trainer.data import load_dataset
from reference_trainer.metrics import (
    METRICS,
    blocks,
    choose,
    collect,
    confidence,
    evaluate_images,
    find_metrics,
    in_batches,
    of_dataset,
    open_evaluator,
    open_extractor,
)
from reference_trainer.metrics.collection import keep_all
from reference_trainer.metrics.feature_sets import kernel_distance, precision_recall

from .metric_weights import torch_fidelity  # noqa: F401  # loads it, whatever torchvision there is


class Ranks:
    """Processes as threads: sums and gathers wait for all of them."""

    def __init__(self, rank, shared):
        self.rank, self.world_size, self.is_main = rank, shared["size"], rank == 0
        self._shared = shared

    def _exchange(self, value):
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait()
        values = list(self._shared["values"])
        self._shared["barrier"].wait()
        return values

    def sum_(self, tensor):
        total = sum(self._exchange(tensor.clone()))
        return tensor.copy_(total)

    def gather(self, value):
        values = self._exchange(value)
        return values if self.is_main else None


def on_ranks(size, work):
    """What `work(ranks)` returns on each of `size` processes."""
    shared = {"size": size, "values": [None] * size, "barrier": threading.Barrier(size)}
    results = [None] * size

    def run(rank):
        results[rank] = work(Ranks(rank, shared))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_blocks_cover_everything_once_and_do_not_depend_on_the_processes():
    alone = list(blocks(23, 4))
    assert [i for start, stop in alone for i in range(start, stop)] == list(range(23))
    shared = on_ranks(3, lambda ranks: list(blocks(23, 4, ranks)))
    assert sorted(block for part in shared for block in part) == alone


@pytest.mark.parametrize("size", [2, 3])
def test_streaming_over_processes_equals_one(digits, size):
    images, labels = digits.images[:300], digits.labels[:300]
    extractor = open_extractor("digits")

    def work(ranks):
        batches = in_batches(images, labels, batch_size=32, ranks=ranks)
        return collect(batches, [extractor], keep={"digits": keep_all}, ranks=ranks)["digits"]

    alone = collect(
        in_batches(images, labels, batch_size=32), [extractor], keep={"digits": keep_all}
    )["digits"]
    first, *others = on_ranks(size, work)
    assert np.array_equal(first.features, alone.features)
    assert (first.right, first.statistics.count) == (alone.right, 300)
    assert first.statistics.mean == pytest.approx(alone.statistics.mean, rel=1e-13)
    assert first.statistics.covariance == pytest.approx(
        alone.statistics.covariance, rel=1e-11, abs=1e-13
    )
    for other in others:
        assert other.features is None
        assert np.array_equal(other.statistics.outer, first.statistics.outer)


def test_a_process_without_images_takes_part(digits):
    extractor = open_extractor("digits")

    def work(ranks):
        batches = in_batches(digits.images[:40], batch_size=20, ranks=ranks)
        return collect(batches, [extractor], keep={"digits": keep_all}, ranks=ranks)["digits"]

    first, _, last = on_ranks(3, work)
    assert (first.features.shape, last.statistics.count) == ((40, 48), 40)


def test_measuring_gives_numbers_on_the_first_process_only(digits):
    evaluator = open_evaluator("fd-digits,kid-digits,precision-recall-digits")

    def work(ranks):
        batches = in_batches(digits.images[::3], digits.labels[::3], ranks=ranks)
        return evaluator.measure(batches, ranks=ranks)

    numbers, nothing = on_ranks(2, work)
    assert nothing == {}
    assert list(numbers) == ["fd", "kid_digits", "precision_digits", "recall_digits", "accuracy"]
    alone = evaluator.measure(in_batches(digits.images[::3], digits.labels[::3]))
    assert numbers == pytest.approx(alone, rel=1e-9)
    assert numbers["precision_digits"] == 1.0
    assert numbers["accuracy"] > 0.99


def test_single_features_tell_bad_images_from_good_ones(digits):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 1, 8, 8), dtype=np.uint8)
    kid = {name: evaluate_images(x, "kid-digits")["kid_digits"] for name, x in (
        ("good", digits.images[::4]), ("bad", noise))}  # fmt: skip
    assert abs(kid["good"]) < 0.01 * kid["bad"]
    bad = evaluate_images(noise, "precision-recall-digits")
    assert max(bad["precision_digits"], bad["recall_digits"]) < 0.05
    # Few kinds of images: each is real, most real ones are missed.
    zeros = evaluate_images(digits.images[digits.labels == 0], "precision-recall-digits")
    assert zeros["precision_digits"] == 1.0
    assert zeros["recall_digits"] < 0.3


def test_kernel_distance_of_known_features_is_its_formula():
    """Unbiased MMD^2 with k(x, y) = (x y / d + 1)^3, on the one subset that there is."""
    rng = np.random.default_rng(1)
    x, y = (rng.normal(i, 1, (6, 4)).astype(np.float32) for i in (0, 1))

    def k(a, b):
        return (a.astype(float) @ b.T.astype(float) / 4 + 1) ** 3

    off = 1 - np.eye(6)
    expected = ((k(x, x) + k(y, y)) * off).sum() / 30 - 2 * k(x, y).mean()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_of_points_on_a_line():
    """Real points 0..9, third neighbours up to 3 away; generated ones at 0..4 and far off."""
    real = np.arange(10, dtype=np.float32)[:, None]
    generated = np.array([0, 1, 2, 3, 4, 100, 101, 102, 103, 104], np.float32)[:, None]
    precision, recall = precision_recall(generated, real)
    assert precision == 0.5
    # The balls of 0..4 reach 3, 2, 2, 2 and 3 far: up to 7; 8 and 9 are missed.
    assert recall == pytest.approx(0.8)


def test_too_few_images_are_refused(digits):
    with pytest.raises(MetricError, match="at least 2 images, got 1"):
        evaluate_images(digits.images[:1])
    with pytest.raises(MetricError, match="at least 2 generated images, got 1"):
        evaluate_images(digits.images[:1], "kid-digits")
    with pytest.raises(MetricError, match="at least 4 generated images, got 3"):
        evaluate_images(digits.images[:3], "precision-recall-digits")


def test_images_of_a_data_set_come_in_order_whatever_reads_them(digits):
    chosen = choose(len(digits), 100, seed=3)
    batches = list(of_dataset(digits, chosen, batch_size=7, threads=3))
    assert [batch.first for batch in batches] == list(range(0, 100, 7))
    assert np.array_equal(np.concatenate([b.images for b in batches]), digits.images[chosen])
    shared = on_ranks(2, lambda ranks: list(of_dataset(digits, chosen, batch_size=7, ranks=ranks)))
    again = sorted((b for part in shared for b in part), key=lambda batch: batch.first)
    assert np.array_equal(np.concatenate([b.images for b in again]), digits.images[chosen])


class Latents:
    name, kind = "some latents", "latents"


def test_labels_of_a_data_set_come_with_its_images(digits):
    evaluator = open_evaluator("fd-digits")
    chosen = choose(len(digits), 200)
    numbers = evaluator.measure(of_dataset(digits, chosen, batch_size=64))
    assert numbers["accuracy"] > 0.99


def test_features_that_are_not_finite_are_refused(digits):
    class Broken:
        name, feature_dim, device = "broken", 2, torch.device("cpu")

        def __call__(self, images):
            return torch.full((len(images), 2), torch.nan)

    with pytest.raises(MetricError, match="the broken features of the images hold NaN"):
        collect(in_batches(digits.images[:4]), [Broken()])


def test_latents_are_no_images():
    with pytest.raises(MetricError, match="some latents holds latents"):
        next(of_dataset(Latents(), np.arange(3)))


def test_an_unreadable_image_is_told_while_others_are_read_ahead():
    class Broken(Latents):
        kind, label_dim = "pixels", 0

        def read(self, indices):
            if 5 in indices:
                raise ConfigError("img00000005.png is damaged")
            return np.zeros((len(indices), 1, 8, 8), np.uint8), indices

    stream = of_dataset(Broken(), np.arange(40), batch_size=2, threads=2)
    with pytest.raises(ConfigError, match="img00000005"):
        list(stream)


def test_choosing_is_without_repetition_and_by_seed():
    first, again, other = choose(50, 20), choose(50, 20), choose(50, 20, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first.tolist())) == 20
    assert sorted(choose(5, 99).tolist()) == [0, 1, 2, 3, 4]


def test_metrics_are_found_by_name():
    assert [m.name for m in find_metrics("fid, kid,fid")] == ["fid", "kid"]
    assert find_metrics("precision-recall-dinov2")[0].keys == ("precision_dinov2", "recall_dinov2")
    keys = [key for metric in METRICS.values() for key in metric.keys]
    assert len(keys) == len(set(keys)) == 12
    with pytest.raises(ConfigError, match=r"got 'fd-dino'\. Did you mean 'fd-dinov2'"):
        find_metrics("fid,fd-dino")


def test_confidence_is_mean_ends_and_standard_error():
    over = confidence([2.0, 4.0, 9.0])
    assert (over.mean, over.min, over.max) == (5.0, 2.0, 9.0)
    assert over.standard_error == pytest.approx(np.std([2, 4, 9], ddof=1) / 3**0.5)
    assert np.isnan(confidence([1.0]).standard_error)
    with pytest.raises(MetricError, match="at least one"):
        confidence([])
