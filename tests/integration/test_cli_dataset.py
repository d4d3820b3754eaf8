"""`phema dataset` end to end: photographs to a data set, to latents, to a run; kills; bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference_trainer.data import load_dataset

SMALL = (
    *("--preset", "digits-xs", "--set", "network.model_channels=8", "--set", "batch_size=16"),
    *("--set", "total_images=32", "--set", "track.snapshot_every=32"),
    *("--set", "checkpoint_every=32", "--set", "status_every=32", "--set", "data.mean=[0.0]"),
    *("--set", "data.scale=[1.0]"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """photos-64 at 16x16 as a zip, made without an interruption."""
    from phema.app import run

    path = tmp_path_factory.mktemp("made") / "whole.zip"
    assert run(["dataset", "convert", "photos-64", str(path), "--resolution", "16"]) == 0
    return path


def picture(side=8, channels=1):
    buffer = io.BytesIO()
    shape = (side, side, channels) if channels > 1 else (side, side)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def numbered(count=16, **changes):
    """Gray 8x8 images of ten classes; `changes` replaces files."""
    names = [f"00000/img{i:08d}.png" for i in range(count)]
    labels = json.dumps({"labels": [[name, i % 10] for i, name in enumerate(names)]})
    return {**dict.fromkeys(names, picture()), "dataset.json": labels, **changes}


# ---- convert, stats


def test_convert_says_what_it_made_and_stats_what_to_train_with(phema, made):
    shutil.copy(made, "photos.zip")
    again = phema("dataset", "convert", "photos-64", "photos.zip", "--resolution", 16)
    assert again.succeeded() == "photos.zip: complete with 5016 items, nothing to do\n"
    value = json.loads(phema("dataset", "stats", "photos.zip", "--json").succeeded())
    assert (value["num_items"], value["resolution"], value["channels"]) == (5016, 16, 3)
    assert (value["kind"], value["label_dim"], value["measured_items"]) == ("pixels", 8, 5016)
    pixels, _ = load_dataset("photos.zip").read(np.arange(5016))
    v = pixels / 127.5 - 1
    assert value["data"]["mean"] == pytest.approx(v.mean((0, 2, 3)))
    assert value["data"]["scale"] == pytest.approx(0.5 / v.std((0, 2, 3)))
    text = phema("dataset", "stats", "photos.zip", "--num-images", 100).succeeded()
    assert text.startswith("photos: 5016 pixels of 16x16x3, 8 classes\nchannel ")
    assert "--set 'data.mean=[" in text


def test_a_conversion_that_is_killed_goes_on_and_ends_the_same(start, phema, tmp_path, made):
    partial = tmp_path / ".a.zip.partial.zip"
    words = ("dataset", "convert", "photos-64", "a.zip", "--resolution", 16)
    running = start(*words)
    deadline = time.monotonic() + 90
    while not (partial.exists() and partial.stat().st_size > 500_000):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "a.zip").exists()
    done = json.loads(phema(*words, "--json").succeeded())
    assert 500 < done["already"] < 5016
    assert (tmp_path / "a.zip").read_bytes() == made.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(process, phema, made, tmp_path):
    words = ("dataset", "convert", "photos-64", "a.zip", "--resolution", 16)
    process(*words, file_limit=500_000).refused(
        "could not be written: File too large. Make room", "it goes on where it stopped"
    )
    out = phema(*words).succeeded()
    assert out.startswith("a.zip: 5016 items (")
    assert (tmp_path / "a.zip").read_bytes() == made.read_bytes()


def test_a_folder_is_not_converted_into_itself(phema, unchanged):
    Path("in").mkdir()
    Path("in/a.png").write_bytes(picture())
    with unchanged():
        for out in ("in", "in/out"):
            words = ("dataset", "convert", "in", out, "--resolution", 8)
            phema(*words).refused(f"{out} lies in in, which is read.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "a.zip", "--resolution", 8), "data set must be one of: digits"),
        (("no/where", "a.zip", "--resolution", 8), "data no/where does not exist"),
        (("digits", "a.zip", "--resolution", 12), "resolution must be a power of two, got 12"),
        (("digits", "a.zip", "--resolution", 8, "--crop", "x"), "crop must be one of adm, center"),
        (("digits", "a.zip", "--resolution", 8, "--labels", "x"), "has labels of its own"),
        (("digits", "digits.txt/a.zip", "--resolution", 8), "could not be written"),
    ],
)
def test_convert_refuses_what_it_cannot_do(phema, words, message):
    Path("digits.txt").write_text("")
    phema("dataset", "convert", *words).refused(message)


# ---- encode


@pytest.fixture
def vae(tmp_path):
    """A tiny random autoencoder: a latent pixel is 2x2 pixels, 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    model.save_pretrained(tmp_path / "vae")
    return "vae"


