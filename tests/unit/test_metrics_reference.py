import json
import pickle  # noqa: TID251  # writes the files that the importer reads

import numpy as np
import pytest
import safetensors.numpy
import torch

from posthoc_ema.errors import ConfigError, MetricError, SnapshotFormatError
from posthoc_ema.tensor_files import write_tensors
from reference_trainer.data import load_dataset
from reference_trainer.metrics import (
    FeatureStatistics,
    Moments,
    Reference,
    import_references,
    make_references,
    open_evaluator,
    open_extractor,
    read_references,
    write_references,
)
from reference_trainer.metrics.reference import KEY, check_fits


def moments(dim=3, seed=0, count=100):
    x = np.random.default_rng(seed).normal(size=(count, dim))
    return FeatureStatistics.empty(dim).updated(x).moments


def published(**changes):
    """The table of a published file, with small matrices."""
    fid, dinov2 = moments(4), moments(3, 1)
    return {
        "num_images": 1281167,
        "fid": {"mu": fid.mean, "sigma": fid.covariance},
        "fd_dinov2": {"mu": dinov2.mean, "sigma": dinov2.covariance},
        **changes,
    }


def write_pickle(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def same(a, b):
    return np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance)


def test_statistics_come_back_as_they_were_written(tmp_path):
    features = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    written = {
        "inception": Reference("inception", moments(4), None, "ab" * 16, "imagenet", "f00d"),
        "dinov2": Reference("dinov2", moments(3), features, "", "img512.pkl", ""),
    }
    path = tmp_path / "ref.safetensors"
    write_references(path, written)
    read = read_references(path)
    assert list(read) == list(written)
    for name, reference in written.items():
        assert same(read[name].moments, reference.moments)
        assert read[name].moments.count == 100
        for key in ("extractor", "weights_hash", "source", "fingerprint"):
            assert getattr(read[name], key) == getattr(reference, key)
    assert read["inception"].features is None
    assert np.array_equal(read["dinov2"].features, features)


def test_the_file_is_an_ordinary_safetensors_file(tmp_path):
    path = tmp_path / "ref.safetensors"
    write_references(path, {"dinov2": Reference("dinov2", moments())})
    tensors = safetensors.numpy.load_file(path)
    assert {name: t.dtype.name for name, t in tensors.items()} == {
        "dinov2.mean": "float64",
        "dinov2.covariance": "float64",
    }


def test_made_statistics_are_those_of_the_features():
    digits, extractor = load_dataset("digits"), open_extractor("digits")
    made = make_references(digits, [extractor], features=40, batch_size=256)["digits"]
    features = extractor(torch.tensor(digits.images)).double().numpy()
    assert made.moments.count == 1797
    assert made.moments.mean == pytest.approx(features.mean(axis=0), rel=1e-6)
    assert made.moments.covariance == pytest.approx(np.cov(features.T), rel=1e-5, abs=1e-6)
    assert (made.weights_hash, made.source) == (extractor.weights_hash, "digits")
    assert made.fingerprint == digits.fingerprint
    assert made.features.shape == (40, 48)
    nearest = np.abs(features[None] - made.features[:, None]).max(axis=2).min(axis=1)
    assert nearest.max() < 1e-4  # they are features of 40 of the images
    assert len(np.unique(made.features, axis=0)) == 40


def test_published_pickles_are_taken_over(tmp_path):
    for protocol in (2, 4, 5):
        table = published()
        read = import_references(write_pickle(tmp_path / "img512.pkl", table, protocol))
        assert list(read) == ["inception", "dinov2"]
        assert read["inception"].moments.count == 1281167
        assert np.array_equal(read["inception"].moments.mean, table["fid"]["mu"])
        assert np.array_equal(read["dinov2"].moments.covariance, table["fd_dinov2"]["sigma"])
        assert (read["dinov2"].source, read["dinov2"].weights_hash) == ("img512.pkl", "")


def test_statistics_of_earlier_tools_are_taken_over(tmp_path):
    path, expected = tmp_path / "stats.npz", moments(4)
    np.savez(path, mu=expected.mean, sigma=expected.covariance)
    read = import_references(path)
    assert list(read) == ["inception"]
    assert same(read["inception"].moments, expected)


class Hostile:
    def __init__(self, canary):
        self.command = f"touch {canary}"

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["all", "entry", "array"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, place):
    canary = tmp_path / "canary"
    hostile = Hostile(canary)
    value = {
        "all": hostile,
        "entry": published(fid=hostile),
        "array": published(fid={"mu": hostile, "sigma": np.eye(3)}),
    }[place]
    path = write_pickle(tmp_path / "ref.pkl", value)
    with pytest.raises(
        MetricError, match=r"ref\.pkl: .*calling (posix|nt)\.system, which is not done"
    ):
        import_references(path)
    assert not canary.exists()


