"""Published EDM2 networks become networks of the trainer: same function, other names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, synthesize
from posthoc_ema.errors import ConfigError
from posthoc_ema.importers import ImportOptions, plan_import, write_import
from posthoc_ema.tensor_files import read_header
from reference_trainer.checkpoint import load_network
from reference_trainer.config import TrainConfig
from reference_trainer.interchange import as_trainer, recognise, write_weights
from reference_trainer.interchange.published import METADATA_KEY
from reference_trainer.precond import Precond
from reference_trainer.presets import PRESETS

from .published_networks import SMALL, publish, rename_otherwise, trained, write_published

NAME = "edm2-small-0008388-0.100.pkl"
SIZES = (
    "edm2-img512-xxs-uncond",
    "edm2-img512-s",
    "edm2-img512-xxl",
    "edm2-img64-xs",  # as many features of the noise level as of the uncertainty
    "edm2-img64-xl-uncond",
)


def outputs(network):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, network.img_channels, *2 * [network.img_resolution], generator=generator)
    labels = torch.tensor([0, 4, 9]) if network.label_dim else None
    sigma = torch.tensor([0.1, 1.0, 10.0])
    return torch.cat([t.flatten() for t in network(x, sigma, labels, return_logvar=True)]).detach()


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", [None, rename_otherwise])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_dim": 0},
        {"model_channels": 64, "channel_mult": (1, 2), "label_dim": 256},  # several heads
        {"channel_mult": (1, 2, 2), "num_blocks": 2, "attn_resolutions": (8, 4)},
        {"img_channels": 3, "attn_resolutions": ()},
    ],
)
def test_interchange_network_gives_the_same_outputs(tmp_path, names, changes):
    network = trained(dataclasses.replace(SMALL, **changes))
    write_published(tmp_path / NAME, publish(network, names), dtype=torch.float32)
    plan = as_trainer(plan_import(tmp_path / NAME))
    write_weights(plan, tmp_path / "out.safetensors")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    config = TrainConfig.from_json(metadata[METADATA_KEY])
    assert dataclasses.replace(config.network, dtype="float32", dropout=0.0) == dataclasses.replace(
        SMALL, **changes
    )
    found = load_network(tmp_path / "out.safetensors", _in_float32(config))
    torch.testing.assert_close(outputs(found), outputs(network), rtol=1e-6, atol=1e-6)
    assert metadata["time"] == str(8_388_608)
    assert metadata["profile"] == "sigma_rel-0.1"


def _in_float32(config):
    return dataclasses.replace(config, network=dataclasses.replace(config.network, dtype="float32"))


def test_interchange_keeps_angles_of_float16_files_in_float32(tmp_path):
    network = trained()
    write_published(tmp_path / NAME, publish(network), tmp_path / "canary")
    plan = as_trainer(plan_import(tmp_path / NAME))
    assert plan.dtype == "float16"
    with plan.files[0].open() as found:
        freqs = found.tensors["net.embedding.features.freqs"]
        assert freqs.dtype == "float32"
        rounded = (network.net.embedding.features.freqs * 2 * np.pi).half().float() / (2 * np.pi)
        np.testing.assert_allclose(freqs.read(), rounded.numpy(), rtol=1e-6)
    assert not (tmp_path / "canary").exists()


def test_interchange_takes_phases_in_turns_as_they_are(tmp_path):
    network = trained()
    tensors = publish(network)
    for name in tensors:
        if name.endswith(("freqs", "phases")):
            tensors[name] = tensors[name] / (2 * np.pi)
    write_published(tmp_path / NAME, tensors, dtype=torch.float32)
    with as_trainer(plan_import(tmp_path / NAME)).files[0].open() as found:
        for name in ("net.embedding.features.freqs", "logvar_features.phases"):
            want = network.state_dict()[name].numpy()
            np.testing.assert_allclose(found.tensors[name].read(), want, rtol=1e-6)


def test_interchange_folder_becomes_a_store_of_our_network(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for i, kimg in enumerate((8388, 16777, 25165)):
        for length in ("0.050", "0.100"):
            path = folder / f"network-snapshot-{kimg:07d}-{length}.pkl"
            network = trained(seed=2 * i + (length == "0.100"))
            network.load_state_dict(_with_buffers_of(trained(), network))
            write_published(path, publish(network))
    store, _ = write_import(as_trainer(plan_import(folder)), tmp_path / "store")
    config = TrainConfig.from_json(SnapshotStore.open(tmp_path / "store").metadata[METADATA_KEY])
    assert (store.sigma_rels, len(store.times), list(store.verify())) == ([0.05, 0.1], 3, [])
    found = load_network(synthesize(store, sigma_rel=0.1), _in_float32(config))
    torch.testing.assert_close(outputs(found), outputs(network), rtol=0, atol=2e-2)  # of float16
    assert load_network(synthesize(store, sigma_rel=0.07), config).label_dim == 10


def _with_buffers_of(other, network):
    kept = {k: v for k, v in other.state_dict().items() if k.endswith(("freqs", "phases"))}
    return {**network.state_dict(), **kept}


# ---- presets


@pytest.mark.parametrize("name", SIZES)
def test_interchange_recognises_presets(name):
    preset = PRESETS[name]()
    with torch.device("meta"):
        network = Precond(preset.network, preset.data)
    assert recognise(shapes_of(publish(network))).config == preset


# ---- refusals


def damaged(change):
    tensors = publish(trained())
    change(tensors)
    return shapes_of(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("f.enc.8x8_block0.conv1.weight"), "1 convolutions of 3x3"),
        (lambda t: t.pop("f.dec.8x8_in0.qkv.weight"), "in0.attention.qkv.weight"),
        (lambda t: t.pop("f.out_gain"), "lacks a gain"),
        (lambda t: t.pop("logvar_features.phases"), "lacks the frequencies"),
        (lambda t: t.update({"f.extra.weight": torch.zeros(3, 5)}), "'f.extra.weight'"),
        (lambda t: t.update({"f.enc.8x8_block0.bias": torch.zeros(16)}), "no place in a block"),
        (lambda t: t.update({"f.dec.16x16_block1.emb.weight": torch.zeros(8, 31)}), r"\(8, 31\)"),
        (lambda t: [t.pop(n) for n in list(t) if "16x16_up" in n], "9 blocks"),
    ],
)
def test_interchange_other_networks_are_refused_with_the_reason(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        recognise(damaged(change))
    assert "--as-trainer" in str(caught.value)


def test_interchange_blocks_in_another_order_are_refused():
    tensors = publish(trained())
    moved = [n for n in tensors if ".enc.8x8_down." in n]
    reordered = {n: tensors[n] for n in tensors if n not in moved} | {n: tensors[n] for n in moved}
    with pytest.raises(ConfigError, match=r"stands where|it holds"):
        recognise(shapes_of(reordered))


def test_interchange_phases_that_are_none_are_refused(tmp_path):
    tensors = publish(trained())
    tensors["f.embedding.features.phases"] -= 3.0
    write_published(tmp_path / NAME, tensors, dtype=torch.float32)
    with pytest.raises(ConfigError, match="the phases of its features reach from"):
        as_trainer(plan_import(tmp_path / NAME))


def test_interchange_other_tools_are_refused(tmp_path):
    torch.save({"w": torch.ones(3), "initted": torch.tensor(True)}, tmp_path / "0.100.pt")
    plan = plan_import(tmp_path, "posthoc-ema", ImportOptions((0.1,), update_every=1))
    with pytest.raises(ConfigError, match="files of posthoc-ema hold no network"):
        as_trainer(plan)


def test_interchange_several_averages_are_no_weights_file(tmp_path):
    for length in ("0.050", "0.100"):
        write_published(tmp_path / f"run-0008388-{length}.pkl", publish(trained()))
    with pytest.raises(ConfigError, match="2 averages do not fit"):
        write_weights(as_trainer(plan_import(tmp_path)), tmp_path / "out.safetensors")
