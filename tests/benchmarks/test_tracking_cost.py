"""Memory, disk and time of tracking, by options: the figures of docs/explanation/cost.md.

    make bench        # or: python -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

Each option runs in a process of its own. Limits are what the page's formulas say, and a little for what the
process needs besides (35 MB are one byte per parameter here).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("tracking_cost_run.py")
SLACK = 1.2
OPTIONS = {
    # options: (held, peak, disk of three times with raw weights of the last), bytes per parameter
    "default": ({}, 8, 20, 16.1),
    "background=False": ({"background": False}, 8, 8, 16.1),
    'raw="none"': ({"raw": "none"}, 8, 16, 14.1),
    'average_dtype="bfloat16"': ({"average_dtype": "bfloat16"}, 4, 20, 16.1),
    'device="cpu"': ({"device": "cpu"}, 16, 28, 16.1),
    "three lengths": ({"sigma_rels": (0.02, 0.06, 0.2)}, 12, 28, 22.2),
    'dtype="delta-float16"': ({"dtype": "delta-float16"}, 8, 20, 18.0),
    'dtype="delta-int8"': ({"dtype": "delta-int8"}, 8, 20, 14.2),
    'dtype="float16"': ({"dtype": "float16"}, 8, 20, 14.0),
    'dtype="float32"': ({"dtype": "float32"}, 8, 20, 28.0),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", OPTIONS)
def test_tracking_costs_what_the_page_says(name, tmp_path):
    options, held, peak, disk = OPTIONS[name]
    done = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path / "snapshots"), json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    figures = json.loads(done.stdout)
    row = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
    print(f"\n{name}: {row}")
    assert held <= figures["held"] <= held + SLACK
    assert figures["peak"] <= peak + SLACK
    assert figures["disk"] == pytest.approx(disk, rel=0.02)
