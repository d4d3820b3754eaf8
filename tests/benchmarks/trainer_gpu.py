"""Training and sampling on a GPU: against the plain network, against the card, and where the time goes.

    python tests/benchmarks/trainer_gpu.py                       # preset S, 64x64x4, bfloat16
    python tests/benchmarks/trainer_gpu.py --batch 256 --out figures.json
    python tests/benchmarks/trainer_gpu.py --tiny --device cpu --eager --rounds 2    # does it run at all

Three figures and a table:

- training: images per second of the trainer (compiled) and of the plain eager network, both with
  activations in the same dtype and with the same fused Adam;
- sampling: evaluations of images per second in Heun steps, of the trainer's folded and compiled copy and
  of the plain network, in the same dtype;
- the share of the card: arithmetic of convolutions, linear layers and attention in a training step
  (counted by torch's FlopCounterMode, 2 for a multiply-add, forwards and backwards), per second, over the
  rate of a large square matrix product in the same dtype, measured here;
- where the time of a training step goes, by kind of kernel, and how long no kernel ran.

Exit code 1 if a limit is missed (`--limits`): 2.5 times, 3 times and 40 %.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from plain_network import PlainNetwork
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from trainer_timing import (
    SMALL,
    in_turn,
    new_network,
    plain_step,
    report,
    sampling,
    trainer_sampling,
    trainer_step,
    training,
)

from reference_trainer.config import DataConfig, NetworkConfig
from reference_trainer.losses import uncertainty_loss
from reference_trainer.precond import Precond
from reference_trainer.presets import preset

LIMITS = {"training": 2.5, "sampling": 3.0, "share": 0.4}
KINDS = {
    "communication": ("nccl", "gloo"),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "compiled pointwise and reductions": ("triton_", "cpp_fused"),
    "convolutions and matrix products": (
        *("conv", "gemm", "cutlass", "cudnn", "nvjet", "xmma", "wgrad", "dgrad", "fprop"),
        *("::mm", "::bmm", "addmm", "mkldnn"),
    ),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy", "catarray", "::cat", "fill"),
    "eager pointwise and reductions": ("elementwise", "reduce", "at::native", "aten::"),
}
"""Kind of kernel to parts of names, in lower case; the first kind that fits counts."""


def kind_of(name: str) -> str:
    """Kind of a kernel (or, on a processor, of an operation) by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in low for p in parts)), "other")


def synchronizer(device: torch.device):
    """What waits for the device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    """Operations per second of a square matrix product: the best of `rounds`, after warming up."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, repeats = torch.empty_like(a), 10

    def products():
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    times = in_turn({"mm": products}, rounds, warm=3, synchronize=synchronizer(device))["mm"]
    return 2 * size**3 * repeats / min(times)


def training_operations(network: NetworkConfig, batch: int) -> int:
    """Operations of the products in one training step, forwards and backwards, from shapes alone."""
    with torch.device("meta"):
        model = Precond(network, DataConfig()).train()
        shape = (batch, network.img_channels, network.img_resolution, network.img_resolution)
        images, one_hot = torch.empty(shape), torch.empty(batch, network.label_dim)
        given = images, one_hot, torch.ones(batch), torch.empty(shape)
        with FlopCounterMode(display=False) as counter:
            uncertainty_loss(model, *given)[0].sum().backward()
    return counter.get_total_flops()


