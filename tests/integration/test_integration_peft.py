"""Which tensors of a PEFT model are tracked, and under which names, with the real PEFT."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, synthesize
from posthoc_ema.errors import SnapshotMismatchError, TrackingError
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.peft_names import adapter_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries, about themselves


@pytest.fixture(scope="module")
def libraries():
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import peft
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield SimpleNamespace(transformers=transformers, peft=peft, diffusers=diffusers)
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


@pytest.fixture
def base(libraries):
    torch.manual_seed(0)
    config = libraries.transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return libraries.transformers.LlamaForCausalLM(config)


def lora(libraries, **options):
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    return libraries.peft.LoraConfig(**settings)


def saved_names(model, folder):
    """Names of the adapter's file, or of each adapter's file."""
    from safetensors import safe_open

    model.save_pretrained(folder)
    names = []
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        with safe_open(path, "pt") as file:
            names.append(set(file.keys()))
    return names


def perturb(model):
    """A step of training: each trainable parameter moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)


def track_some_steps(model, folder, **options):
    settings = {
        "every": 2,
        "sigma_rels": (0.1,),
        "dtype": "float32",
        "on_error": "raise",
        **options,
    }
    torch.manual_seed(1)
    with Tracker(model, folder, **settings) as tracker:
        for _ in range(4):
            perturb(model)
            tracker.step()
    return SnapshotStore.open(folder).table


def test_other_modules_have_no_adapter(libraries, base):
    assert adapter_tensors(torch.nn.Linear(2, 2)) is None
    assert adapter_tensors(base) is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "lora_only", "target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"use_rslora": True, "lora_bias": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_adapter_has_the_names_of_its_file_and_the_tensors_of_the_model(
    libraries, base, tmp_path, options
):
    model = libraries.peft.get_peft_model(base, lora(libraries, **options))
    tensors = adapter_tensors(model)
    assert saved_names(model, tmp_path / "adapter") == [set(tensors)]
    own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert all(id(tensor) in own for tensor in tensors.values())


