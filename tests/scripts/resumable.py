"""A small training that may be killed at any moment: it goes on from its last checkpoint."""

import argparse
import os
import signal
from pathlib import Path

import torch
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--crash-at", type=int, default=None)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoint = args.folder / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    progress = os.open(args.folder / "progress", os.O_CREAT | os.O_WRONLY)
    os.pwrite(progress, b"%08d" % first, 0)
    print(f"training from step {first}", flush=True)
    for step in range(first + 1, args.steps + 1):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True)).backward()
        optimizer.step()
        os.pwrite(progress, b"%08d" % step, 0)
        if step % args.checkpoint_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, args.folder / "checkpoint.tmp")
            (args.folder / "checkpoint.tmp").replace(checkpoint)
        if step == args.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
    print(f"done at step {args.steps}", flush=True)


if __name__ == "__main__":
    main()
