"""Cost of one tracker update against the memory floor.

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

The floor is 20 bytes per parameter (read the parameter, read and write two averages) at the bandwidth that
torch.add reaches in the same run (12 bytes per element). Everything is timed in turn. On a quiet machine
the median and the fastest round agree; beside other programs only the fastest says something, because an
update is a hundred short parallel sections that each wait for the slowest core. The limits are on that one,
and what misses them is measured again, up to three times in all.

What is compared: the tracker with each kernel; `torch._foreach_lerp_` for each profile; the loop of `lerp_`,
one profile after the other, which is the arithmetic of the published class; the update as EMA classes
often write it, `average.copy_(parameter.lerp(average, beta))`; and the package ema-pytorch.
"""

from __future__ import annotations

import os
import platform
import statistics
import time

import pytest
import torch
from torch import nn

from posthoc_ema.torch import Tracker

ROUNDS = 25
ATTEMPTS = 3
SIGMA_RELS = (0.05, 0.10)
WEIGHT = 1e-3
TINY_LIMIT = 4.0
"""What 60 tiny tensors may cost, one tensor of their size = 1; docs/benchmarks/tracker-update.md says why."""


def parameters(shapes, dtype=torch.float32, device="cpu"):
    return nn.ParameterList(
        [nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
    )


def network():
    """Shapes of 600 tensors with 90 M parameters, in the proportions of a U-Net."""
    shapes = [(512, 512, 3, 3)] * 30 + [(256, 256, 3, 3)] * 20 + [(768, 768)] * 8
    return shapes + [(256, 256)] * 42 + [(512,)] * 200 + [(128,)] * 300


def tiny():
    """Shapes of 60 tensors with 0.7 M parameters."""
    return [(64, 64, 3, 3)] * 15 + [(128, 128)] * 8 + [(64,)] * 37


def count(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(actions, rounds):
    """Seconds of each action at each round, after three rounds that do not count."""
    for _ in range(3):
        for action in actions.values():
            action()
    times = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(seconds(action))
    return times


def fastest(times, base):
    """Ratio of the fastest rounds."""
    return {name: min(values) / min(base) for name, values in times.items()}


def table(title, times, base, unit=1e3, name_of_unit="ms"):
    """Print medians and fastest rounds beside their ratios to `base`."""
    print(f"\n{title}")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}",
        end=", ",
    )
    print(f"load {os.getloadavg()[0]:.1f}")
    print(f"{'':36}{'median ' + name_of_unit:>10}{'ratio':>8}{'fastest':>9}{'ratio':>8}")
    for name, values in times.items():
        ratio = statistics.median(t / b for t, b in zip(values, base, strict=True))
        median = statistics.median(values) * unit
        print(f"{name:36}{median:10.1f}{ratio:8.2f}", end="")
        print(f"{min(values) * unit:9.1f}{min(values) / min(base):8.2f}")


def measured(actions, base_of, limits, title, rounds=ROUNDS, **unit):
    """Ratios of the fastest rounds: of the first attempt within all limits, else the least of each."""
    best = {}
    for _ in range(ATTEMPTS):
        times = in_turn(actions, rounds)
        base = base_of(times)
        table(title, times, base, **unit)
        found = fastest(times, base)
        best = {name: min(ratio, best.get(name, ratio)) for name, ratio in found.items()}
        if all(best[name] <= limit for name, limit in limits.items()):
            break
    return best


def peers(model, tmp_path):
    """Other ways of tracking two averages of a model."""
    from ema_pytorch import PostHocEMA

    plain = [p.detach() for p in model.parameters()]

    def averages():
        return [[torch.zeros_like(p) for p in plain] for _ in SIGMA_RELS]

    listed, looped, copied = averages(), averages(), averages()

    def foreach():
        for tensors in listed:
            torch._foreach_lerp_(tensors, plain, WEIGHT)

    def loop():
        for tensors in looped:
            for average, parameter in zip(tensors, plain, strict=True):
                average.lerp_(parameter, WEIGHT)

    def copy():
        for tensors in copied:
            for average, parameter in zip(tensors, plain, strict=True):
                average.copy_(parameter.lerp(average, 1 - WEIGHT))

    other = PostHocEMA(
        model,
        sigma_rels=SIGMA_RELS,
        update_every=1,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=str(tmp_path / "ema-pytorch"),
    )
    return {
        "_foreach_lerp_ per profile": foreach,
        "loop of lerp_ per profile": loop,
        "copy_ of lerp per profile": copy,
        "ema-pytorch": other.update,
    }


