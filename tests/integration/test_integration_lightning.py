"""The Lightning callback, with the real Trainer."""

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, gamma_from_sigma_rel, power_average, synthesize
from posthoc_ema.errors import ConfigError, SnapshotMismatchError

SIGMA_REL = 0.1

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning, about itself

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    from posthoc_ema.torch.lightning import PostHocEMA

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """A small regression with BatchNorm; keeps its weights after each step, and what validation saw."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 4),
            torch.nn.BatchNorm1d(4),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(4, 1),
        )
        self.seen, self.validated = [], []
        self.fail_at = None

    def training_step(self, batch, index):
        torch.manual_seed(self.global_step)  # Lightning does not save the state of the generator
        return (self.net(batch) - 1).square().mean()

    def on_train_start(self):
        self.before = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *args):
        if all(torch.equal(a, b) for a, b in zip(self.before, self.parameters(), strict=True)):
            return  # gradients were accumulated
        self.on_train_start()
        self.seen.append({n: p.detach().clone() for n, p in self.named_parameters()})

    def validation_step(self, batch, index):
        if self.fail_at == self.global_step and not self.trainer.sanity_checking:
            raise RuntimeError("validation failed")
        self.validated.append({n: p.detach().clone() for n, p in self.named_parameters()})
        self.log("val_loss", (self.net(batch) - 1).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Manual(Module):
    """Two optimizers for two parts, stepped by hand, one of them every other time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        first, second = self.optimizers()
        loss = (self.net(batch) - 1).square().mean() + self.other(batch).square().mean()
        self.manual_backward(loss)
        first.step()
        if index % 2:
            second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.net.parameters(), lr=0.01),
            torch.optim.SGD(self.other.parameters(), lr=0.01),
        )


def loader(count=12):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count * 4, 4, generator=generator)
    return torch.utils.data.DataLoader(data, batch_size=4)


def make_callback(folder, **options):
    settings = {"every": 4, "sigma_rels": (0.05, SIGMA_REL), "dtype": "float32", **options}
    return PostHocEMA(folder / "snapshots", on_error="raise", **settings)


def make_trainer(folder, *callbacks, **options):
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": str(folder), **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return pl.Trainer(callbacks=list(callbacks), **settings)


def make_module(kind=Module):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return kind()


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


def assert_is_average_of(average, seen, rtol=1e-5):
    gamma = float(gamma_from_sigma_rel(SIGMA_REL))
    for name in seen[0]:
        expected = power_average([w[name].numpy() for w in seen], range(1, len(seen) + 1), gamma)
        np.testing.assert_allclose(average[name], expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_averages_are_those_of_the_optimizer_steps(tmp_path, accumulate):
    module, callback = make_module(), make_callback(tmp_path)
    trainer = make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader())
    steps = 12 // accumulate
    assert (callback.tracker.time, len(module.seen), trainer.global_step) == (steps, steps, steps)
    average = synthesize(tmp_path / "snapshots", SIGMA_REL)
    assert_is_average_of(average, module.seen)
    make_module().load_state_dict({n: torch.from_numpy(a) for n, a in average.items()})


def test_lightning_manual_optimization_with_two_optimizers(tmp_path):
    """One update for an iteration of both; a callback of a submodule follows its optimizer."""
    module = make_module(Manual)
    whole = make_callback(tmp_path)
    part = make_callback(tmp_path / "part", module="other")
    make_trainer(tmp_path, whole, part).fit(module, loader())
    assert (whole.tracker.time, part.tracker.time) == (12, 6)
    assert_is_average_of(synthesize(tmp_path / "snapshots", SIGMA_REL), module.seen)
    average = synthesize(tmp_path / "part" / "snapshots", SIGMA_REL)
    assert set(average) == {"weight", "bias"}
    own = [{n: w[f"other.{n}"] for n in ("weight", "bias")} for w in module.seen[1::2]]
    assert_is_average_of(average, own)


def fit_to(folder, epochs, callback, ckpt_path=None):
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder / "checkpoints", filename="{epoch}", save_top_k=-1, save_weights_only=False
    )
    module = make_module()
    trainer = make_trainer(
        folder, callback, checkpoint, max_epochs=epochs, enable_checkpointing=True
    )
    trainer.fit(module, loader(6), ckpt_path=ckpt_path)
    return module


def test_lightning_resumes_bit_for_bit(tmp_path):
    fit_to(tmp_path / "whole", 3, make_callback(tmp_path / "whole"))
    cut = tmp_path / "cut"
    fit_to(cut, 3, make_callback(cut))
    first = make_callback(cut)
    fit_to(cut, 3, first, cut / "checkpoints" / "epoch=0.ckpt")
    assert first.tracker.time == 18
    expected = bits(tmp_path / "whole" / "snapshots")
    assert {time for time, _ in expected} == {4, 8, 12, 16, 18}
    assert bits(cut / "snapshots") == expected


