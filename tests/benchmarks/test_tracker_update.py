"""Cost of one tracker update against the memory floor (must-show 6).

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

The floor is 20 bytes per parameter (read the parameter, read and write two averages) at the bandwidth that
torch.add reaches in the same run (12 bytes per element). Everything is timed in turn. Rounds in which
torch.add itself was slowed by other programs are left out: an update is 600 short parallel sections, each
of which waits for the slowest core, and measures their interruptions. Figures are medians of what is left.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from posthoc_ema.torch import Tracker

LIMIT = 1.35
REPEATS = 25
QUIET = 1.15
"""A round counts if its torch.add took at most this times the fastest one."""


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
    limit = QUIET * min(times["triad"])
    quiet = [i for i, t in enumerate(times["triad"]) if t <= limit]
    times = {name: [values[i] for i in quiet] for name, values in times.items()}
    floors = [20 / 12 * t for t in times["triad"]]
    bandwidth = 12 * count / statistics.median(times["triad"]) / 1e9
    floor = statistics.median(floors)
    print(f"\n{count / 1e6:.1f} M float32 parameters in {len(plain)} tensors, two profiles,")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, triad {bandwidth:.1f} GB/s"
    )
    print(f"{'':30}{'median ms':>10}{'ratio':>8}")
    print(f"{'floor (20 bytes/parameter)':30}{floor * 1e3:10.1f}{1:8.2f}")
    ratios = {}
    for name in list(actions)[1:]:
        pairs = zip(times[name], floors, strict=True)
        ratios[name] = statistics.median(t / f for t, f in pairs)
        print(f"{name:30}{statistics.median(times[name]) * 1e3:10.1f}{ratios[name]:8.2f}")
    tracker.close()
    assert ratios["tracker.step()"] <= LIMIT