@pytest.fixture
def tracked(tmp_path, caplog):
    """tracked(model, **options) -> a tracker of two profiles without snapshots."""
    trackers = []

    def make(model, **options):
        folder = tmp_path / str(len(trackers))
        options = {"every": None, "on_error": "raise", "sigma_rels": SIGMA_RELS} | options
        trackers.append(Tracker(model, folder, **options))
        return trackers[-1]

    yield make
    for tracker in trackers:
        tracker.close()
    assert "does not work here" not in caplog.text  # the compiled kernel is the compiled one


def triad(size):
    a, b, c = (torch.randn(size) for _ in range(3))
    return lambda: torch.add(a, b, out=c)


@pytest.mark.timeout(900)
def test_update_of_a_network_is_at_the_memory_limit(tracked, tmp_path):
    shapes = network()
    model, size = parameters(shapes), count(shapes)
    actions = {
        "torch.add (12 bytes/parameter)": triad(size),
        "tracker, eager": tracked(model).step,
        "tracker, compiled": tracked(model, kernel="compiled").step,
        **peers(model, tmp_path),
    }
    limits = {"tracker, eager": 1.2, "tracker, compiled": 0.95}
    title = (
        f"{size / 1e6:.1f} M float32 parameters in {len(shapes)} tensors, two profiles; floor = 1"
    )
    ratios = measured(
        actions,
        lambda times: [20 / 12 * t for t in next(iter(times.values()))],
        limits,
        title,
    )
    assert ratios["tracker, eager"] <= limits["tracker, eager"]
    assert ratios["tracker, compiled"] <= limits["tracker, compiled"]
    # ema-pytorch moves 24 bytes where we move 20: 1.2 is what memory leaves between the two.
    assert ratios["ema-pytorch"] >= 1.1 * min(ratios["tracker, eager"], ratios["tracker, compiled"])
    assert ratios["copy_ of lerp per profile"] >= 1.5 * ratios["tracker, eager"]


@pytest.mark.timeout(900)
def test_update_of_bfloat16_parameters_and_of_bfloat16_averages(tracked):
    shapes = network()
    size = count(shapes)
    model = parameters(shapes, torch.bfloat16)
    lists = [[torch.zeros(p.shape) for p in model.parameters()] for _ in SIGMA_RELS]
    widened = [torch.empty(p.shape) for p in model.parameters()]

    @torch.no_grad()
    def foreach():
        torch._foreach_copy_(widened, list(model.parameters()))
        for averages in lists:
            torch._foreach_lerp_(averages, widened, WEIGHT)

    actions = {
        "torch.add (12 bytes/parameter)": triad(size),
        "tracker, eager": tracked(model).step,
        "tracker, compiled": tracked(model, kernel="compiled").step,
        "_foreach_copy_ and _foreach_lerp_": foreach,
        "bfloat16 averages": tracked(model, average_dtype="bfloat16").step,
    }
    title = f"{size / 1e6:.1f} M bfloat16 parameters, two profiles; floor of 18 bytes = 1"
    limits = {"tracker, eager": 1.5, "tracker, compiled": 1.1}
    ratios = measured(
        actions,
        lambda times: [18 / 12 * t for t in next(iter(times.values()))],
        limits,
        title,
        rounds=9,
    )
    for name, limit in limits.items():
        assert ratios[name] <= limit
    assert ratios["_foreach_copy_ and _foreach_lerp_"] > ratios["tracker, eager"]