def test_lightning_state_is_that_of_the_checkpoint(tmp_path):
    callback = make_callback(tmp_path)
    module = fit_to(tmp_path, 2, callback)
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (s for key, s in states.items() if key.startswith("PostHocEMA"))
    assert (state["time"], state["run_id"]) == (
        6,
        SnapshotStore.open(tmp_path / "snapshots").run_id,
    )
    averages = {n: a[1].numpy() for n, a in state["averages"].items()}
    assert_is_average_of(averages, module.seen[:6])


def test_lightning_checkpoint_saved_after_fitting_holds_the_state(tmp_path):
    callback = make_callback(tmp_path)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(make_module(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    more = make_callback(tmp_path)
    make_trainer(tmp_path, more, max_epochs=2).fit(
        make_module(), loader(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert more.tracker.time == 24
    assert SnapshotStore.open(tmp_path / "snapshots").times == [4, 8, 12, 16, 20, 24]


def test_lightning_can_fit_on_with_the_same_callback(tmp_path):
    callback, module = make_callback(tmp_path), make_module()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.tracker.time == 24
    assert_is_average_of(synthesize(tmp_path / "snapshots", SIGMA_REL), module.seen)


def test_lightning_refuses_the_folder_of_another_run(tmp_path):
    make_trainer(tmp_path, make_callback(tmp_path)).fit(make_module(), loader())
    with pytest.raises(SnapshotMismatchError, match="ckpt_path"):
        make_trainer(tmp_path, make_callback(tmp_path)).fit(make_module(), loader())


def test_lightning_checkpoint_of_a_run_without_the_callback(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_module(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = make_callback(tmp_path)
    with caplog.at_level("WARNING", logger="posthoc_ema"):
        make_trainer(tmp_path, callback, max_epochs=2).fit(
            make_module(), loader(), ckpt_path=tmp_path / "last.ckpt"
        )
    assert "averages begin now" in caplog.text
    assert callback.tracker.time == 12


def test_lightning_fast_dev_run_leaves_no_folder(tmp_path):
    make_trainer(tmp_path, make_callback(tmp_path), fast_dev_run=True).fit(make_module(), loader())
    assert not (tmp_path / "snapshots").exists()


# ---- validating an average


def test_lightning_validates_the_average_and_trains_on_as_without(tmp_path):
    runs = {}
    for validate_with in (None, SIGMA_REL):
        folder = tmp_path / str(validate_with)
        module, callback = make_module(), make_callback(folder, validate_with=validate_with)
        checkpoint = pl.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_last=True)
        make_trainer(
            folder, callback, checkpoint, val_check_interval=6, enable_checkpointing=True
        ).fit(module, loader(), loader(1))
        runs[validate_with] = module
        saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(saved[n], w) for n, w in module.seen[-1].items())
    plain, swapped = runs[None], runs[SIGMA_REL]
    assert len(plain.seen) == len(swapped.seen) == 12
    for a, b in zip(plain.seen, swapped.seen, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    sanity, after_six, after_twelve = swapped.validated[-3:]
    assert all(torch.equal(sanity[n], w) for n, w in plain.validated[0].items())
    assert_is_average_of({n: w.numpy() for n, w in after_six.items()}, plain.seen[:6])
    assert_is_average_of({n: w.numpy() for n, w in after_twelve.items()}, plain.seen)
    assert swapped.training
    assert swapped.net[2].training


@pytest.mark.parametrize("inference_mode", [True, False])
def test_lightning_weights_come_back_when_validation_fails(tmp_path, inference_mode):
    module, callback = make_module(), make_callback(tmp_path, validate_with=SIGMA_REL)
    module.fail_at = 6
    trainer = make_trainer(tmp_path, callback, val_check_interval=6, inference_mode=inference_mode)
    with pytest.raises(RuntimeError, match="validation failed"):
        trainer.fit(module, loader(), loader(1))
    assert all(torch.equal(p, module.seen[-1][n]) for n, p in module.named_parameters())
    module.fail_at = None
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, loader(), loader(1))  # the callback goes on where it was
    assert callback.tracker.time == 6 + 24


def test_lightning_validate_with_needs_a_tracked_length(tmp_path):
    with pytest.raises(ConfigError, match=r"validate_with must be a tracked length, got 0\.2"):
        make_callback(tmp_path, validate_with=0.2)


def test_lightning_under_its_old_name(tmp_path):
    """The callback serves pytorch_lightning's Trainer, too."""
    import pytorch_lightning

    class Old(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    callback = make_callback(tmp_path)
    trainer = pytorch_lightning.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Old(), loader())
    assert callback.tracker.time == 12
