"""One tracker in a process of its own: how much memory it takes. Prints one line of JSON.

    python tests/benchmarks/tracking_cost_run.py FOLDER '{"background": false}'

Figures of memory and disk are bytes per parameter (2**25 float32 parameters), memory above what the process
had before the tracker: held between snapshots, and at the highest while one is stored. Times are seconds,
the shortest of three snapshots: until `step` returns, and until everything is on disk.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from posthoc_ema.torch import Tracker

COUNT = 1 << 25
TENSORS = 64


def status(key):
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def move(model):
    """In place and without temporary tensors, as a training step that leaves nothing behind."""
    for parameter in model.parameters():
        parameter.mul_(0.999).add_(0.01)


def main(folder, options):
    torch.manual_seed(0)
    tensors = [torch.randn(COUNT // TENSORS) for _ in range(TENSORS)]
    model = torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors])
    torch.optim.SGD(model.parameters())  # imports what every training has imported
    move(model)
    gc.collect()
    before = status("VmRSS")
    tracker = Tracker(model, folder, every=4, on_error="raise", **options)
    held, peaks, stops, writes = 0, [], [], []
    for step in range(1, 13):  # snapshots: a key frame, and two differences
        move(model)
        if step % 4:
            tracker.step()
            tracker.flush()
            held = status("VmRSS") - before if step == 3 else held
            continue
        reset_peak()
        start = time.perf_counter()
        tracker.step()
        stops.append(time.perf_counter() - start)
        tracker.flush()
        writes.append(time.perf_counter() - start)
        peaks.append(status("VmHWM") - before)
    disk_while_open = size_of(folder)
    tracker.close()
    figures = {
        "held": held / COUNT,
        "peak": max(peaks) / COUNT,
        "disk, open": disk_while_open / COUNT,
        "disk": size_of(folder) / COUNT,
        "step stops for": min(stops),
        "written after": min(writes),
    }
    print(json.dumps(figures))


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
