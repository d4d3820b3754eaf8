import sys

import numpy as np
import pytest

from posthoc_ema.errors import ConfigError
from reference_trainer.data import load_dataset


def test_digits_have_the_documented_shapes_and_types():
    dataset = load_dataset("digits")
    assert (dataset.images.shape, dataset.images.dtype) == ((1797, 1, 8, 8), np.uint8)
    assert (dataset.labels.shape, dataset.labels.dtype) == ((1797,), np.int64)
    assert (
        dataset.name,
        dataset.label_dim,
        dataset.resolution,
        dataset.channels,
        len(dataset),
    ) == (
        "digits",
        10,
        8,
        1,
        1797,
    )


def test_digits_use_the_whole_range_of_8_bits_in_17_even_levels():
    levels = np.unique(load_dataset("digits").images)
    assert levels.tolist() == np.round(np.arange(17) * 255 / 16).tolist()


def test_digits_hold_every_class():
    assert np.bincount(load_dataset("digits").labels).min() > 170


def test_digits_without_scikit_learn_name_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'posthoc-ema\[trainer\]'"):
        load_dataset("digits")


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'digts'\. Did you mean 'digits'"):
        load_dataset("digts")
