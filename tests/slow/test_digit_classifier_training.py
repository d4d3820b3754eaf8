import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reference_trainer.data import load_dataset
from reference_trainer.metrics.digit_classifier import (
    WEIGHTS_FILE,
    classifier_card,
    load_digit_classifier,
)
from reference_trainer.metrics.train_digit_classifier import card, train


def test_training_again_gives_the_shipped_classifier():
    """Bit-equal on the kind of machine that made it; other instruction sets round differently."""
    shipped, again = load_digit_classifier(), train()
    images = torch.tensor(load_dataset("digits").images)
    difference = (shipped.features(images) - again.features(images)).abs().max()
    assert difference < 1e-2  # measured: 3e-4 with SSE4 arithmetic, 7 with another seed
    assert card(again)["test_accuracy"] == pytest.approx(
        classifier_card()["test_accuracy"], abs=0.004
    )


def test_training_is_deterministic():
    first, second = train(epochs=3).state_dict(), train(epochs=3).state_dict()
    assert set(first) == set(load_file(WEIGHTS_FILE))
    assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first)


def test_training_leaves_threads_and_random_state_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(epochs=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