def bad_tables():
    eye = np.eye(3)
    yield {"inception": {}}, "neither fid nor fd_dinov2"
    yield [1, 2], "it is no table"
    yield published(num_images=-1), "num_images"
    yield published(fid=3), "its 'fid' is no table"
    yield published(fid={"mu": np.zeros(3)}), "fid.sigma is no array"
    yield published(fid={"mu": np.zeros(2), "sigma": eye}), r"mean \[2\] and covariance \[3, 3\]"
    yield published(fid={"mu": np.full(3, np.nan), "sigma": eye}), "NaN or infinity"
    yield published(fid={"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}), "not symmetric"
    yield published(fid={"mu": np.zeros(3), "sigma": -eye}), "negative variance"
    yield published(fid={"mu": np.zeros(3, int), "sigma": eye}), "int64 and float64, not floats"


@pytest.mark.parametrize(("table", "message"), list(bad_tables()))
def test_pickles_without_usable_statistics_are_refused(tmp_path, table, message):
    path = write_pickle(tmp_path / "ref.pkl", table)
    with pytest.raises(MetricError, match=message):
        import_references(path)


def test_damaged_files_are_refused_by_name(tmp_path):
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(pickle.dumps(published())[:100])
    with pytest.raises(SnapshotFormatError, match=r"cut\.pkl"):
        import_references(cut)
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(MetricError, match=r"bad\.npz"):
        import_references(bad)
    with pytest.raises(MetricError, match=r"gone\.npz: the file is missing"):
        import_references(tmp_path / "gone.npz")
    objects = tmp_path / "objects.npz"
    np.savez(objects, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(MetricError, match=r"objects\.npz.*allow_pickle"):
        import_references(objects)
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.zeros(3))
    with pytest.raises(MetricError, match=r"other\.npz.*mu"):
        import_references(other)
    with pytest.raises(MetricError, match=r"are \.pkl or \.npz files"):
        import_references(tmp_path / "images.zip")


def test_a_file_of_weights_is_no_reference(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": np.zeros(3, np.float32)})
    with pytest.raises(MetricError, match="holds no reference statistics"):
        read_references(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "record is malformed"),
        ({"schema": 1}, "record is malformed"),
        ({"schema": 1, "entries": {"vgg": {}}}, "record is malformed"),
        ({"schema": 9, "entries": {}}, "schema 9, this version reads up to 1"),
        ({"schema": 1, "entries": {"dinov2": 3}}, "record is malformed"),
    ],
)
def test_references_with_a_bad_record_are_refused(tmp_path, record, message):
    path = tmp_path / "ref.safetensors"
    text = record if isinstance(record, str) else json.dumps(record)
    write_tensors(path, {"dinov2.mean": np.zeros(3)}, {KEY: text})
    with pytest.raises(MetricError, match=message):
        read_references(path)


def test_references_without_their_tensors_are_refused(tmp_path):
    path = tmp_path / "ref.safetensors"
    write_references(path, {"dinov2": Reference("dinov2", moments())})
    with_record = {KEY: safetensors.safe_open(path, "np").metadata()[KEY]}
    write_tensors(path, {"dinov2.mean": np.zeros(3)}, with_record)
    with pytest.raises(MetricError, match="no mean and covariance of dinov2"):
        read_references(path)
    tensors = {"dinov2.mean": np.zeros(3), "dinov2.covariance": np.eye(3)}
    write_tensors(path, {**tensors, "dinov2.features": np.zeros((2, 4), np.float32)}, with_record)
    with pytest.raises(MetricError, match="another size than their mean"):
        read_references(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SnapshotFormatError, match=r"ref\.safetensors"):
        read_references(path)


def test_a_reference_of_another_extractor_or_other_weights_says_both():
    digits = open_extractor("digits")
    with pytest.raises(MetricError, match=r"of dinov2 \(3 features\).*digits \(48 features\)"):
        check_fits(Reference("dinov2", moments()), digits, "ref.safetensors")
    other = Reference("digits", moments(48), None, "0" * 32)
    with pytest.raises(MetricError, match=rf"weights 0+, .* weights {digits.weights_hash[:12]}"):
        check_fits(other, digits, "ref.safetensors")
    check_fits(Reference("digits", moments(48)), digits, "of unknown weights")


def test_a_metric_without_its_reference_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"metric fid needs .* none is given\. Make them with"):
        open_evaluator("fid")
    path = tmp_path / "ref.safetensors"
    write_references(path, {"dinov2": Reference("dinov2", moments())})
    with pytest.raises(
        ConfigError, match=r"extractor inception, and .* holds statistics of dinov2"
    ):
        open_evaluator("fid", reference=path)
    with pytest.raises(ConfigError, match=r"kid-dinov2 compares single features.*--features 50000"):
        open_evaluator("kid-dinov2", reference=path)
    with pytest.raises(ConfigError, match="weights are given for inception, and the metrics use"):
        open_evaluator("fd-digits", weights={"inception": "x"})


def test_moments_are_plain_records():
    record = Moments(2, np.zeros(1), np.eye(1))
    assert (record.count, record.mean.tolist(), record.covariance.tolist()) == (2, [0.0], [[1.0]])
