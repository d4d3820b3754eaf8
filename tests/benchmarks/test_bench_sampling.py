"""Sampling with the trainer's evaluation copies against sampling with the plain network.

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s \
                      #         tests/benchmarks/test_bench_sampling.py

Heun steps without gradients. The plain network computes in float32 and normalises its weights in every
evaluation; the trainer's copy has them folded, in bfloat16 or float32, eager or compiled. What is asserted
is chosen as in test_bench_training.py.
"""

from __future__ import annotations

import pytest
import torch

from .plain_network import PlainNetwork
from .trainer_timing import SMALL, WIDE, in_turn, new_network, report, sampling, trainer_sampling

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
BATCH, STEPS, ROUNDS, ATTEMPTS = 64, 4, 15, 3
LIMITS = {"folded, bfloat16": 1.6, "compiled, bfloat16": 1.6}


def samplings(network):
    """Name to action, the plain one first."""
    ours, how = new_network(network), {"batch": BATCH, "num_steps": STEPS}
    plain = PlainNetwork(network).load_from(ours).eval()
    actions = {"plain, float32": sampling(plain, network, **how)}
    for precision in ("float32", "bfloat16"):
        for compiled in (False, True):
            name = f"{'compiled' if compiled else 'folded'}, {precision}"
            actions[name] = trainer_sampling(
                ours, network, precision=precision, compiled=compiled, **how
            )
    return actions


@pytest.mark.parametrize("network", [SMALL, WIDE], ids=["0.73M", "0.76M-wide"])
def test_sampling_is_faster_than_the_plain_network(network):
    torch.set_num_threads(2)
    torch._dynamo.reset()
    actions, best = samplings(network), dict.fromkeys(LIMITS, 0.0)
    want = actions["plain, float32"]()
    for name, action in actions.items():
        error = float((action() - want).norm() / want.norm())
        assert error < (1e-4 if "float32" in name else 0.05), name
    title = f"{STEPS} Heun steps, batch {BATCH}, {network.model_channels} channels; plain = 1"
    for _ in range(ATTEMPTS):
        times = in_turn(actions, ROUNDS)
        medians = report(title, times, "plain, float32")
        for name in LIMITS:
            fastest = min(times["plain, float32"]) / min(times[name])
            best[name] = max(best[name], medians[name], fastest)
        if all(best[name] >= limit for name, limit in LIMITS.items()):
            break
    for name, limit in LIMITS.items():
        assert best[name] >= limit, name
