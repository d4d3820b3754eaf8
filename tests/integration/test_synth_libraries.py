"""Round trips with transformers, diffusers and PEFT: save, track, `phema synth --like`, load, compare."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posthoc_ema import gamma_from_sigma_rel, power_average
from posthoc_ema.torch import track

SIGMA_REL = 0.1
STEPS = 24


@pytest.fixture(scope="module")
def libraries():
    """The libraries, imported once, without the network."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import peft
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    yield SimpleNamespace(transformers=transformers, diffusers=diffusers, peft=peft)
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


def train(model, loss, folder):
    """Some real optimizer steps with the tracker on; the model comes back with its direct average.

    The average is computed here from all weights that the model went through, in float64.
    """
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    tracker = track(
        optimizer, model, folder, sigma_rels=(0.05, SIGMA_REL), every=4, dtype="float32"
    )
    torch.manual_seed(1)
    trajectory = {name: [] for name in trained}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        for name, parameter in trained.items():
            trajectory[name].append(parameter.detach().clone().numpy())
    tracker.close()
    gamma = float(gamma_from_sigma_rel(SIGMA_REL))
    with torch.no_grad():
        for name, parameter in trained.items():
            average = power_average(trajectory[name], range(1, STEPS + 1), gamma)
            parameter.copy_(torch.from_numpy(average))
    return model.eval()


def files_of(folder):
    return sorted(p.name for p in folder.iterdir())


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- transformers


@pytest.fixture
def language_model(libraries):
    """A tiny GPT-2: tied embeddings, so the saved file has one name of two."""
    torch.manual_seed(0)
    config = libraries.transformers.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return libraries.transformers.GPT2LMHeadModel(config)


def language_loss(model):
    tokens = torch.randint(0, 48, (4, 12))
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
def test_transformers_model(libraries, language_model, phema, tmp_path, shard):
    base = tmp_path / "base"
    with quiet():
        language_model.save_pretrained(base, max_shard_size=shard)
    direct = train(language_model, language_loss, tmp_path / "snapshots")
    tokens = torch.arange(12)[None]
    expected = direct(input_ids=tokens).logits

    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "base", "--out", "out")
    ).succeeded()
    weights = {name for name in files_of(base) if name.startswith("model")}
    assert (len(weights) > 2) == (shard == "10KB")
    assert set(files_of(base)) | {"README.md", "phema.json"} == set(files_of(tmp_path / "out"))
    with quiet():
        loaded, info = libraries.transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)

    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "base", "--out", "base"),
        *("--variant", "ema"),
    ).succeeded()
    with quiet():
        variant = libraries.transformers.AutoModelForCausalLM.from_pretrained(base, variant="ema")
        plain = libraries.transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(variant.eval()(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    assert not torch.equal(plain.eval()(input_ids=tokens).logits, expected)


def test_transformers_model_in_half_precision(libraries, language_model, phema, tmp_path):
    """The base decides the dtype: averages of float32 masters become a bfloat16 release."""
    with quiet():
        language_model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    direct = train(language_model.float(), language_loss, tmp_path / "snapshots")
    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "base", "--out", "out")
    ).succeeded()
    with quiet():
        loaded = libraries.transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype="auto"
        )
    assert loaded.dtype == torch.bfloat16
    for name, value in direct.named_parameters():
        found = loaded.get_parameter(name)
        torch.testing.assert_close(found.float(), value, rtol=2**-8, atol=1e-6)


def test_base_of_the_headless_model_takes_its_part_and_says_what_it_leaves_out(
    libraries, phema, tmp_path
):
    config = libraries.transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = libraries.transformers.BertForSequenceClassification(config)
    with quiet():
        model.bert.save_pretrained(tmp_path / "headless")
        model.save_pretrained(tmp_path / "whole")

    def loss(model):
        return model(torch.randint(0, 32, (4, 8)), labels=torch.randint(0, 2, (4,))).loss

    direct = train(model, loss, tmp_path / "snapshots")
    done = phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "headless", "--out", "part")
    )
    assert done.code == 0
    assert "other parts of the model are not in the base" in done.err
    assert "classifier" in done.err
    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "whole", "--out", "out")
    ).succeeded()
    with quiet():
        loaded = libraries.transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out"
        ).eval()
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(loaded(tokens).logits, direct(tokens).logits, rtol=0, atol=1e-5)


# ---- diffusers


@pytest.fixture
def unet(libraries):
    torch.manual_seed(0)
    return libraries.diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    )  # fmt: skip


def unet_loss(model):
    return (model(torch.randn(2, 1, 8, 8), 10).sample - 1).square().mean()


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
def test_diffusers_model(libraries, unet, phema, tmp_path, shard):
    base = tmp_path / "pipe" / "unet"
    with quiet():
        unet.save_pretrained(base, max_shard_size=shard)
    direct = train(unet, unet_loss, tmp_path / "snapshots")
    image = torch.randn(1, 1, 8, 8)
    expected = direct(image, 5).sample
    common = ("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", base)
    phema(*common, "--out", "out").succeeded()
    phema(*common, "--out", base, "--variant", "ema").succeeded()
    assert ("diffusion_pytorch_model.safetensors" in files_of(base)) == (shard == "5GB")
    load = libraries.diffusers.UNet2DModel.from_pretrained
    with quiet():
        loaded, variant, plain = load(tmp_path / "out"), load(base, variant="ema"), load(base)
    for model in (loaded, variant):
        torch.testing.assert_close(model.eval()(image, 5).sample, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain.eval()(image, 5).sample, expected, atol=1e-4)


# ---- PEFT


def test_peft_adapter(libraries, language_model, phema, tmp_path):
    peft = libraries.peft
    with quiet():
        language_model.save_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(
            language_model,
            peft.LoraConfig(
                r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
            ),
        )
        adapted.save_pretrained(tmp_path / "adapter")
    direct = train(adapted, language_loss, tmp_path / "snapshots")
    tokens = torch.arange(12)[None]
    expected = direct(input_ids=tokens).logits
    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "adapter", "--out", "out")
    ).succeeded()
    assert "adapter_model.safetensors" in files_of(tmp_path / "out")
    assert "adapter_config.json" in files_of(tmp_path / "out")
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert size < 2 * (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    with quiet():
        fresh = libraries.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "out" / "phema.json").read_text())
    assert record["sigma_rel"] == SIGMA_REL


# ---- checkpoints of a trainer


def test_checkpoints_of_transformers_become_a_drop_in_folder(
    libraries, language_model, phema, tmp_path
):
    """What users without a tracker have: checkpoint-N folders."""
    model, states = language_model, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 9):
        optimizer.zero_grad()
        language_loss(model).backward()
        optimizer.step()
        with quiet():
            model.save_pretrained(
                tmp_path / "run" / f"checkpoint-{step * 100}", max_shard_size="10KB"
            )
        states[step * 100] = {n: v.detach().clone() for n, v in model.named_parameters()}
    value = json.loads(
        phema(
            *("synth", "run", "--from-checkpoints", "--sigma-rel", "0.15", "--json"),
            *("--like", "run/checkpoint-800", "--out", "out"),
        ).succeeded()
    )
    assert (value["time"], value["inputs"]) == (800, 8)
    record = json.loads((tmp_path / "out" / "phema.json").read_text())
    x = {row["time"]: row["coefficient"] for row in record["inputs"]}
    assert sum(x.values()) == pytest.approx(1)
    with quiet():
        loaded = libraries.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, found in loaded.named_parameters():
        expected = sum(c * states[t][name].double() for t, c in x.items())
        np.testing.assert_allclose(found.detach(), expected, atol=1e-6)
