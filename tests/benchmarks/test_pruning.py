"""What `phema prune` keeps against even thinning, in true errors (must-show 3).

    python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks/test_pruning.py

64 even times x 2 averages of the runs of test_trajectory.py, pruned to 16 by the real command.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from posthoc_ema import PowerProfile, SnapshotStore, synthesize

from .trajectory_methods import DEFAULT_CODEC, DEFAULT_SIGMA_RELS, Run, even_times, flat, relative
from .trajectory_run import averages, train

LENGTHS = np.geomspace(0.03, 0.20, 12).tolist()
STORES = {
    "published lengths, float32": ((0.05, 0.10), "float32"),
    "published lengths, default codec": ((0.05, 0.10), DEFAULT_CODEC),
    "defaults": (DEFAULT_SIGMA_RELS, DEFAULT_CODEC),
}


def errors_of(folder, truth, records=None):
    """True errors over LENGTHS of a store, or of some averages of it."""
    copy = folder.with_name(folder.name + "-some")
    if records is not None:
        shutil.copytree(folder, copy)
        names = {(r.time, r.sigma_rel) for r in records}
        with SnapshotStore.edit(copy) as store:
            store.remove([r for r in store.averages if (r.time, r.sigma_rel) not in names])
        folder = copy
    found = relative(np.array([flat(d) for d in synthesize(folder, LENGTHS)]), truth)
    shutil.rmtree(copy, ignore_errors=True)
    return found


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:sigma_rel .*the error is above")
@pytest.mark.parametrize("rate_seed", [(1e-3, 0), (3e-3, 1)], ids=["1e-3", "3e-3"])
@pytest.mark.parametrize("schedule", ["constant", "isqrt"])
def test_pruned_store_is_better_than_an_even_one(schedule, rate_seed, tmp_path):
    torch.set_num_threads(1)
    run = Run(train(schedule, *rate_seed))
    truth = averages(run.trajectory, [PowerProfile(run.end, s) for s in LENGTHS])
    print(f"\n{schedule} learning rate {rate_seed[0]:g}; worst true error over [0.03, 0.20]")
    for name, (sigma_rels, codec) in STORES.items():
        folder = tmp_path / name.replace(" ", "-")
        run.track(folder, even_times(run, 64), sigma_rels, codec)
        store = SnapshotStore.open(folder)
        stored = list(store.averages)
        choices = {
            "8 even times x 2": [r for r in stored if r.time in set(even_times(run, 8))],
            "every eighth file": stored[7::8],
            "the last 16": stored[-16:],
        }
        worst = {k: errors_of(folder, truth, records).max() for k, records in choices.items()}
        worst["all 128"] = errors_of(folder, truth).max()
        command = ["prune", str(folder), "--keep", "16", "--range", "0.03,0.20", "--apply"]
        subprocess.run([sys.executable, "-m", "phema", *command], check=True, capture_output=True)
        assert len(SnapshotStore.open(folder).averages) == 16
        pruned = errors_of(folder, truth).max()
        text = ", ".join(f"{k} {v:.2e} ({v / pruned:.1f} x)" for k, v in worst.items())
        print(f"{name:34} pruned {pruned:.2e}; {text}")
        assert worst["every eighth file"] > 5 * pruned
        assert worst["8 even times x 2"] > (5 if name == "defaults" else 3) * pruned