def time_by_kind(step, device: torch.device, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of a step by kind of kernel, and the seconds of the step as a whole."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize = synchronizer(device)
    synchronize()
    with profile(activities=activities) as trace:
        start = time.perf_counter()
        for _ in range(rounds):
            step()
        synchronize()
        whole = (time.perf_counter() - start) / rounds
    seconds: collections.Counter[str] = collections.Counter()
    for event in trace.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            seconds[kind_of(event.key)] += event.self_device_time_total / 1e6 / rounds
        elif not on_gpu:
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / rounds
    return dict(seconds), whole


def measure_training(network, args, device):
    """Times in turn, the share of the card and the profile of the trainer's step."""
    config = training(network, batch=args.batch, compiled=not args.eager)
    plain = PlainNetwork(network).load_from(new_network(network)).to(device).train()
    step = trainer_step(new_network(network, str(device)), config)
    actions = {"plain": plain_step(plain, config), "trainer": step}
    times = in_turn(actions, args.rounds, warm=3, synchronize=synchronizer(device))
    ratio = report(f"training step, batch {args.batch}, {network.dtype}", times, "plain")["trainer"]
    kinds, whole = time_by_kind(step, device, args.rounds)
    return ratio, statistics.median(times["trainer"]), kinds, whole


def measure_sampling(network, args, device):
    """Ratio of the times, and evaluations of images per second."""
    ours, how = new_network(network, str(device)), {"batch": args.batch, "num_steps": args.steps}
    plain = PlainNetwork(network).to(device).load_from(ours).eval()
    actions = {
        "plain": sampling(plain, network, **how),
        "trainer": trainer_sampling(
            ours, network, precision=network.dtype, compiled=not args.eager, **how
        ),
    }
    times = in_turn(actions, args.rounds, warm=2, synchronize=synchronizer(device))
    title = f"{args.steps} Heun steps, batch {args.batch}, {network.dtype}"
    ratio = report(title, times, "plain")["trainer"]
    return ratio, args.batch * (2 * args.steps - 1) / statistics.median(times["trainer"])


def print_profile(kinds: dict[str, float], whole: float, on_gpu: bool) -> None:
    """The table of where the time goes; what no kernel filled is a row on a GPU."""
    print(f"\nwhere {whole * 1e3:.1f} ms of a training step go (with the profiler on)")
    rows = dict(sorted(kinds.items(), key=lambda row: -row[1]))
    if on_gpu:
        rows["no kernel running"] = max(0.0, whole - sum(kinds.values()))
    for kind, seconds in rows.items():
        print(f"{kind:36}{seconds * 1e3:10.1f} ms{seconds / whole:8.1%}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="edm2-img512-s")
    parser.add_argument(
        "--tiny", action="store_true", help="the network of the processor's figures"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="Heun steps of a sampling")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument(
        "--autotune",
        action="store_true",
        help="let cuDNN choose by timing, and algorithms that differ from run to run: not what the "
        "trainer does, whose runs repeat themselves bit for bit",
    )
    parser.add_argument("--limits", action="store_true", help="exit code 1 if a limit is missed")
    parser.add_argument("--out", help="also write the figures as JSON")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    network = SMALL if args.tiny else preset(args.preset).network
    network = dataclasses.replace(network, dtype=args.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    rate = matrix_rate(device, getattr(torch, args.dtype), args.matrix, 5)
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=args.autotune, deterministic=not args.autotune, allow_tf32=False
    ):
        ratio, seconds, kinds, whole = measure_training(network, args, device)
        sampling_ratio, evaluations = measure_sampling(network, args, device)
    share = training_operations(network, args.batch) / seconds / rate
    figures = {
        "device": name,
        "torch": torch.__version__,
        "batch": args.batch,
        "dtype": args.dtype,
        "matrix_rate": rate,
        "training": ratio,
        "training_images_per_second": args.batch / seconds,
        "share": share,
        "sampling": sampling_ratio,
        "sampling_evaluations_per_second": evaluations,
        "seconds_by_kind": kinds,
        "seconds_profiled": whole,
    }
    print_profile(kinds, whole, device.type == "cuda")
    print(f"\n{name}: {rate / 1e12:.2f} TFLOP/s in a matrix product of side {args.matrix}")
    for key, limit in LIMITS.items():
        print(f"{key:12}{figures[key]:8.2f}   (limit {limit} at preset S on a GPU)")
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    missed = [key for key, limit in LIMITS.items() if figures[key] < limit]
    return 1 if args.limits and missed else 0


if __name__ == "__main__":
    sys.exit(main())
