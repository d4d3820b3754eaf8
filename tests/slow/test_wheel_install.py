"""The wheel in a fresh environment: its own files, not those of the editable install."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np

from posthoc_ema import (
    NewAverage,
    PowerProfile,
    SnapshotStore,
    TensorEntry,
    TensorTable,
    __version__,
)

ROOT = Path(__file__).parents[2]


def test_the_installed_wheel_runs_on_its_own(tmp_path):
    """The dependencies are borrowed from this environment; the packages must come from the wheel."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        "dist",
        str(ROOT),
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    python, phema = tmp_path / "env/bin/python", tmp_path / "env/bin/phema"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    borrow(Path(sysconfig.get_paths()["purelib"]), site)

    def run(*words):
        return subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )

    names = "phema, posthoc_ema, reference_trainer"
    code = f"import {names}\nfor module in ({names}): print(module.__file__)"
    where = run(python, "-c", code)
    assert [Path(path).is_relative_to(site) for path in where.stdout.split()] == [True] * 3, where
    assert run(phema, "--version").stdout == f"phema {__version__}\n"
    table = TensorTable({"w": TensorEntry("w", (3,), "float32", True)}, {})
    with SnapshotStore.create(tmp_path / "snapshots", clock="steps", table=table) as store:
        store.add(5, [NewAverage(PowerProfile(5, 0.1), "float32", lambda name: np.ones(3, "f4"))])
    listed = run(phema, "ls", "snapshots")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "time in steps" in listed.stdout
    made = run(phema, "synth", "snapshots", "--sigma-rel", "0.1")
    assert made.returncode == 0, made
    evaluated = run(
        python, "-c", "from reference_trainer.metrics import digit_reference_statistics as d; d()"
    )
    assert evaluated.returncode == 0, evaluated.stderr


def borrow(theirs, ours):
    """Make everything of one site-packages visible in another, its editable installs aside."""
    for path in theirs.iterdir():
        if (
            path.suffix != ".pth"
            and "posthoc_ema" not in path.name
            and not (ours / path.name).exists()
        ):
            (ours / path.name).symlink_to(path)
