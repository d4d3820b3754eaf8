"""Two ranks under Lightning's and transformers' own DDP: `python framework_ranks.py WHAT FOLDER`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import warnings
from pathlib import Path

import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)
OPTIONS = {"every": 4, "sigma_rels": (0.05, 0.1), "dtype": "float32", "on_error": "raise"}


def run_lightning(folder):
    import lightning.pytorch as pl

    from posthoc_ema.torch.lightning import PostHocEMA

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 3)
            self.seen = []

        def training_step(self, batch, index):
            return (self.net(batch) - 1).square().mean()

        def validation_step(self, batch, index):
            self.seen.append(self.net.weight.sum().item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(name, epochs, ckpt_path=None, **options):
        torch.manual_seed(1)
        data = torch.utils.data.DataLoader(torch.randn(48, 4), batch_size=4)
        module = Module()
        callback = PostHocEMA(folder / name, validate_with=0.1, **OPTIONS, **options)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[callback, Tell(folder / f"{name}-{epochs}")],
        )  # fmt: skip
        trainer.fit(module, data, data, ckpt_path=ckpt_path)

    class Tell(pl.Callback):
        """What each rank saw; and a checkpoint of the end."""

        def __init__(self, path):
            self.path = path

        def on_fit_end(self, trainer, pl_module):
            (callback,) = (c for c in trainer.callbacks if isinstance(c, PostHocEMA))
            told = {"seen": pl_module.seen, "time": callback.tracker.time}
            Path(f"{self.path}-{trainer.global_rank}.json").write_text(json.dumps(told))
            trainer.save_checkpoint(f"{self.path}.ckpt")

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, options in (("first", {}), ("split", {"shard_averages": True})):
        fit(name, 2, **options)
        fit(name, 3, folder / f"{name}-2.ckpt", **options)
    fit("whole", 3)


def run_transformers(folder, rank):
    import transformers

    from posthoc_ema.torch.transformers import PostHocEMACallback

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 3)

        def forward(self, x):
            return {"loss": (self.net(x) - 1).square().mean()}

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return {"x": torch.randn(4, generator=torch.Generator().manual_seed(index))}

    def fit(name, steps, resume=None, **options):
        ema = PostHocEMACallback(folder / name, **OPTIONS, **options)
        seen = []

        class Averaged(transformers.Trainer):
            def evaluate(self, *args, **kwargs):
                with ema.swapped(sigma_rel=0.1):
                    seen.append(self.model.net.weight.sum().item())
                return {}

        arguments = transformers.TrainingArguments(
            output_dir=folder / f"{name}-out", max_steps=steps, per_device_train_batch_size=4,
            save_steps=5, eval_strategy="steps", eval_steps=5, report_to="none", disable_tqdm=True,
            use_cpu=True, logging_strategy="no", learning_rate=0.1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Averaged(
            Regression(), arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[ema]
        )
        trainer.train(resume_from_checkpoint=resume)
        told = {"seen": seen, "time": ema.tracker.time}
        (folder / f"{name}-{steps}-{rank}.json").write_text(json.dumps(told))

    transformers.logging.set_verbosity_error()
    for name, options in (("first", {}), ("split", {"shard_averages": True})):
        fit(name, 10, **options)
        fit(name, 15, folder / f"{name}-out" / "checkpoint-5", **options)
    fit("whole", 15)


def fork_ranks(world, function):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        code = 1
        try:
            function(rank)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(codes))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "lightning":
        run_lightning(folder)
    else:
        import transformers  # before the ranks are forked: one import for both

        assert transformers.Trainer
        fork_ranks(2, lambda rank: run_transformers(folder, rank))
