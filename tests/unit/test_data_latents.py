"""Latents: the autoencoder with both input ranges, and encoding that goes on."""

import numpy as np
import pytest
import torch

from posthoc_ema.errors import ConfigError
from reference_trainer.data import load_dataset
from reference_trainer.data.encoding import encode
from reference_trainer.data.statistics import data_config_for
from reference_trainer.data.vae import load_autoencoder

from . import data_sets as ds

pytest.importorskip("diffusers")

IMAGES = ds.pictures(22, side=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny autoencoder with random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    model = AutoencoderKL(**blocks, **types)
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "vae")
    return folder, model.eval()


@pytest.fixture
def source(tmp_path):
    path = ds.write_zip(tmp_path / "images.zip", ds.edm2_files(IMAGES, np.arange(22) % 3))
    return load_dataset(str(path))


@pytest.mark.parametrize(("input_range", "low"), [("0..1", 0), ("-1..1", -1)])
@torch.no_grad()
def test_pixels_are_fed_and_returned_in_the_range_that_is_asked(saved, input_range, low):
    folder, model = saved
    autoencoder = load_autoencoder(str(folder / "vae"), input_range=input_range)
    assert (autoencoder.channels, autoencoder.factor) == (4, 2)
    pixels = torch.from_numpy(IMAGES[:3])
    x = low + pixels.to(torch.float32) / 255 * (1 - low)
    expected = model.encode(x).latent_dist
    latents = autoencoder.encode(pixels)
    assert latents.shape == (3, 8, 8, 8)
    torch.testing.assert_close(latents[:, :4], expected.mean)
    torch.testing.assert_close(latents[:, 4:], expected.std)
    z = 3 * torch.randn(3, 4, 8, 8)
    unit = (model.decode(z).sample - low) / (1 - low)
    decoded = autoencoder.decode(z)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, (unit.clamp(0, 1) * 255).to(torch.uint8))  # truncated, as in EDM2
    assert decoded.float().std() > 1


@torch.no_grad()
def test_gray_images_are_encoded_as_rgb(saved):
    autoencoder = load_autoencoder(str(saved[0]))
    gray = torch.from_numpy(IMAGES[:2, :1])
    assert torch.equal(autoencoder.encode(gray), autoencoder.encode(gray.repeat(1, 3, 1, 1)))


def test_latents_keep_order_labels_and_say_how_they_were_made(saved, source, tmp_path):
    autoencoder = load_autoencoder(str(saved[0]))
    written = encode(source, tmp_path / "z.zip", autoencoder, batch_size=8)
    assert (written.num_items, written.label_dim) == (22, 3)
    dataset = load_dataset(str(tmp_path / "z.zip"))
    assert (dataset.kind, dataset.channels, dataset.resolution) == ("latents", 4, 8)
    assert dataset.labels.tolist() == source.labels.tolist()
    values, _ = dataset.read(np.array([9, 21]))
    expected = autoencoder.encode(torch.from_numpy(IMAGES[[9, 21]]))
    torch.testing.assert_close(torch.from_numpy(values), expected, atol=1e-5, rtol=1e-4)
    made = dataset.items.metadata["phema"]
    assert (made["input_range"], made["source"]) == ("0..1", source.fingerprint)
    config = data_config_for(tmp_path / "z.zip")
    assert (config.kind, len(config.mean), len(config.scale)) == ("latents", 4, 4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["z", "z.zip"])
def test_encoding_that_was_interrupted_equals_one_that_was_not(saved, source, tmp_path, name):
    autoencoder = load_autoencoder(str(saved[0]))
    encode(source, tmp_path / "whole.zip", autoencoder, batch_size=5)

    def stop(done, total):
        raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            encode(source, tmp_path / name, autoencoder, batch_size=5, progress=stop)
    if name == "z":
        (tmp_path / "z" / "00000" / "img-mean-std-00000014.npy").unlink()  # the middle of a batch
    written = encode(source, tmp_path / name, autoencoder, batch_size=5)
    assert written.already == (14 if name == "z" else 15)
    first, second = (load_dataset(str(tmp_path / n)) for n in (name, "whole.zip"))
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.read(np.arange(22))[0], second.read(np.arange(22))[0])


def test_what_cannot_be_encoded_is_refused(saved, source, tmp_path):
    autoencoder = load_autoencoder(str(saved[0]))
    encode(source, tmp_path / "z.zip", autoencoder)
    with pytest.raises(ConfigError, match="must hold images with 1 or 3 channels"):
        encode(load_dataset(str(tmp_path / "z.zip")), tmp_path / "b.zip", autoencoder)
    other = load_autoencoder(str(saved[0]), input_range="-1..1")
    with pytest.raises(ConfigError, match="exists and is not what this command would make"):
        encode(source, tmp_path / "z.zip", other)
    dot = load_dataset(
        str(ds.write_folder(tmp_path / "dot", {"a.png": ds.png(np.zeros((1, 1), np.uint8))}))
    )
    with pytest.raises(ConfigError, match="one latent pixel of 2x2"):
        encode(dot, tmp_path / "c.zip", autoencoder)


def test_an_autoencoder_that_is_not_there_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .* Give a folder with config.json"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"input range must be one of 0..1, -1..1, got '0-1'"):
        load_autoencoder(str(tmp_path), input_range="0-1")