def test_photographs_become_latents_and_a_network_trains_on_them(phema, vae):
    files = {f"{kind}/{i}.png": picture(16, 3) for kind in "abc" for i in range(8)}
    pack("images.zip", files)
    value = json.loads(
        phema("dataset", "encode", "images.zip", "z.zip", "--vae", vae, "--json").succeeded()
    )
    assert value == {"out": "z.zip", "num_items": 24, "already": 0, "label_dim": 3}
    data = json.loads(phema("dataset", "stats", "z.zip", "--json").succeeded())["data"]
    settings = {f"data.{key}": number for key, number in data.items()} | {
        "data.path": "z.zip",
        "data.kind": "latents",
        "network.img_channels": 4,
        "network.label_dim": 3,
    }
    words = [word for k, v in settings.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    assert phema("train", *SMALL, *words, "--out", "run").code == 0
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if record.get("loss") is not None]
    assert losses
    assert np.isfinite(losses).all()


def test_encode_refuses_what_does_not_fit(phema, vae):
    pack("gray.zip", {"a.png": picture(1)})
    phema("dataset", "encode", "gray.zip", "z.zip", "--vae", vae).refused("Convert to a larger")
    words = ("dataset", "encode", "gray.zip", "z.zip", "--vae")
    Path("empty").mkdir()
    phema(*words, "empty").refused(
        "autoencoder 'empty' cannot be loaded", "Give a folder with config"
    )
    phema(*words, vae, "--input-range", "0-1").refused("input range must be one of 0..1, -1..1")


# ---- a run on files


def test_a_run_on_a_folder_equals_one_on_a_zip_of_it(phema, tmp_path):
    pack("a.zip", numbered())
    with zipfile.ZipFile("a.zip") as archive:
        archive.extractall("a")
    for name in ("a.zip", "a"):
        words = (*SMALL, "--set", f"data.path={name}", "--out", f"run-{name}")
        assert phema("train", *words).code == 0
    pair = [
        next((tmp_path / f"run-{n}" / "snapshots").glob("*raw.safetensors")) for n in ("a", "a.zip")
    ]
    first, second = (load_raw(path) for path in pair)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def load_raw(path):
    from safetensors.numpy import load_file

    return load_file(path)


NAME = "00000/img00000003.png"
BAD = {
    "corrupt image": (numbered(**{NAME: b"x"}), f"{NAME} is no image that can be read"),
    "wrong size": (numbered(**{NAME: picture(16)}), f"{NAME} is 16x16, the others are 8x8"),
    "wrong channels": (
        numbered(**{NAME: picture(8, 3)}),
        f"{NAME} has 3 channels, the first item has 1",
    ),
    "four channels": (numbered(**{NAME: picture(8, 4)}), f"{NAME} has 4 channels of mode RGBA"),
    "RGB for a gray network": (
        {"a.png": picture(8, 3)},
        "network.img_channels must be 3 for the data set",
    ),
    "resolution": ({"a.png": picture(16)}, "network.img_resolution must be 16 for the data set"),
    "no labels": (
        numbered(**{"dataset.json": '{"labels": null}'}),
        "has no labels, and network.label_dim is 10",
    ),
    "a missing label": (
        numbered(**{"dataset.json": json.dumps({"labels": [[NAME, 1]]})}),
        "dataset.json has no label for 00000/img00000000.png",
    ),
    "label out of range": (
        {"a.png": picture(), "dataset.json": json.dumps({"labels": [["a.png", 10]]})},
        "network.label_dim must be 11 for the data set",
    ),
    "negative label": (
        {"a.png": picture(), "dataset.json": json.dumps({"labels": [["a.png", -1]]})},
        "a label must be an integer",
    ),
    "path outside": (numbered(**{"../evil.png": picture()}), "a path outside of the zip"),
    "empty": ({"readme.txt": "nothing"}, "holds no images"),
}


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_train_on_bad_data_is_refused_in_a_sentence(phema, files, message):
    pack("bad.zip", files)
    phema("train", *SMALL, "--set", "data.path=bad.zip", "--out", "run").refused("bad", message)


def test_train_on_a_path_that_does_not_exist_is_refused(phema, unchanged):
    with unchanged():
        phema("train", *SMALL, "--set", "data.path=nowhere", "--out", "run").refused(
            "data nowhere does not exist. Check the path."
        )


# ---- Hugging Face


@pytest.mark.filterwarnings("ignore")
def test_a_saved_hugging_face_data_set_is_converted_and_trained_on(phema, capfd):
    datasets = pytest.importorskip("datasets")
    images = [Image.open(io.BytesIO(picture(8 + k % 3))) for k in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    rows = {"image": images, "label": [k % 10 for k in range(20)]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk("hf")
    phema("train", *SMALL, "--set", "data.path=hf", "--out", "run").refused(
        "hf, row 1 (image) is 9x9, the others are 8x8"
    )
    done = phema("dataset", "convert", "hf", "a.zip", "--resolution", 8, "--mode", "gray")
    assert done.out == "a.zip: 20 items (20 new), 10 classes\n"
    assert phema("train", *SMALL, "--set", "data.path=a.zip", "--out", "run").code == 0
    saved.select([0, 3, 6]).save_to_disk("three")
    dataset = load_dataset("three")
    assert dataset.labels.tolist() == [0, 3, 6]
    assert (dataset.label_dim, len(dataset)) == (10, 3)
    assert dataset.fingerprint != load_dataset("hf/test").fingerprint
    saved.remove_columns("image").save_to_disk("none")
    phema("dataset", "stats", "none").refused("none has no column of images, only label.")
