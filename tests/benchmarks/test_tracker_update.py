"""Cost of one tracker update against the memory floor (must-show 6).

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

The floor is 20 bytes per parameter (read the parameter, read and write two averages) at the bandwidth that
torch.add reaches in the same run (12 bytes per element). Everything is timed in turn. On a quiet machine
the median and the fastest round agree; beside other programs only the fastest says something, because an
update is a hundred short parallel sections that each wait for the slowest core. The limit is on that one.
"""

from __future__ import annotations

import os
import statistics
import time

import torch
from torch import nn

from posthoc_ema.torch import Tracker

LIMIT = 1.35
REPEATS = 25


def network():
    """600 tensors with 90 M parameters, in the proportions of a U-Net."""
    shapes = [(512, 512, 3, 3)] * 30 + [(256, 256, 3, 3)] * 20 + [(768, 768)] * 8
    shapes += [(256, 256)] * 42 + [(512,)] * 200 + [(128,)] * 300
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_tracker_update_costs_at_most_a_third_more_than_the_memory_traffic(tmp_path):
    model = network()
    count = sum(p.numel() for p in model.parameters())
    tracker = Tracker(model, tmp_path, every=None, on_error="raise")
    a, b, c = (torch.randn(count) for _ in range(3))
    lists = [[torch.zeros_like(p) for p in model.parameters()] for _ in range(2)]
    plain = [p.detach() for p in model.parameters()]

    def foreach():
        for averages in lists:
            torch._foreach_lerp_(averages, plain, 1e-3)

    actions = {
        "triad": lambda: torch.add(a, b, out=c),
        "tracker.step()": tracker.step,
        "_foreach_lerp_ per profile": foreach,
    }
    for action in actions.values():
        action()
        action()
    times = {name: [] for name in actions}
    for _ in range(REPEATS):
        for name, action in actions.items():
            times[name].append(seconds(action))
    floors = [20 / 12 * t for t in times["triad"]]
    bandwidth = 12 * count / statistics.median(times["triad"]) / 1e9
    print(f"\n{count / 1e6:.1f} M float32 parameters in {len(plain)} tensors, two profiles,")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", end=", ")
    print(f"triad {bandwidth:.1f} GB/s, load {os.getloadavg()[0]:.1f}")
    print(f"{'':30}{'median ms':>10}{'ratio':>8}{'fastest':>9}{'ratio':>8}")
    floor, best = statistics.median(floors), min(floors)
    name = "floor (20 bytes/parameter)"
    print(f"{name:30}{floor * 1e3:10.1f}{1:8.2f}{best * 1e3:9.1f}{1:8.2f}")
    ratios = {}
    for name in list(actions)[1:]:
        median = statistics.median(t / f for t, f in zip(times[name], floors, strict=True))
        milliseconds = statistics.median(times[name]) * 1e3
        ratios[name] = min(times[name]) / best
        print(f"{name:30}{milliseconds:10.1f}{median:8.2f}", end="")
        print(f"{min(times[name]) * 1e3:9.1f}{ratios[name]:8.2f}")
    tracker.close()
    assert ratios["tracker.step()"] <= LIMIT
