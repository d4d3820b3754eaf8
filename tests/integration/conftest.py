"""The command line as a user has it: called in this process, or as a real one; and real stores."""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from posthoc_ema.torch import track

TINY = (
    *("--preset", "digits-xs", "--set", "network.model_channels=8", "--set", "batch_size=16"),
    *("--set", "total_images=320", "--set", "track.snapshot_every=32"),
    *("--set", "checkpoint_every=96", "--set", "status_every=64"),
)
"""A training run of two seconds: 20 steps, 10 snapshots, 3 checkpoints before the last one."""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    def refused(self, *fragments):
        """Exit code 1, nothing on stdout, one line on stderr that holds all fragments."""
        assert (self.code, self.out) == (1, ""), self
        assert self.err.startswith("phema: "), self
        assert self.err.count("\n") == 1, self
        assert "Traceback" not in self.err
        for fragment in fragments:
            assert fragment in self.err, (fragment, self.err)

    def succeeded(self):
        """Exit code 0 and silence on stderr; returns stdout."""
        assert (self.code, self.err) == (0, ""), self
        return self.out


@pytest.fixture
def phema(capfd, monkeypatch, tmp_path):
    """`phema ...` in this process, started in tmp_path."""
    from phema.app import run

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return call


def environment(**more):
    """The environment of a real process: one thread, no colours, no terminal width of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error,ignore::ResourceWarning",
        "COLUMNS": "80",
        **more,
    }


@pytest.fixture
def process(tmp_path):
    """`phema ...` as a process, started in tmp_path; file_limit is the largest file it may write."""

    def call(*arguments, file_limit=None, program=("-m", "phema"), **options):
        limit = file_limit and functools.partial(
            resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY)
        )
        done = subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(),
            preexec_fn=limit,
            timeout=120,
            **options,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def start(tmp_path):
    """`phema ...` as a process that runs on, in a session of its own; killed at the end."""
    running = []

    def call(*arguments, program=("-m", "phema"), **options):
        done = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            text=True,
            cwd=tmp_path,
            env=environment(),
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        running.append(done)
        return done

    yield call
    for popen in running:
        if popen.poll() is None:
            popen.kill()
        popen.communicate()


class Model(torch.nn.Module):
    """A bit of everything: a buffer of integers, one of floats, tied weights, a frozen parameter."""

    def __init__(self, width=24):
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.last = torch.nn.Linear(width, width, dtype=torch.bfloat16)
        self.tied = torch.nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.last(self.tied(self.norm(self.first(x))).bfloat16()).float()


def train_model(folder, steps=40, width=24, seed=0, **options):
    """Train `Model` in a loop of one's own, tracked; returns it."""
    torch.manual_seed(seed)
    model = Model(width)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    options = {
        "every": 4,
        "sigma_rels": (0.05, 0.1),
        "dtype": "float32",
        "on_error": "raise",
        **options,
    }
    with track(optimizer, model, folder, **options):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, width)).square().mean().backward()
            optimizer.step()
    return model


@pytest.fixture
def make_model():
    return Model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Stores of three own loops, and what is left of their models: never to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    models = {
        "snapshots": train_model(folder / "snapshots"),
        "other-run": train_model(folder / "other-run", seed=1),
        "other-model": train_model(folder / "other-model", width=16),
    }
    return folder, models


@pytest.fixture
def snapshots(trained, tmp_path):
    """A copy of the first store, to be used and broken: tmp_path/snapshots, 10 times up to 40 steps."""
    return shutil.copytree(trained[0] / "snapshots", tmp_path / "snapshots")


@pytest.fixture
def final_model(trained):
    """The model whose last state is in `snapshots`."""
    return trained[1]["snapshots"]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a tiny run of `phema train`, with one average tracked directly."""
    from phema.app import run

    folder = tmp_path_factory.mktemp("trained_run") / "run"
    torch.set_num_threads(1)
    assert run(["train", *TINY, "--direct", "0.075", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run_folder(trained_run, tmp_path):
    """A copy of that run: tmp_path/run."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def tiny():
    """Arguments of `phema train` for a run of two seconds."""
    return TINY


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder` with a hash of what is in it, the lock file aside."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


@pytest.fixture
def unchanged(tmp_path):
    """A context in which nothing in tmp_path may appear, change or go."""
    import contextlib

    @contextlib.contextmanager
    def watch():
        before = contents(tmp_path)
        yield
        assert contents(tmp_path) == before

    return watch


@pytest.fixture
def hash_folder():
    return contents
