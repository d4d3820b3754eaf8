"""U-Net of config G and its preconditioning."""

import dataclasses

import numpy as np
import pytest
import torch

from posthoc_ema import ConfigError, SnapshotMismatchError
from reference_trainer.checkpoint import load_network
from reference_trainer.config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    TrackConfig,
    TrainConfig,
    network_of_config,
)
from reference_trainer.precond import Precond
from reference_trainer.topology import plan_unet

TINY = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    logvar_channels=8,
)


def paper(channels, label_dim=1000):
    return NetworkConfig(
        img_resolution=64, img_channels=4, label_dim=label_dim, model_channels=channels
    )


def new_network(config=TINY, trained=True):
    """A network; `trained` gives the gains values, so that every path contributes."""
    torch.manual_seed(0)
    network = Precond(config, DataConfig())
    if trained:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("gain"):
                    parameter.fill_(0.7)
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "label_dim", "millions"),
    [(64, 1000, 31.31), (128, 1000, 124.71), (192, 1000, 280.21), (192, 0, 279.44)],
)
def test_network_has_the_parameter_count_of_the_paper(channels, label_dim, millions):
    with torch.device("meta"):
        network = Precond(paper(channels, label_dim), DataConfig())
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 2) == millions


def test_plan_has_fifteen_attention_blocks_at_the_paper_size():
    plan = plan_unet(paper(192))
    assert sum(block.attention for block in (*plan.encoder, *plan.decoder)) == 15


def test_plan_uses_every_encoder_output_once():
    plan = plan_unet(paper(192))
    given = [plan.stem_channels, *(block.out_channels for block in plan.encoder)]
    taken = [block.skip_channels for block in plan.decoder if block.skip_channels]
    assert taken == given[::-1]


@pytest.mark.parametrize(("resolution", "mult"), [(8, (1, 2, 2)), (16, (1,)), (4, (1, 2))])
def test_network_works_at_any_power_of_two(resolution, mult):
    config = dataclasses.replace(
        TINY, img_resolution=resolution, channel_mult=mult, attn_resolutions=(), img_channels=3
    )
    x = torch.randn(2, 3, resolution, resolution)
    assert new_network(config)(x, 1.0, torch.tensor([1, 2])).shape == x.shape


def test_untrained_denoiser_is_c_skip_times_the_input():
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 2.0])
    c_skip = 0.25 / (sigma**2 + 0.25)
    expected = c_skip[:, None, None, None] * x
    torch.testing.assert_close(new_network(trained=False)(x, sigma, torch.tensor([3, 4])), expected)


def test_forward_never_writes_weights():
    network = new_network().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(torch.randn(2, 1, 8, 8), 1.0, torch.tensor([1, 2]), return_logvar=True)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_force_weight_norm_writes_every_weight_and_nothing_else():
    network = new_network().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.force_weight_norm()
    written = {k for k, v in network.state_dict().items() if not torch.equal(before[k], v)}
    assert written == {k for k in before if k.endswith("weight")}


def test_labels_as_indices_and_as_one_hot_rows_agree():
    network, x, labels = new_network(), torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    rows = torch.nn.functional.one_hot(labels, 10)
    assert torch.equal(network(x, 1.0, labels), network(x, 1.0, rows))
    assert not torch.equal(network(x, 1.0, labels), network(x, 1.0, labels.flip(0)))


def test_missing_label_is_the_zero_row():
    network, x = new_network(), torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, 1.0), network(x, 1.0, torch.zeros(2, 10)))


def test_unconditional_network_ignores_labels():
    network = new_network(dataclasses.replace(TINY, label_dim=0))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, 1.0), network(x, 1.0, torch.tensor([1, 2])))


def test_denoising_an_image_does_not_depend_on_its_batch():
    network, x = new_network(), torch.randn(3, 1, 8, 8)
    sigma, labels = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1, 2, 3])
    whole = network(x, sigma, labels)
    for i in range(3):
        one = network(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_clamp_acts_only_beyond_its_limit():
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    wide, tight = (new_network(dataclasses.replace(TINY, clip_act=c)) for c in (256.0, 0.5))
    without = new_network(dataclasses.replace(TINY, clip_act=None))(x, 1.0, labels)
    assert torch.equal(wide(x, 1.0, labels), without)
    assert not torch.equal(tight(x, 1.0, labels), without)


def test_uncertainty_is_bounded_by_the_norm_of_its_features():
    network = new_network()
    u = network(torch.randn(50, 1, 8, 8), torch.logspace(-3, 2, 50), return_logvar=True)[1]
    assert u.shape == (50, 1, 1, 1)
    assert float(u.detach().abs().max()) <= (2 * TINY.logvar_channels) ** 0.5


@pytest.mark.parametrize(
    ("x", "labels", "word"),
    [
        (torch.zeros(2, 3, 8, 8), None, "images"),
        (torch.zeros(2, 1, 16, 16), None, "images"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 9), "labels"),
    ],
)
def test_wrong_shapes_are_refused_with_their_name(x, labels, word):
    with pytest.raises(ConfigError, match=word):
        new_network()(x, 1.0, labels)


def run_config():
    return TrainConfig(
        network=TINY,
        track=TrackConfig(snapshot_every=64),
        total_images=64,
        checkpoint_every=64,
        status_every=64,
    )


def test_load_network_gives_an_evaluating_copy():
    network, x = new_network(), torch.randn(2, 1, 8, 8)
    arrays = {k: v.numpy() for k, v in network.state_dict().items()}
    loaded = load_network(arrays, run_config())
    assert not loaded.training
    assert torch.equal(loaded(x, 1.0), network(x, 1.0))


def test_load_network_names_missing_unknown_and_misshaped_tensors():
    arrays = {k: v.numpy() for k, v in new_network().state_dict().items()}
    name = "net.stem.weight"
    for damaged in (
        {k: v for k, v in arrays.items() if k != name},
        {**arrays, "net.stem.bias": np.zeros(3, np.float32)},
        {**arrays, name: np.zeros(3, np.float32)},
    ):
        with pytest.raises(SnapshotMismatchError, match=r"net\.stem\.(weight|bias)"):
            load_network(damaged, run_config())


@pytest.mark.parametrize("letter", ["A", "B", "G"])
def test_loaded_network_needs_nothing_but_what_the_file_holds(letter):
    network = network_of_config(TINY, letter)
    loss = LossConfig(weighting="static" if letter == "A" else "uncertainty")
    config = dataclasses.replace(run_config(), network=network, loss=loss)
    original = new_network(network)
    weights = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
    loaded = load_network(weights, config)
    assert (
        not loaded.state_dict().keys()
        ^ dict(loaded.named_parameters()).keys()
        ^ dict(loaded.named_buffers()).keys()
    )
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(loaded(x, 0.7, labels), original(x, 0.7, labels))
