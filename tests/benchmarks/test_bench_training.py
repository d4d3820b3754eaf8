"""Training steps of the trainer against those of a plain eager implementation of the same network.

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s \
                      #         tests/benchmarks/test_bench_training.py

Float32 and bfloat16 are both measured against the plain network in float32 (its own bfloat16 is a row of
the table): a ratio says what the trainer's ways of computing gain together. Everything is timed in turn;
what is asserted is the better of the median ratio and that of the fastest rounds, since beside other
programs only the latter says something. Compiling takes a minute or two before.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from .plain_network import PlainNetwork
from .trainer_timing import (
    SMALL,
    WIDE,
    in_turn,
    new_network,
    plain_step,
    report,
    trainer_step,
    training,
)

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
BATCH, ROUNDS, ATTEMPTS = 64, 15, 3
LIMITS = {"compiled, float32": 1.2, "compiled, bfloat16": 1.9}


def steps(network):
    """Name to action, the plain one first."""
    actions = {}
    for dtype in ("float32", "bfloat16"):
        config = training(dataclasses.replace(network, dtype=dtype), batch=BATCH)
        plain = PlainNetwork(config.network).load_from(new_network(config.network)).train()
        actions[f"plain, {dtype}"] = plain_step(plain, config)
        for compiled in (False, True):
            config = training(config.network, batch=BATCH, compiled=compiled)
            name = f"{'compiled' if compiled else 'eager'}, {dtype}"
            actions[name] = trainer_step(new_network(config.network), config)
    return actions


@pytest.mark.parametrize("network", [SMALL, WIDE], ids=["0.73M", "0.76M-wide"])
def test_training_is_faster_than_the_plain_network(network):
    torch.set_num_threads(2)
    torch._dynamo.reset()
    actions, best = steps(network), dict.fromkeys(LIMITS, 0.0)
    for action in actions.values():  # compiles
        action()
    title = f"training step, batch {BATCH}, {network.model_channels} channels; plain, float32 = 1"
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
