"""The callback for the transformers Trainer, with the real Trainer."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, gamma_from_sigma_rel, power_average, synthesize
from posthoc_ema.errors import SnapshotMismatchError, TrackingError

SIGMA_REL = 0.1
STEPS = 12

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries, about themselves


@pytest.fixture(scope="module")
def hf():
    """transformers and what the tests use of it, without the network."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        from posthoc_ema.torch.transformers import STATE_FOLDER, PostHocEMACallback
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield SimpleNamespace(lib=transformers, Callback=PostHocEMACallback, STATE_FOLDER=STATE_FOLDER)
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


def build_model(hf):
    torch.manual_seed(0)
    config = hf.lib.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return hf.lib.GPT2LMHeadModel(config)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = (index + torch.arange(8)) % 32
        return {"input_ids": row, "labels": row}


def make_trainer(hf, folder, *, model=None, callback=None, trainer_class=None, **arguments):
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
        **arguments,
    }
    callback = callback or make_callback(hf, folder)
    trainer = (trainer_class or hf.lib.Trainer)(
        model if model is not None else build_model(hf),
        hf.lib.TrainingArguments(**settings),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[callback],
    )
    return trainer, callback


def make_callback(hf, folder, **options):
    settings = {"every": 4, "sigma_rels": (0.05, SIGMA_REL), "dtype": "float32", **options}
    return hf.Callback(folder / "snapshots", on_error="raise", **settings)


def bits(folder):
    """What a store holds, bit for bit: (time, profile) -> name -> bytes."""
    store = SnapshotStore.open(folder)
    contents = {}
    for record in store.records:
        with store.read(record) as reader:
            contents[record.time, repr(record.profile)] = {
                e.name: (
                    reader.values(e, 0, math.prod(e.shape)) if e.averaged else reader.copy(e)
                ).tobytes()
                for e in store.table.entries.values()
            }
    return contents


def test_trainer_averages_are_those_of_the_optimizer_steps(hf, tmp_path):
    """With gradient accumulation; against the oracle, fed with the weights after each step."""
    seen = []

    class Watch(hf.lib.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({n: p.detach().clone().numpy() for n, p in model.named_parameters()})

    trainer, callback = make_trainer(hf, tmp_path, gradient_accumulation_steps=2)
    trainer.add_callback(Watch())
    trainer.train()
    assert (callback.tracker.time, len(seen)) == (STEPS, STEPS)
    store = SnapshotStore.open(tmp_path / "snapshots")
    assert store.times == [4, 8, 12]
    average = synthesize(store, SIGMA_REL)
    gamma = float(gamma_from_sigma_rel(SIGMA_REL))
    for name in seen[0]:
        expected = power_average([w[name] for w in seen], range(1, STEPS + 1), gamma)
        np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-7)
    tensors = {name: torch.from_numpy(array) for name, array in average.items()}
    build_model(hf).load_state_dict(tensors, strict=True)


def test_trainer_trains_the_same_with_the_callback(hf, tmp_path):
    trainer, _ = make_trainer(hf, tmp_path)
    trainer.train()
    plain, _ = make_trainer(hf, tmp_path / "plain")
    plain.remove_callback(hf.Callback)
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_trainer_resumes_bit_for_bit(hf, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = make_trainer(hf, tmp_path / "whole", **save)
    whole.train()

    cut, _ = make_trainer(hf, tmp_path / "cut", **save)
    cut.train()  # to the end; what is later than the checkpoint is done again
    again, callback = make_trainer(hf, tmp_path / "cut", **save)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / "checkpoint-5"))
    assert callback.tracker.time == STEPS
    expected = bits(tmp_path / "whole" / "snapshots")
    assert {time for time, _ in expected} == {4, 8, 12}
    assert bits(tmp_path / "cut" / "snapshots") == expected

    shutil.move(tmp_path / "cut" / "out" / "checkpoint-10", tmp_path / "elsewhere")
    moved = make_callback(hf, tmp_path / "cut", resume_from=tmp_path / "elsewhere")
    third, _ = make_trainer(hf, tmp_path / "cut", callback=moved, **save)
    third.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert bits(tmp_path / "cut" / "snapshots") == expected


def test_trainer_that_resumes_without_a_state_says_what_to_do(hf, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 5}
    trainer, _ = make_trainer(hf, tmp_path, **save)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    shutil.rmtree(checkpoint / hf.STATE_FOLDER)
    again, _ = make_trainer(hf, tmp_path, **save)
    with pytest.raises(TrackingError, match="holds no state of the averages") as caught:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert "resume_from=CHECKPOINT" in str(caught.value)


def test_trainer_refuses_the_folder_of_another_run(hf, tmp_path):
    make_trainer(hf, tmp_path)[0].train()
    again, _ = make_trainer(hf, tmp_path)
    with pytest.raises(SnapshotMismatchError, match=r"trainer.train\(resume_from_checkpoint"):
        again.train()


