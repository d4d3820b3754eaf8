"""Train a small causal language model from its configuration with the transformers Trainer."""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


class Sequences(Dataset):
    """Counting upwards from anywhere, in steps of one to four."""

    def __init__(self, count=256, length=16, vocabulary=48):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, vocabulary, (count, 1), generator=generator)
        stride = torch.randint(1, 5, (count, 1), generator=generator)
        self.rows = (start + stride * torch.arange(length)) % vocabulary

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class LossTrainer(Trainer):
    """Keeps the loss of each micro-batch."""

    losses: list[float]

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if model.training:
            self.losses.append(loss.item())
        return result


class StopAt(TrainerCallback):
    """Leaves early, as a job's time limit does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def build_model():
    config = GPT2Config(
        vocab_size=48,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, default=Path("trained"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--stop_at", type=int, default=None)
    args = parser.parse_args()

    set_seed(42)
    model = build_model()
    training_args = TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        warmup_steps=4,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=args.save_steps,
        seed=42,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = LossTrainer(
        model=model,
        args=training_args,
        train_dataset=Sequences(),
        eval_dataset=Sequences(count=32),
        data_collator=default_data_collator,
    )
    trainer.losses = []
    if args.stop_at is not None:
        trainer.add_callback(StopAt(args.stop_at))
    last = get_last_checkpoint(str(args.output_dir)) if args.output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate()
    result = {"train": trainer.losses, "eval": metrics["eval_loss"]}
    (args.output_dir / "losses.json").write_text(json.dumps(result))
    trainer.save_model(str(args.output_dir / "final"))


if __name__ == "__main__":
    main()
