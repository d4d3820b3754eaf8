"""Published EDM2 networks through the command line: converted, sampled, averaged anew."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from ..unit.published_networks import (  # noqa: TID252  # the files of the unit tests
    SMALL,
    publish,
    trained,
    write_published,
)

RGB = dataclasses.replace(SMALL, img_channels=3, label_dim=3)


@pytest.fixture
def published(tmp_path):
    """A published average, and the folder of snapshots of a run."""
    torch.set_num_threads(1)
    write_published(tmp_path / "edm2-tiny-0025165-0.130.pkl", publish(trained(RGB)))
    folder = tmp_path / "raw-snapshots"
    folder.mkdir()
    first = trained(RGB)
    for i, kimg in enumerate((8388, 16777, 25165)):
        for length in ("0.050", "0.100"):
            network = trained(RGB, seed=2 * i + (length == "0.100"))
            buffers = {k: v for k, v in first.state_dict().items() if "features" in k}
            network.load_state_dict({**network.state_dict(), **buffers})
            path = folder / f"network-snapshot-{kimg:07d}-{length}.pkl"
            write_published(path, publish(network))
    return tmp_path / "edm2-tiny-0025165-0.130.pkl"


def test_convert_published_average_to_weights_and_sample_them(phema, published):
    done = phema("convert", published, "--as-trainer", "--out", "tiny.safetensors")
    assert (done.code, done.err.count("\n")) == (0, 2)
    assert "sigma_rel 0.13  25165824" in done.out
    given = ("--steps", "3", "--seeds", "0-5", "--device", "cpu")
    phema("sample", "tiny.safetensors", "--out", "a.png", "--classes", *given).succeeded()
    with Image.open("a.png") as picture:
        assert picture.mode == "RGB"


def test_convert_published_snapshots_to_a_store_of_the_trainer(phema, published):
    done = phema("convert", "raw-snapshots", "--as-trainer", "--out", "store", "--json")
    found = json.loads(done.out)
    assert (found["from"], found["files"], len(found["times"])) == ("edm2", 6, 3)
    assert "no preset has this network of 8 base channels, 16x16x3" in found["notes"][-1]
    phema("synth", "--sigma-rel", "0.07", "--out", "x.safetensors", "store")
    given = ("--steps", "3", "--seeds", "0-1", "--device", "cpu")
    phema("sample", "x.safetensors", "--out", "a.png", *given).succeeded()
    phema("sample", "store", "--sigma-rel", "0.07,0.1", "--out", "b.png", *given).succeeded()


def test_convert_published_networks_guide_each_other(phema, published):
    for name in ("main", "guide"):
        phema("convert", published, "--as-trainer", "--out", f"{name}.safetensors")
    given = ("--steps", "3", "--seeds", "0-1", "--device", "cpu")
    guided = ("--guide", "guide.safetensors", "--guidance", "1.5")
    phema("sample", "main.safetensors", *guided, "--out", "a.png", *given).succeeded()


def test_convert_without_as_trainer_says_what_is_missing_when_it_is_run(phema, published):
    phema("convert", published, "--out", "store")
    done = phema("sample", "store", "--sigma-rel", "0.13", "--out", "a.png", "--device", "cpu")
    done.refused("under its own names", "phema convert --as-trainer")


def test_convert_refuses_what_does_not_become_a_network(phema, published, tmp_path):
    phema("convert", published, "--out", "x.safetensors").refused("a store is a folder")
    folder = ("convert", "raw-snapshots", "--as-trainer", "--out")
    phema(*folder, "x.safetensors").refused("6 averages do not fit into the file x.safetensors")
    phema(*folder, "x.safetensors", "--dtype", "float32").refused("without --dtype")
    tensors = publish(trained(RGB))
    del tensors["f.out_gain"]
    write_published(tmp_path / "other-0025165-0.130.pkl", tensors)
    done = phema("convert", "other-0025165-0.130.pkl", "--as-trainer", "--out", "x.safetensors")
    done.refused("not a network of EDM2's config G: it lacks a gain of the output")


def test_convert_published_latents_ask_for_their_autoencoder(phema, tmp_path):
    write_published(tmp_path / "edm2-tiny-0025165-0.130.pkl", publish(trained()))
    convert = ("convert", "edm2-tiny-0025165-0.130.pkl", "--as-trainer", "--out")
    assert "scaled as imagenet-512-latents" in phema(*convert, "tiny.safetensors").err
    sample = ("sample", "tiny.safetensors", "--steps", "2", "--seeds", "0", "--out", "a.png")
    phema(*sample).refused("--vae FOLDER or NAME", "sd-vae-ft-mse")