@pytest.mark.timeout(900)
def test_sixty_tiny_tensors_against_one_tensor_of_their_size(tracked, tmp_path):
    shapes = tiny()
    model, single = parameters(shapes), parameters([(count(shapes),)])
    actions = {
        "one tensor": tracked(single).step,
        "60 tensors": tracked(model).step,
        "60 tensors, compiled": tracked(model, kernel="compiled").step,
        **peers(model, tmp_path),
    }
    # Actions of microseconds are timed one after the other: in turn they would meet each other's cache.
    limits = {"60 tensors": TINY_LIMIT}
    best = {}
    for _ in range(2 * ATTEMPTS):
        times = {}
        for name, action in actions.items():
            times |= in_turn({name: action}, 200)
        title = f"{count(shapes) / 1e6:.2f} M float32 parameters, two profiles; one tensor = 1"
        table(title, times, times["one tensor"], 1e6, "us")
        found = fastest(times, times["one tensor"])
        best = {name: min(ratio, best.get(name, ratio)) for name, ratio in found.items()}
        if best["60 tensors"] <= limits["60 tensors"]:
            break
    assert best["60 tensors"] <= limits["60 tensors"]
    assert best["ema-pytorch"] >= 1.5 * best["60 tensors"]


@pytest.mark.timeout(900)
def test_offloaded_update_leaves_the_training_after_the_copy(tracked):
    """On a machine without a GPU staging memory is plain memory; the arithmetic runs in the thread."""
    shapes = network()
    model, size = parameters(shapes), count(shapes)
    beside, offloaded = tracked(model), tracked(model, device="cpu")
    times = {
        name: [] for name in ("beside", "offloaded, until step returns", "offloaded, until done")
    }
    for round_number in range(ROUNDS + 3):
        row = [seconds(beside.step), seconds(offloaded.step)]
        row.append(row[-1] + seconds(offloaded.flush))
        if round_number >= 3:
            for values, value in zip(times.values(), row, strict=True):
                values.append(value)
    title = (
        f"{size / 1e6:.1f} M float32 parameters, averages on the host; beside the parameters = 1"
    )
    table(title, times, times["beside"])
    assert min(times["offloaded, until step returns"]) < min(times["offloaded, until done"])


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
def test_update_on_a_gpu_is_at_the_limit_of_a_large_copy(tracked):
    shapes = network()
    size = count(shapes)
    source, target = (torch.randn(size, device="cuda") for _ in range(2))

    def timed(action):
        def run():
            action()
            torch.cuda.synchronize()

        return run

    actions = {"copy (8 bytes/parameter)": timed(lambda: target.copy_(source))}
    for dtype in (torch.float32, torch.bfloat16):
        model = parameters(shapes, dtype, "cuda")
        for kernel in ("triton", "eager"):
            actions[f"{kernel}, {dtype}"] = timed(tracked(model, kernel=kernel).step)
    limits = {"triton, torch.float32": 1.15}
    title = f"{size / 1e6:.1f} M parameters on {torch.cuda.get_device_name()}; floor = 1"
    ratios = measured(
        actions,
        lambda times: [20 / 8 * t for t in next(iter(times.values()))],
        limits,
        title,
        unit=1e6,
        name_of_unit="us",
    )
    assert ratios["triton, torch.float32"] <= limits["triton, torch.float32"]


@gpu
@pytest.mark.parametrize("kernel", ["triton", "eager"])
def test_update_on_a_gpu_never_waits_for_it(tracked, kernel):
    from torch.profiler import ProfilerActivity, profile

    tracker = tracked(parameters(tiny(), device="cuda"), kernel=kernel)
    for _ in range(3):
        tracker.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            tracker.step()
    names = {event.name for event in trace.events()}
    waits = {
        name for name in names if "Synchronize" in name or "Memcpy" in name or name == "aten::item"
    }
    waits -= {"cudaDeviceSynchronize"}  # the profiler's own, at its end
    assert not waits
