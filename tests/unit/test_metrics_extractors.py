from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch

from posthoc_ema.errors import ConfigError, MetricError, SnapshotFormatError
from reference_trainer.data import load_dataset
from reference_trainer.metrics import open_extractor
from reference_trainer.metrics.dinov2 import fit_positions, normalised, open_dinov2
from reference_trainer.metrics.extractors import as_rgb, full_precision, weights_hash
from reference_trainer.metrics.inception import load_torch_fidelity, open_inception

from .metric_weights import random_inception, write_dinov2, write_inception


def images(count=3, channels=3, side=16, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def inception(inception_file):
    return open_inception(inception_file, layer="64")


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def dinov2(dinov2_folder):
    return open_dinov2(dinov2_folder)


def test_the_digit_extractor_gives_features_and_classes():
    digits, extractor = load_dataset("digits"), open_extractor("digits")
    features = extractor(torch.tensor(digits.images[:50]))
    assert (features.shape, extractor.feature_dim) == ((50, 48), 48)
    assert (extractor.classes(features).numpy() == digits.labels[:50]).mean() > 0.95


def test_inception_gives_the_layer_that_is_asked_for(inception):
    features = inception(images())
    assert (inception.name, inception.feature_dim) == ("inception", 64)
    assert (features.shape, features.dtype) == ((3, 64), torch.float32)
    assert not features.requires_grad


def test_features_do_not_depend_on_the_batch(inception):
    whole = inception(images(4))
    parts = torch.cat([inception(images(4)[:1]), inception(images(4)[1:])])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_gray_images_are_taken_as_rgb(inception, dinov2):
    gray = images(2, channels=1)
    for extractor in (inception, dinov2):
        assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1).contiguous()))


def test_weights_are_the_same_from_either_kind_of_file(tmp_path, inception_file, inception):
    path = tmp_path / "weights.safetensors"
    state = {k: v.contiguous() for k, v in torch.load(inception_file, weights_only=True).items()}
    safetensors.torch.save_file(state, path)
    again = open_inception(path, layer="64")
    assert again.weights_hash == inception.weights_hash
    assert torch.equal(again(images()), inception(images()))


def test_the_hash_tells_weights_apart():
    first, second = (torch.nn.Linear(2, 2) for _ in range(2))
    assert weights_hash(first) != weights_hash(second)
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    assert weights_hash(first) != weights_hash(first.double())


def test_a_weights_file_that_would_run_code_does_not(tmp_path):
    canary = tmp_path / "canary"
    hostile = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile)
    with pytest.raises(MetricError, match="is no file of weights"):
        open_inception(path)
    assert not canary.exists()


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(MetricError, match=r"of another network than torch-fidelity's Inception-v3"):
        open_inception(path)


def test_damaged_and_missing_weights_are_named(tmp_path, inception_file):
    with pytest.raises(MetricError, match=r"nowhere\.pth: there is no such file"):
        open_inception(tmp_path / "nowhere.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(inception_file.read_bytes()[:100_000])
    with pytest.raises(SnapshotFormatError, match=r"cut\.pth"):
        open_inception(cut)


def test_offline_the_message_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(MetricError) as caught:
        open_inception()
    for part in ("https://github.com/toshas/torch-fidelity/", f"put it at {place}", "--weights"):
        assert part in str(caught.value)


def test_weights_in_the_cache_of_the_library_are_used(
    tmp_path, monkeypatch, inception_file, inception
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.symlink_to(inception_file)
    assert open_inception(layer="64").weights_hash == inception.weights_hash
    place.unlink()
    place.write_bytes(b"half a file")
    with pytest.raises(MetricError, match=r"6726825d\.pth: cannot be read.*Remove it"):
        open_inception()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
            "need torchvision",
        ),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "the torchvision that belongs to",
        ),
    ],
)
def test_a_package_that_does_not_load_is_one_sentence(monkeypatch, error, message):
    def refuse(name):
        raise error

    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(MetricError, match=message):
        load_torch_fidelity("metric_kid")


def test_dinov2_gives_its_normed_class_token(dinov2, dinov2_folder):
    from transformers import Dinov2Model

    features = dinov2(images(2))
    assert (dinov2.name, dinov2.feature_dim, features.shape) == ("dinov2", 32, (2, 32))
    network = Dinov2Model.from_pretrained(dinov2_folder).eval()
    network.embeddings = dinov2._network.embeddings  # its positions are resampled for 224 pixels
    with torch.no_grad():
        hidden = network(pixel_values=normalised(images(2)), output_hidden_states=True)
        expected = network.layernorm(hidden.hidden_states[-1])[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)
    assert features.std() > 0.1


