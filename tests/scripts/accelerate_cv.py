"""Train an image classifier with accelerate; checkpoints by step, resumes from the folder given.

accelerate launch accelerate_cv.py --output_dir run
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Classifier(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))
        self.head = nn.Linear(channels, 10)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, default=Path("accelerated"))
    parser.add_argument("--num_epochs", type=int, default=1)
    parser.add_argument("--checkpointing_steps", type=int, default=None)
    parser.add_argument("--resume_from_checkpoint", type=Path, default=None)
    parser.add_argument("--max_train_steps", type=int, default=None)
    args = parser.parse_args()

    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=loading)
    set_seed(3)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_loader = DataLoader(TensorDataset(images[:1280], labels[:1280]), 32, shuffle=True)
    eval_loader = DataLoader(TensorDataset(images[1280:], labels[1280:]), 128)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=200)
    model, optimizer, train_loader, eval_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, schedule
    )

    losses, step, start_epoch, skip = [], 0, 0, 0
    if args.resume_from_checkpoint is not None:
        accelerator.print(f"Resumed from checkpoint: {args.resume_from_checkpoint}")
        accelerator.load_state(str(args.resume_from_checkpoint))
        step = int(args.resume_from_checkpoint.name.removeprefix("step_"))
        batches = step * 2
        start_epoch, skip = divmod(batches, len(train_loader))

    def finished():
        return args.max_train_steps is not None and step >= args.max_train_steps

    for epoch in range(start_epoch, args.num_epochs):
        model.train()
        train_loader.set_epoch(epoch)
        loader = accelerator.skip_first_batches(train_loader, skip) if skip else train_loader
        skip = 0
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach().reshape(1)).tolist())
            if accelerator.sync_gradients:
                step += 1
                if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                    accelerator.save_state(str(args.output_dir / f"step_{step}"))
            if finished():
                break
        if finished():
            break
    model.eval()
    correct = 0
    for x, y in eval_loader:
        with torch.no_grad():
            predictions, references = accelerator.gather_for_metrics((model(x).argmax(1), y))
        correct += (predictions == references).sum().item()
    accelerator.print(f"accuracy {100 * correct / 517:.2f} after {step} steps")
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "losses.json").write_text(json.dumps(losses))
        torch.save(accelerator.unwrap_model(model).state_dict(), args.output_dir / "final.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
