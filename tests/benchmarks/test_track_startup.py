"""What `phema track` costs a command that does not train: at most 50 ms."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 30
LIMIT = 0.050


def seconds(command):
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def test_a_command_that_does_not_train_starts_within_50_ms_of_its_own_time():
    """Pairs of runs side by side, by turns: the fastest and the median of both ways."""
    plain = [sys.executable, "-c", "pass"]
    tracked = [str(Path(sys.executable).with_name("phema")), "track", "--", *plain]
    seconds(tracked)  # the first one compiles modules
    pairs = [(seconds(plain), seconds(tracked)) for _ in range(ROUNDS)]
    fastest = min(t for _, t in pairs) - min(p for p, _ in pairs)
    median = statistics.median(t - p for p, t in pairs)
    print(f"\nphema track: {1e3 * fastest:.1f} ms (fastest), {1e3 * median:.1f} ms (median)")
    assert fastest < LIMIT
