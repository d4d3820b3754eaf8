"""Train a character-level transformer, on one process or with DistributedDataParallel.

python char_gpt.py --max_iters=100
torchrun --standalone --nproc_per_node=2 char_gpt.py
"""

import argparse
import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

TEXT = (
    "It was on a dreary night of autumn that the lamp went out and the wind took the papers from the "
    "desk. Nobody saw the door open. She counted the steps, as she had done each evening since June: "
    "twelve down, a turn, and nine across the yard to the well.\n"
) * 8


@dataclass
class GPTConfig:
    block_size: int = 32
    vocab_size: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32
    dropout: float = 0.1
    bias: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(c, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
            nn.Dropout(config.dropout),
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying

    def forward(self, idx, targets):
        position = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def get_lr(it, args):
    if it < args.warmup_iters:
        return args.learning_rate * (it + 1) / (args.warmup_iters + 1)
    ratio = min((it - args.warmup_iters) / max(args.lr_decay_iters - args.warmup_iters, 1), 1.0)
    return args.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (
        args.learning_rate - args.min_lr
    )


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out_dir", type=Path, default=Path("out"))
    parser.add_argument("--max_iters", type=int, default=24)
    parser.add_argument(
        "--stop_at", type=int, default=None, help="leave here, as a job's time limit does"
    )
    parser.add_argument("--eval_interval", type=int, default=8)
    parser.add_argument("--log_interval", type=int, default=4)
    parser.add_argument("--always_save_checkpoint", action="store_true")
    parser.add_argument("--checkpoint_interval", type=int, default=None, help="keep one of each")
    parser.add_argument("--init_from", choices=["scratch", "resume"], default="scratch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--min_lr", type=float, default=1e-3)
    parser.add_argument("--warmup_iters", type=int, default=4)
    parser.add_argument("--lr_decay_iters", type=int, default=24)
    parser.add_argument("--grad_clip", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main():
    args = parse()
    ddp = int(os.environ.get("RANK", -1)) != -1
    if ddp:
        dist.init_process_group(backend="gloo")
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        assert args.gradient_accumulation_steps % world == 0
        args.gradient_accumulation_steps //= world
    else:
        rank, world = 0, 1
    master = rank == 0
    if master:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    tokens = args.gradient_accumulation_steps * world * args.batch_size * GPTConfig.block_size
    if master:
        print(f"tokens per iteration will be: {tokens:,}")

    torch.manual_seed(1337 + rank)
    chars = sorted(set(TEXT))
    encode = {c: i for i, c in enumerate(chars)}
    data = torch.tensor([encode[c] for c in TEXT])
    train_data, val_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    context = contextlib.nullcontext()
    if args.dtype == "bfloat16":
        context = torch.amp.autocast(device_type="cpu", dtype=torch.bfloat16)

    def get_batch(split):
        source = train_data if split == "train" else val_data
        ix = torch.randint(len(source) - GPTConfig.block_size, (args.batch_size,))
        x = torch.stack([source[i : i + GPTConfig.block_size] for i in ix])
        y = torch.stack([source[i + 1 : i + 1 + GPTConfig.block_size] for i in ix])
        return x, y

    config, iter_num, best_val_loss, history = GPTConfig(), 0, 1e9, []
    if args.init_from == "resume":
        checkpoint = torch.load(args.out_dir / "ckpt.pt", weights_only=True)
        config = GPTConfig(**checkpoint["model_args"])
    model = GPT(config)
    if args.init_from == "resume":
        model.load_state_dict(checkpoint["model"])
        iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        history = checkpoint["history"]
        torch.set_rng_state(checkpoint["rng_states"][rank])
    optimizer = model.configure_optimizers(1e-1, args.learning_rate, (0.9, 0.95))
    if args.init_from == "resume":
        optimizer.load_state_dict(checkpoint["optimizer"])
        checkpoint = None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if args.compile:
        if master:
            print("compiling the model... (takes a while)")
        model = torch.compile(model)
    if ddp:
        model = DDP(model)
    raw_model = model.module if ddp else model
    raw_model = getattr(raw_model, "_orig_mod", raw_model)

    @torch.no_grad()
    def estimate_loss():
        out = {}
        model.eval()
        for split in ("train", "val"):
            out[split] = torch.stack([raw_model(*get_batch(split)) for _ in range(2)]).mean().item()
        model.train()
        return out

    begin = time.time()
    while True:
        lr = get_lr(iter_num, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        evaluating = iter_num % args.eval_interval == 0
        keeping = args.checkpoint_interval and iter_num % args.checkpoint_interval == 0
        if evaluating or keeping:
            rng_state = torch.get_rng_state()
            states = [rng_state] * world
            if ddp:
                dist.all_gather_object(states, rng_state)
        better = False
        if evaluating:
            losses = estimate_loss()
            torch.set_rng_state(rng_state)
            if master:
                train_loss, val_loss = losses["train"], losses["val"]
                print(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            better = losses["val"] < best_val_loss
            best_val_loss = min(losses["val"], best_val_loss)
        saving = keeping or (evaluating and (better or args.always_save_checkpoint))
        if master and iter_num > 0 and saving:
            checkpoint = {
                "model": raw_model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "model_args": asdict(config),
                "iter_num": iter_num,
                "best_val_loss": best_val_loss,
                "history": history,
                "rng_states": states,
            }
            name = f"ckpt-{iter_num:04d}.pt" if keeping else "ckpt.pt"
            torch.save(checkpoint, args.out_dir / name)
        if iter_num == args.stop_at:
            break
        for micro_step in range(args.gradient_accumulation_steps):
            if ddp:
                model.require_backward_grad_sync = (
                    micro_step == args.gradient_accumulation_steps - 1
                )
            x, y = get_batch("train")
            with context:
                loss = model(x, y) / args.gradient_accumulation_steps
            scaler.scale(loss).backward()
        if args.grad_clip != 0.0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.item() * args.gradient_accumulation_steps)
        if iter_num % args.log_interval == 0 and master:
            print(f"iter {iter_num}: loss {history[-1]:.4f}")
        iter_num += 1
        if iter_num >= args.max_iters:
            break
    if master:
        (args.out_dir / "losses.json").write_text(json.dumps(history))
        (args.out_dir / "seconds.txt").write_text(f"{time.time() - begin:.1f}\n")
        torch.save(raw_model.state_dict(), args.out_dir / "final.pt")
    if ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