def test_trainer_that_loads_its_best_weights_stores_the_last_ones(hf, tmp_path):
    class Worse(hf.lib.Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = float(self.state.global_step)
            return metrics

    trainer, _ = make_trainer(
        *(hf, tmp_path),
        trainer_class=Worse,
        callback=make_callback(hf, tmp_path, every=None),
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    last = {}

    class Watch(hf.lib.TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            last.update({n: p.detach().clone() for n, p in model.named_parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    raw = synthesize(tmp_path / "snapshots", 0)
    assert all(torch.equal(last[name], torch.from_numpy(raw[name])) for name in last)


def test_trainer_counts_no_step_that_the_scaler_skipped(hf, tmp_path):
    callback = make_callback(hf, tmp_path)
    model, state = build_model(hf), SimpleNamespace(global_step=0)
    args = SimpleNamespace(auto_find_batch_size=False)
    callback.on_train_begin(args, state, None, model=model)
    for skipped in (False, True, True, False):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    assert callback.tracker.time == 2
    callback.on_train_end(None, state, None)


@pytest.mark.parametrize("finds_batch_size", [True, False])
def test_trainer_that_begins_again_starts_over_only_for_its_batch_size(
    hf, tmp_path, finds_batch_size
):
    """auto_find_batch_size calls on_train_begin anew after a step that ran out of memory.

    Otherwise it is a second run after one that was interrupted, whose snapshots are not thrown away.
    """
    callback = make_callback(hf, tmp_path, every=1)
    model, state = build_model(hf), SimpleNamespace(global_step=0)
    args = SimpleNamespace(auto_find_batch_size=finds_batch_size)
    optimizer = SimpleNamespace(step_was_skipped=False)
    callback.on_train_begin(args, state, None, model=model)
    for _ in range(3):
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    if not finds_batch_size:
        with pytest.raises(SnapshotMismatchError, match="choose a new folder"):
            callback.on_train_begin(args, state, None, model=model)
        assert SnapshotStore.open(tmp_path / "snapshots").times == [1, 2, 3]
        return
    callback.on_train_begin(args, state, None, model=model)
    for _ in range(2):
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    callback.on_train_end(args, state, None)
    assert SnapshotStore.open(tmp_path / "snapshots").times == [1, 2]


def test_trainer_evaluates_an_average_during_and_after_training(hf, tmp_path):
    callback = make_callback(hf, tmp_path)
    seen = []

    class Averaged(hf.lib.Trainer):
        def evaluate(self, *args, **kwargs):
            with callback.swapped(sigma_rel=SIGMA_REL):
                seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
                return super().evaluate(*args, **kwargs)

    trainer, _ = make_trainer(
        *(hf, tmp_path),
        callback=callback,
        trainer_class=Averaged,
        eval_strategy="steps",
        eval_steps=STEPS,
        eval_on_start=True,
    )
    trainer.train()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.evaluate()
    at_start, at_end, afterwards = seen
    fresh = build_model(hf).state_dict()
    assert all(torch.equal(fresh[n], p) for n, p in at_start.items())
    average = synthesize(tmp_path / "snapshots", SIGMA_REL)
    for name, p in at_end.items():
        np.testing.assert_array_equal(p.numpy(), average[name])
        assert torch.equal(p, afterwards[name])
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


# ---- PEFT


@pytest.fixture(scope="module")
def peft(hf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    return peft


def lora(peft, **options):
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    return peft.LoraConfig(init_lora_weights=False, **settings)


@pytest.fixture
def base(hf, tmp_path):
    model = build_model(hf)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(hf, base):
    return hf.lib.AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["ln_f"]}, {"use_dora": True}, {"target_modules": ["wte"]}]
)
def test_trainer_tracks_the_adapter_only_and_the_output_loads(
    hf, peft, base, phema, tmp_path, options
):
    adapted = peft.get_peft_model(
        load_base(hf, base),
        lora(peft, **options)
        if "target_modules" not in options
        else lora(peft, **options, fan_in_fan_out=False),
    )
    trainer, _ = make_trainer(hf, tmp_path, model=adapted)
    trainer.train()
    adapted.save_pretrained(tmp_path / "adapter")

    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert set(SnapshotStore.open(tmp_path / "snapshots").table.entries) == saved
    phema(
        *("synth", "snapshots", "--sigma-rel", SIGMA_REL, "--like", "adapter", "--out", "average")
    ).succeeded()

    average = synthesize(tmp_path / "snapshots", SIGMA_REL)
    loaded = peft.PeftModel.from_pretrained(load_base(hf, base), tmp_path / "average")
    added = peft.PeftModel.from_pretrained(load_base(hf, base), tmp_path / "adapter")
    added.load_adapter(tmp_path / "average", adapter_name="average")
    for model, adapter in ((loaded, "default"), (added, "average")):
        state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
        assert state.keys() == average.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(tensor.numpy(), average[name])