@pytest.mark.parametrize(
    "kind", ["IA3Config", "AdaLoraConfig", "LoHaConfig", "VeraConfig", "OFTConfig"]
)
def test_adapters_of_other_kinds(libraries, base, tmp_path, kind):
    options = {
        "IA3Config": {"feedforward_modules": []},
        "AdaLoraConfig": {"total_step": 10},
        "OFTConfig": {"oft_block_size": 2},
    }
    config = getattr(libraries.peft, kind)(target_modules=["q_proj"], **options.get(kind, {}))
    model = libraries.peft.get_peft_model(base, config)
    assert saved_names(model, tmp_path / "adapter") == [set(adapter_tensors(model))]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_that_are_their_own_weights(libraries, base, tmp_path, kind):
    config = getattr(libraries.peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = libraries.peft.get_peft_model(base, config)
    tensors = adapter_tensors(model)
    assert saved_names(model, tmp_path / "adapter") == [set(tensors)] == [{"prompt_embeddings"}]
    assert tensors["prompt_embeddings"] is model.prompt_encoder["default"].embedding.weight


def test_prompts_that_a_network_computes_are_tracked_by_their_parameters(libraries, base):
    config = libraries.peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4
    )
    model = libraries.peft.get_peft_model(base, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = adapter_tensors(model)
    assert tensors.keys() == trained.keys()
    assert all(tensors[name] is trained[name] for name in trained)


def test_wrappers_are_looked_through(libraries, base):
    model = libraries.peft.get_peft_model(base, lora(libraries))
    expected = adapter_tensors(model)
    for wrapped in (
        torch.compile(model, backend="eager"),
        torch.nn.DataParallel(model),
        torch.nn.DataParallel(torch.compile(model, backend="eager")),
    ):
        tensors = adapter_tensors(wrapped)
        assert tensors.keys() == expected.keys()
        assert all(tensors[name] is expected[name] for name in expected)


def test_the_hub_is_not_asked(libraries, base, monkeypatch):
    model = libraries.peft.get_peft_model(base, lora(libraries))
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"

    def fail(*args, **kwargs):
        pytest.fail("asked the hub")

    from peft.utils import save_and_load

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", fail)
    assert len(adapter_tensors(model)) == 2


# ---- several adapters


def test_the_adapter_that_trains_is_tracked(libraries, base, tmp_path):
    model = libraries.peft.get_peft_model(base, lora(libraries), adapter_name="first")
    model.add_adapter("second", lora(libraries, r=4))
    model.set_adapter("second")
    table = track_some_steps(model, tmp_path / "snapshots")
    _, second = saved_names(model, tmp_path / "adapters")
    assert table.entries.keys() == second
    assert {entry.shape for entry in table.entries.values()} == {(4, 8), (8, 4)}


def test_two_adapters_that_train_keep_the_names_of_the_model(libraries, base, tmp_path, phema):
    """Their files have the same names, so --like cannot tell them apart; PEFT can."""
    model = libraries.peft.get_peft_model(base, lora(libraries), adapter_name="first")
    model.add_adapter("second", lora(libraries, r=4))
    model.base_model.set_adapter(["first", "second"])
    table = track_some_steps(model, tmp_path / "snapshots")
    adapters = sorted(name.split(".")[-2] for name in table.entries)
    assert adapters == ["first", "first", "second", "second"]
    names = saved_names(model, tmp_path / "adapters")
    for adapter in ("first", "second"):
        like = ("--like", f"adapters/{adapter}", "--out", "average")
        phema("synth", "snapshots", "--sigma-rel", 0.1, *like).refused("would be lost")

    average = synthesize(tmp_path / "snapshots", 0.1)
    tensors = {name: torch.from_numpy(array) for name, array in average.items()}
    for adapter, wanted in zip(("first", "second"), names, strict=True):
        own = libraries.peft.get_peft_model_state_dict(model, tensors, adapter_name=adapter)
        assert own.keys() == wanted
        libraries.peft.set_peft_model_state_dict(model, own, adapter_name=adapter)
    assert all(torch.equal(model.state_dict()[name], tensors[name]) for name in tensors)


def test_an_adapter_that_is_exchanged_during_the_run_is_refused(libraries, base, tmp_path):
    model = libraries.peft.get_peft_model(base, lora(libraries), adapter_name="first")
    model.add_adapter("second", lora(libraries, r=4))
    with Tracker(model, tmp_path / "snapshots", every=2, on_error="raise") as tracker:
        tracker.step()
        model.set_adapter("second")
        with pytest.raises(TrackingError, match="the model changed while it was tracked"):
            tracker.step()


def test_a_store_of_an_adapter_is_not_continued_by_another(libraries, base, tmp_path):
    model = libraries.peft.get_peft_model(base, lora(libraries))
    track_some_steps(model, tmp_path / "snapshots")
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("second", lora(libraries, target_modules=["v_proj"]))
    model.set_adapter("second")
    with pytest.raises(SnapshotMismatchError):
        track_some_steps(model, tmp_path / "snapshots")


# ---- evaluating, and models without a PeftModel


def test_an_average_of_the_adapter_is_swapped_in(libraries, base, tmp_path):
    model = libraries.peft.get_peft_model(base, lora(libraries))
    with Tracker(model, tmp_path / "snapshots", every=2, sigma_rels=(0.1,)) as tracker:
        for _ in range(4):
            perturb(model)
            tracker.step()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with tracker.swapped(sigma_rel=0.1):
            average = tracker.averages(0.1)
            for name, tensor in adapter_tensors(model).items():
                assert torch.equal(tensor, average[name])
        with tracker.swapped(sigma_rel=0.07):
            changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
            assert len(changed) == 2
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_diffusers_adapter_without_a_peft_model(libraries, phema, tmp_path):
    """unet.add_adapter and save_lora_weights, as diffusers' training scripts do."""
    unet = libraries.diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    unet.requires_grad_(False)
    config = lora(libraries, target_modules=["to_q", "to_v"])
    libraries.peft.inject_adapter_in_model(config, unet)
    table = track_some_steps(unet, tmp_path / "snapshots", tensors="trainable")
    trained = {n for n, p in unet.named_parameters() if p.requires_grad}
    assert table.entries.keys() == trained
    from safetensors.torch import load_file, save_file

    unet.peft_config = {"default": config}
    layers = libraries.peft.get_peft_model_state_dict(unet)
    save_file({f"unet.{n}": t for n, t in layers.items()}, tmp_path / "lora.safetensors")
    phema(
        *("synth", "snapshots", "--sigma-rel", 0.1, "--like", "lora.safetensors"),
        *("--out", "average.safetensors"),
    ).succeeded()
    average = synthesize(tmp_path / "snapshots", 0.1)
    written = load_file(tmp_path / "average.safetensors")
    assert {
        n.removeprefix("unet.").replace(".weight", ".default.weight") for n in written
    } == trained
    for name, tensor in written.items():
        expected = average[name.removeprefix("unet.").replace(".weight", ".default.weight")]
        np.testing.assert_array_equal(tensor.numpy(), expected)
