"""Tracking under torch.set_default_device: tables and scalars of the kernels stay in host memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, torch
from posthoc_ema.torch import Tracker
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
kernel, device, folder = sys.argv[1], *sys.argv[2:]
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(400, 400))
options = {"sigma_rels": (0.1,), "every": 2, "kernel": kernel, "on_error": "raise"}
torch.set_default_device(device)
with Tracker(model, folder, **options) as tracker:
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        tracker.step()
    tracker.flush()
    assert tracker.num_snapshots == 3
    for average in tracker.averages(0.1).values():
        assert average.device.type == "cpu" and average.unique().numel() == 1
        print(float(average.flatten()[0]))
"""


@pytest.mark.parametrize("kernel", ["eager", "compiled", "triton"])
def test_default_device_changes_no_average(kernel, tmp_path):
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is installed on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = []
    for device in ("cpu", "meta"):
        command = [sys.executable, "-c", PROGRAM, kernel, device, str(tmp_path / device)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0].split()) == 4
