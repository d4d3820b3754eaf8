import numpy as np
import pytest

from posthoc_ema.errors import ConfigError
from reference_trainer.data import batch_indices


def test_each_epoch_holds_each_item_once():
    order = batch_indices(13, 0, 39, seed=3).reshape(3, 13)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(13), (3, 1)))


def test_epochs_and_seeds_have_different_orders():
    first, second = batch_indices(50, 0, 100, seed=0).reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_indices(50, 0, 50, seed=1))


@pytest.mark.parametrize("batch", [1, 7, 16, 100])
def test_a_resumed_run_draws_what_an_uninterrupted_one_would(batch):
    whole = batch_indices(10, 0, 200, seed=5)
    parts = [batch_indices(10, start, batch, seed=5) for start in range(0, 200, batch)]
    assert np.array_equal(np.concatenate(parts)[:200], whole)


def test_the_order_is_the_same_in_every_version():
    """Runs must be resumable after an upgrade, so the order itself is a contract."""
    assert batch_indices(10, 7, 8, seed=1).tolist() == [6, 3, 1, 5, 6, 3, 0, 7]


def test_positions_far_into_training_are_reached_directly():
    assert len(batch_indices(1797, 2_000_000_000_000, 64, seed=0)) == 64


def test_no_positions_give_no_items():
    items = batch_indices(10, 20, 0, seed=0)
    assert (items.shape, items.dtype) == ((0,), np.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 0), "num_items must be at least 1, got 0"),
        ((5, -1, 1, 0), "start must be at least 0, got -1"),
        ((5, 0, -1, 0), "count must be at least 0, got -1"),
        ((5, 0, 1, -2), "seed must be at least 0, got -2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        batch_indices(*arguments)
