"""Error of post-hoc averages at equal bytes, on a real training run kept whole (issue B, must-show 1).

    python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks/test_trajectory.py

Gain = error of the published procedure / ours, per target. "Stored" targets are themselves among the
profiles that a method stores, which makes them easy; the last column leaves them out.
"""

from __future__ import annotations

import numpy as np
import pytest

from .trajectory_methods import (
    TARGETS,
    Method,
    Run,
    deltas,
    plain,
    predicted,
    published,
)
from .trajectory_run import train

SCHEDULES = ("constant", "isqrt")
F16, I8 = "delta-float16", "delta-int8"

# name -> (profiles, method, {n: smallest geometric mean of the gains}, smallest single gain)
METHODS: dict[str, tuple[tuple[float, ...], Method, dict[int, float], float]] = {}


def _add(name: str, profiles, method: Method, least: dict[int, float], worst: float = 0.0) -> None:
    METHODS[f"{name} {profiles}"] = (profiles, method, least, worst)


_add("float16", (0.05, 0.10), plain((0.05, 0.10)), {})
for _two in ((0.05, 0.10), (0.05, 0.20), (0.04, 0.15)):
    _add("delta-float16", _two, deltas(_two), {64: 30, 16: 3.5})
for _three in ((0.02, 0.06, 0.20), (0.02, 0.05, 0.15)):
    _add("delta-float16", _three, deltas(_three), {64: 50, 16: 10})
for _two in ((0.05, 0.10), (0.04, 0.15)):
    _add("half: delta-float16", _two, deltas(_two, F16, 0.5), {64: 2}, 1.0)
    _add("half: delta-int8", _two, deltas(_two, I8, 0.5), {64: 2}, 1.0)
_add(
    "predicted, float16 + int8", (0.04, 0.15), predicted((0.04, 0.15), (F16, I8)), {64: 30, 16: 3.5}
)
_add(
    "predicted, float16 + 2 int8",
    (0.02, 0.05, 0.15),
    predicted((0.02, 0.05, 0.15), (F16, I8, I8)),
    {64: 50, 16: 10},
)
_add(
    "half: predicted, float16 + int8",
    (0.04, 0.15),
    predicted((0.04, 0.15), (F16, I8), 0.5),
    {64: 2},
    1.0,
)


@pytest.fixture(scope="module")
def runs():
    return {schedule: Run(train(schedule)) for schedule in SCHEDULES}


def geometric_mean(values) -> float:
    return float(np.exp(np.mean(np.log(values))))


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trajectory_gains_at_equal_bytes(runs, schedule, n):
    run = runs[schedule]
    base = published(run, n)
    print(
        f"\n{schedule} learning rate, n = {n}, {run.trajectory.shape[1]} weights, {run.end} steps"
    )
    print(f"{'':44}{'bytes':>6} {'gain':>6} {'worst':>6}  " + "".join(f"{t:>8}" for t in TARGETS))
    print(f"{'float32 tracker, error':60}" + "".join(f"{e:8.0e}" for e in run.floor))
    print(f"{'published, error':60}" + "".join(f"{e:8.0e}" for e in base.errors))
    failures = []
    for name, (profiles, method, least, worst) in METHODS.items():
        outcome = method(run, n)
        gains = base.errors / outcome.errors
        share = outcome.bytes_per_weight / base.bytes_per_weight
        mean, held_out = geometric_mean(gains), [t not in profiles for t in TARGETS]
        above = outcome.errors > 2 * run.floor
        ratio = outcome.predicted[above] / outcome.errors[above]
        print(
            f"{name:44}{share:6.3f} {mean:6.1f} {gains.min():6.2f}  "
            + "".join(f"{g:8.1f}" for g in gains)
            + f"  not stored: {geometric_mean(gains[held_out]):.1f}"
            + f"  predicted/true {ratio.min():.2f}..{ratio.max():.2f} ({above.sum()})"
        )
        assert share <= (0.5 if name.startswith("half") else 1.0) + 1e-9, name
        if mean < least.get(n, 0) or (n in least and gains.min() < worst):
            failures.append(f"{name}: gain {mean:.2f}, worst {gains.min():.2f}")
    assert not failures, failures
