"""Batches: what a step sees, whatever reads ahead and however many processes share it."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from posthoc_ema.errors import ConfigError
from reference_trainer.config import DataConfig, NetworkConfig, TrackConfig, TrainConfig
from reference_trainer.data import batch_indices, load_dataset, new_batches
from reference_trainer.data.batches import rank_slice

from . import data_sets as ds

CPU = torch.device("cpu")
IMAGES, LABELS = ds.pictures(40), np.arange(40) % 5


def config_for(dataset, *, batch_size=8, label_dim=None, **data):
    network = NetworkConfig(
        img_resolution=dataset.resolution,
        img_channels=dataset.channels,
        label_dim=dataset.label_dim if label_dim is None else label_dim,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
    )
    return TrainConfig(
        network=network,
        track=TrackConfig(snapshot_every=batch_size),
        batch_size=batch_size,
        total_images=20 * batch_size,
        checkpoint_every=batch_size,
        status_every=batch_size,
        data=DataConfig(name=dataset.name, kind=dataset.kind, **data),
    )


@pytest.fixture
def folder(tmp_path):
    return ds.write_folder(tmp_path / "set", ds.edm2_files(IMAGES, LABELS))


@pytest.fixture
def latents(tmp_path):
    values = np.random.default_rng(0).random((20, 8, 4, 4), np.float32)
    files = ds.edm2_files(values, None, "img-mean-std-", "npy")
    return values, load_dataset(str(ds.write_zip(tmp_path / "latents.zip", files)))


def test_digits_are_mapped_as_one_expression_does_it():
    """Runs of earlier versions go on bit for bit."""
    dataset = load_dataset("digits")
    config = config_for(dataset, mean=(-0.389,), scale=(0.665,))
    images, labels = new_batches(dataset, config, CPU).at(24)
    index = batch_indices(1797, 24, 8, 0)
    pixels = torch.from_numpy(dataset.images[index]).to(torch.float32)
    assert torch.equal(images, (pixels / 127.5 - 1 - -0.389) * 0.665)
    assert labels.tolist() == dataset.labels[index].tolist()


@pytest.mark.parametrize("resident_bytes", [0, 2**20], ids=["streamed", "resident"])
def test_each_channel_has_its_mapping(folder, resident_bytes):
    dataset = load_dataset(str(folder))
    config = config_for(dataset, mean=(0.1, 0.2, 0.3), scale=(1.0, 2.0, 3.0))
    batches = new_batches(dataset, config, CPU, resident_bytes=resident_bytes)
    images, labels = batches.at(8)
    index = batch_indices(40, 8, 8, 0)
    v = IMAGES[index] / 127.5 - 1
    expected = (v - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)) * np.array([1, 2, 3.0]).reshape(
        3, 1, 1
    )
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert labels.tolist() == LABELS[index].tolist()
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    batches.close()


def test_batches_do_not_depend_on_what_was_asked_before(folder):
    """A run that resumes anywhere, and one that steps on, see the same."""
    dataset = load_dataset(str(folder))
    config = config_for(dataset)
    whole = new_batches(dataset, config, CPU)
    streamed = new_batches(dataset, config, CPU, resident_bytes=0)
    for nimg in (0, 8, 16, 24, 96, 8, 152, 160, 400):
        for expected, given in zip(whole.at(nimg), streamed.at(nimg), strict=True):
            assert torch.equal(expected, given)
    streamed.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_of_one_process(latents, world_size):
    _, dataset = latents
    config = config_for(dataset)
    expected, _ = new_batches(dataset, config, CPU).at(16)
    parts = [
        new_batches(dataset, config, CPU, rank=rank, world_size=world_size).at(16)[0]
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(parts), expected)


def test_a_latent_is_a_fresh_sample_every_time(latents):
    values, dataset = latents
    config = dataclasses.replace(config_for(dataset, batch_size=20), total_images=4000)
    batches = new_batches(dataset, config, CPU)
    noise = []
    for nimg in range(0, 4000, 20):
        index = batch_indices(20, nimg, 20, 0)
        mean, std = values[index, :4], values[index, 4:]
        noise.append((batches.at(nimg)[0].numpy() - mean) / np.maximum(std, 1e-3))
    noise = np.concatenate(noise)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(batches.at(40)[0], new_batches(dataset, config, CPU).at(40)[0])


def test_an_error_of_a_thread_is_raised_in_the_step_that_needs_it(folder):
    bad = int(batch_indices(40, 32, 8, 0)[3])
    assert bad not in batch_indices(40, 0, 32, 0)
    (folder / f"00000/img{bad:08d}.png").write_bytes(b"no image")
    dataset = load_dataset(str(folder))
    batches = new_batches(dataset, config_for(dataset), CPU, resident_bytes=0)
    for nimg in (0, 8, 16, 24):
        batches.at(nimg)
    with pytest.raises(ConfigError, match=f"img{bad:08d}.png is no image"):
        batches.at(32)
    batches.close()


class Slow:
    """A data set whose reading takes as long as it is told to."""

    name, kind, resolution, channels, label_dim, fingerprint = "slow", "pixels", 8, 3, 0, "0"
    labels = np.zeros(40, np.int64)

    def __init__(self):
        self.gate, self.running, self.read_items = threading.Event(), 0, []

    def __len__(self):
        return 40

    def read(self, indices):
        self.gate.wait(10)
        self.read_items.append(len(indices))
        return IMAGES[indices], self.labels[indices]


def test_reading_ahead_is_bounded_and_ends_with_the_run():
    dataset = Slow()
    dataset.gate.set()
    config = config_for(dataset)
    batches = new_batches(dataset, config, CPU, resident_bytes=0)
    batches.at(0)
    batches.at(config.total_images - 16)
    batches.close()
    # The first item alone, the batch at 0 and at most 4 ahead, the last two batches and nothing behind.
    assert 1 + 3 * 8 <= sum(dataset.read_items) <= 1 + (5 + 2) * 8


def test_closing_does_not_wait_for_what_has_not_begun():
    dataset = Slow()
    dataset.gate.set()
    batches = new_batches(dataset, config_for(dataset), CPU, resident_bytes=0)
    batches.at(0)
    dataset.gate.clear()
    threading.Timer(0.2, dataset.gate.set).start()
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("phema-data")]


@pytest.mark.parametrize(("batch", "world"), [(6, 4), (1, 2)])
def test_a_batch_that_does_not_divide_is_refused(batch, world):
    with pytest.raises(
        ConfigError, match=f"a multiple of the number of processes, {world}, got {batch}"
    ):
        rank_slice(batch, 0, world)


def test_a_conditional_network_needs_labels(tmp_path):
    dataset = load_dataset(str(ds.write_folder(tmp_path / "set", ds.edm2_files(IMAGES))))
    with pytest.raises(ConfigError, match=r"'set' has no labels, and network.label_dim is 5"):
        new_batches(dataset, config_for(dataset, label_dim=5), CPU)


def test_a_network_may_know_more_classes_or_none_but_not_fewer(folder):
    dataset = load_dataset(str(folder))
    for label_dim in (0, 5, 6):
        new_batches(dataset, config_for(dataset, label_dim=label_dim), CPU)
    with pytest.raises(ConfigError, match=r"network\.label_dim must be 5"):
        new_batches(dataset, config_for(dataset, label_dim=4), CPU)


def test_latents_are_no_pixels(latents):
    _, dataset = latents
    config = config_for(dataset)
    pixels = dataclasses.replace(config, data=DataConfig(name="latents"))
    with pytest.raises(ConfigError, match=r"data\.kind must be 'latents'"):
        new_batches(dataset, pixels, CPU)
