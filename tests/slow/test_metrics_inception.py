"""FID in the 2048 features of the whole Inception-v3, through the command line, against torch-fidelity."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reference_trainer.data import load_dataset

from ..unit.metric_weights import (  # noqa: TID252  # a file of the unit tests
    fidelity,
    write_inception,
)

pytestmark = pytest.mark.timeout(1200)
COUNT = 24


def write_folder(folder, images):
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"img{i:08d}.png")
    return folder


def test_fid_of_two_folders_is_that_of_torch_fidelity(tmp_path, monkeypatch, capfd):
    from phema.app import run

    monkeypatch.chdir(tmp_path)
    weights = write_inception(tmp_path / "inception.pth")
    photos = load_dataset("photos-32")
    chosen = np.random.default_rng(0).permutation(len(photos))[: 2 * COUNT]
    real = photos.read(np.sort(chosen[:COUNT]))[0]
    generated = photos.read(np.sort(chosen[COUNT:]))[0] // 2 + 40
    write_folder(tmp_path / "real", real)
    write_folder(tmp_path / "generated", generated)
    expected = fidelity(
        generated,
        real,
        weights,
        feature_layer_prc="2048",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=COUNT,
    )
    with_weights = ("--weights", str(weights), "--device", "cpu")
    options = ("--metric", "fid,kid,precision-recall", "--batch-size", "16", *with_weights)
    made = ("reference", "make", "real", "--out", "ref.safetensors", *options)
    assert run(made) == 0
    capfd.readouterr()
    assert run(("evaluate", "generated", "--ref", "ref.safetensors", *options, "--json")) == 0
    (row,) = json.loads(capfd.readouterr().out)["results"]
    assert row["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert row["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert (row["precision"], row["recall"]) == pytest.approx(
        (expected["precision"], expected["recall"]), abs=1e-9
    )


def test_a_reference_of_other_weights_is_refused_before_any_image_is_made(
    tmp_path, monkeypatch, capfd
):
    from phema.app import run

    monkeypatch.chdir(tmp_path)
    first = write_inception(tmp_path / "first.pth", seed=0)
    second = write_inception(tmp_path / "second.pth", seed=1)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    write_folder(tmp_path / "images", images)
    words = ("reference", "make", "images", "--out", "ref.safetensors", "--weights", str(first))
    assert run(words) == 0
    options = ("--metric", "fid", "--ref", "ref.safetensors", "--weights", str(second))
    assert run(("evaluate", "images", *options)) == 1
    message = capfd.readouterr().err
    assert "ref.safetensors: its inception features are of weights" in message
    assert message.count("\n") == 1