def test_dinov2_sees_imagenet_units():
    """A constant image stays constant under resizing; white is (1 - mean) / deviation."""
    white = normalised(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 224, 224)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert torch.allclose(white, expected[:, None, None].expand(3, 224, 224), atol=1e-5)


def cubic(values, place):
    """Cubic convolution (Keys, a = -3/4) of numbers on a line, held at the ends."""
    first = int(np.floor(place))
    total = 0.0
    for i in range(first - 1, first + 3):
        d = abs(place - i)
        inner = 1.25 * d**3 - 2.25 * d**2 + 1
        outer = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        total += values[min(max(i, 0), len(values) - 1)] * (inner if d <= 1 else outer)
    return total


def test_dinov2_positions_are_sampled_where_the_original_samples_them(dinov2_folder):
    """16 places from 5: place i lies at (i + 1/2) 5 / (16 + 0.1) - 1/2, with DINOv2's own 0.1."""
    network = open_dinov2(dinov2_folder)._network
    assert network.embeddings.position_embeddings.shape == (1, 1 + 16 * 16, 32)
    rows = [0.0, 1.0, -2.0, 5.0, 3.0]
    table = torch.tensor([9.0] + [value for value in rows for _ in range(5)])
    table = table[None, :, None].expand(1, 26, 32)
    network.embeddings.position_embeddings = torch.nn.Parameter(table)
    fit_positions(network, 224)
    new = network.embeddings.position_embeddings[0, :, 0].detach()
    assert new[0] == 9.0
    expected = [cubic(rows, (i + 0.5) * 5 / 16.1 - 0.5) for i in range(16)]
    assert new[1:].reshape(16, 16)[:, 7].numpy() == pytest.approx(expected, abs=1e-5)


def test_dinov2_positions_of_the_right_size_stay(dinov2_folder):
    network = open_dinov2(dinov2_folder)._network
    table = network.embeddings.position_embeddings
    fit_positions(network, 224)
    assert network.embeddings.position_embeddings is table


def test_dinov2_offline_says_which_files_to_get(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MetricError) as caught:
        open_dinov2()
    for part in (str(tmp_path), "model.safetensors", "facebook/dinov2-large", "--weights"):
        assert part in str(caught.value)


def test_dinov2_weights_that_lack_something_are_refused(tmp_path, dinov2_folder):
    with pytest.raises(MetricError, match="is no folder of DINOv2 weights"):
        open_dinov2(tmp_path)
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    with pytest.raises(MetricError, match="cannot be loaded as DINOv2"):
        open_dinov2(tmp_path)
    state = safetensors.torch.load_file(dinov2_folder / "model.safetensors")
    del state["layernorm.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MetricError, match=r"lacks 1 tensors of DINOv2, layernorm\.weight"):
        open_dinov2(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_of_another_kind_are_refused(wrong):
    with pytest.raises(MetricError, match=r"c 1 \(gray\) or 3 \(RGB\), got"):
        as_rgb(wrong)


def test_extractors_are_opened_by_name(dinov2_folder, dinov2):
    assert open_extractor("dinov2", dinov2_folder).weights_hash == dinov2.weights_hash
    with pytest.raises(ConfigError, match="one of: digits, inception, dinov2; got 'vgg'"):
        open_extractor("vgg")
    with pytest.raises(ConfigError, match="comes with the package"):
        open_extractor("digits", dinov2_folder)


def test_random_weights_are_those_of_their_seed():
    first, second = random_inception(1), random_inception(1)
    name = "Mixed_5b.branch1x1.conv.weight"
    assert torch.equal(first[name], second[name])


def test_products_are_in_whole_float32_for_the_time_of_a_block():
    """The switches exist without a GPU, too."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    with full_precision(torch.device("cuda")):
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    assert (conv.fp32_precision, matmul.fp32_precision) == before
    with full_precision(torch.device("cpu")):
        assert (conv.fp32_precision, matmul.fp32_precision) == before


def test_large_batches_go_through_in_chunks(dinov2, monkeypatch):
    whole = dinov2(images(5))
    monkeypatch.setattr("reference_trainer.metrics.dinov2.CHUNK", 2)
    assert torch.allclose(dinov2(images(5)), whole, atol=1e-5)
