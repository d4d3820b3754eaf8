"""Training scripts that know nothing of us run under `phema track` as they run without it."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import posthoc_ema as pe

from .conftest import environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
SIGMA_RELS = (0.05, 0.2)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Script:
    """A script, and where it leaves what; folders are those that it was started in.

    Attributes:
        file: its name in tests/scripts.
        arguments: of a run from start to end.
        every_step: more of them, with which it saves its weights after each step.
        weights: the files of those, in order.
        losses: where it writes the losses.
        model: builds its model, from the script's module.
        steps: optimizer steps of a run.
        every: steps between snapshots, such that one falls on the last step.
        interrupted: arguments of a run that ends half way; () if it cannot resume.
        resumed: arguments of the run that goes on from there.
        final: file of the weights at the end.
        ranks: processes, started by torchrun if there are more than one.
        launcher: what starts it in place of Python.
    """

    file: str
    losses: str
    model: Callable[[object], torch.nn.Module]
    steps: int
    every: int
    arguments: tuple[str, ...] = ()
    every_step: tuple[str, ...] = ()
    weights: str = ""
    interrupted: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    final: str = ""
    ranks: int = 1
    launcher: tuple[str, ...] = ()

    def command(self, *arguments):
        command = [sys.executable]
        if self.ranks > 1:
            command = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={self.ranks}"]
        command = list(self.launcher) or command
        return [*command, str(SCRIPTS / self.file), *arguments]


DIGITS = Script(
    "digits_classifier.py",
    losses="losses.json",
    model=lambda module: module.Net(),
    arguments=("--epochs", "2", "--num-workers", "1"),
    every_step=("--save-every-batch", "weights"),
    weights="weights/*.pt",
    steps=44,
    every=11,
)
GPT = Script(
    "char_gpt.py",
    losses="out/losses.json",
    model=lambda module: module.GPT(module.GPTConfig()),
    every_step=("--checkpoint_interval", "1"),
    weights="out/[cf]*[0-9l].pt",
    steps=24,
    every=6,
    interrupted=("--stop_at=16", "--always_save_checkpoint"),
    resumed=("--init_from=resume",),
    final="out/final.pt",
)
TRANSFORMERS = Script(
    "trainer_lm.py",
    losses="trained/losses.json",
    model=lambda module: module.build_model(),
    every_step=("--save_steps", "1"),
    weights="trained/checkpoint-*/model.safetensors",
    steps=20,
    every=5,
    interrupted=("--stop_at", "10"),
    resumed=("--save_steps", "10"),
    final="trained/final/model.safetensors",
)
LIGHTNING = Script(
    "lightning_autoencoder.py",
    losses="lightning/losses.json",
    model=lambda module: module.LitAutoEncoder(),
    every_step=("--save-every-step",),
    weights="lightning/steps/*.ckpt",
    steps=20,
    every=4,
    interrupted=("--max-epochs", "1"),
    resumed=("--max-epochs", "2"),
    final="lightning/last.ckpt",
)
ACCELERATE = Script(
    "accelerate_cv.py",
    losses="accelerated/losses.json",
    model=lambda module: module.Classifier(),
    every_step=("--checkpointing_steps", "1"),
    weights="accelerated/step_*/model.safetensors",
    steps=20,
    every=5,
    interrupted=("--max_train_steps", "10", "--checkpointing_steps", "10"),
    resumed=("--resume_from_checkpoint", "accelerated/step_10"),
    final="accelerated/final.pt",
    launcher=(str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1"),
)
GPT_RANKS = replace(GPT, ranks=2)
ACCELERATE_RANKS = replace(
    ACCELERATE,
    ranks=2,
    launcher=(),
    steps=10,
    interrupted=("--max_train_steps", "5", "--checkpointing_steps", "5"),
    resumed=("--resume_from_checkpoint", "accelerated/step_5"),
)

ALL = {
    "digits": DIGITS,
    "gpt": GPT,
    "transformers": TRANSFORMERS,
    "lightning": LIGHTNING,
    "accelerate-launch": ACCELERATE,
    "gpt-torchrun": GPT_RANKS,
    "accelerate-torchrun": ACCELERATE_RANKS,
}
VARYING = re.compile(r"'\w+_(runtime|per_second)': '[^']*'")
"""What two runs of one script print differently: how long they took."""


class Runs:
    """Processes of one test, each in a folder of its own; they run side by side."""

    def __init__(self, folder):
        self._folder = folder
        self._running = []

    def start(self, name, command, tracked=None):
        """Start a command in folder `name`, under `phema track` with the options `tracked`."""
        place = self._folder / name
        place.mkdir(exist_ok=True)
        if tracked is not None:
            track = [sys.executable, "-m", "phema", "track", "--out", "snapshots", *tracked]
            command = [*track, "--", *command]
        process = subprocess.Popen(
            command,
            cwd=place,
            env=environment(PYTHONWARNINGS="default"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def stop(self):
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def runs(tmp_path):
    started = Runs(tmp_path)
    yield started
    started.stop()


def ended(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out, err


def options(script):
    lengths = ",".join(map(str, SIGMA_RELS))
    return ["--sigma-rel", lengths, "--every", str(script.every), "--dtype", "float32"]


def read_weights(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    held = torch.load(path, weights_only=True)
    return held.get("model") or held.get("state_dict") or held


def weights_after_each_step(script, folder):
    def number(path):
        digits = re.findall(r"\d+", str(path.relative_to(folder)))
        return int(digits[-1]) if digits else script.steps

    paths = sorted(folder.glob(script.weights), key=number)
    assert len(paths) == script.steps
    return [read_weights(path) for path in paths]


def build(script):
    """A new model, from the class in the script."""
    spec = importlib.util.spec_from_file_location(
        script.file.removesuffix(".py"), SCRIPTS / script.file
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return script.model(module)


def check_averages(store, history, model):
    """The last snapshot is the average of the weights that another run of the script saved."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    time = store.times[-1]
    assert time == len(history)
    for sigma_rel in SIGMA_RELS:
        gamma = float(pe.gamma_from_sigma_rel(sigma_rel))
        found = pe.synthesize(store, sigma_rel, at=time)
        for name in trainable:
            values = np.stack([weights[name].double().numpy() for weights in history])
            expected = pe.power_average(values, range(1, time + 1), gamma)
            allowed = 2e-6 * max(np.abs(values).max(), 1e-3)
            assert np.abs(found[name] - expected).max() <= allowed, name


def check_copies(store, history, model):
    """Buffers in the last snapshot are those of its moment."""
    found = pe.synthesize(store, SIGMA_RELS[0])
    for name, _ in model.named_buffers():
        if name in model.state_dict():
            np.testing.assert_array_equal(found[name], history[-1][name].numpy())


def check_synthesis(phema, folder, model):
    """`phema synth` gives a file that the script's own class loads strictly."""
    phema(
        "synth", "--sigma-rel", "0.1", "--out", folder / "model.safetensors", folder / "snapshots"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("script", ALL.values(), ids=ALL)
def test_track_changes_nothing_and_stores_the_averages(script, runs, tmp_path, phema):
    plain = runs.start("plain", script.command(*script.arguments, *script.every_step))
    tracked = runs.start("tracked", script.command(*script.arguments), options(script))
    plain_out, _ = ended(plain)
    tracked_out, tracked_err = ended(tracked)
    assert VARYING.sub("", tracked_out) == VARYING.sub("", plain_out)
    losses = [(tmp_path / name / script.losses).read_text() for name in ("plain", "tracked")]
    assert losses[0] == losses[1]
    count = script.steps // script.every
    assert tracked_err.splitlines()[-1] == (
        f"phema track: {script.steps} steps, {count} snapshots in ./snapshots (sigma_rel 0.05, 0.2)"
    )
    history = weights_after_each_step(script, tmp_path / "plain")
    model = build(script)
    with pe.SnapshotStore.open(tmp_path / "tracked" / "snapshots") as store:
        assert store.times == list(range(script.every, script.steps + 1, script.every))
        assert list(store.verify()) == []
        check_averages(store, history, model)
        check_copies(store, history, model)
    check_synthesis(phema, tmp_path / "tracked", model)


RESUMING = [
    pytest.param(script, id=name, marks=[] if script is GPT else pytest.mark.slow)
    for name, script in ALL.items()
    if script.interrupted
]


@pytest.mark.parametrize("script", RESUMING)
def test_track_continues_by_itself_when_the_script_resumes(script, runs, tmp_path):
    """The same command, run again: weights and averages are those of a run from start to end.

    The run that was interrupted stored its last averages when it ended; that one snapshot is more.
    """
    straight = runs.start("straight", script.command(*script.arguments), options(script))
    first = runs.start("parts", script.command(*script.interrupted), options(script))
    ended(first)
    middle = pe.SnapshotStore.open(tmp_path / "parts/snapshots").times[-1]
    second = runs.start("parts", script.command(*script.resumed), options(script))
    _, err = ended(second)
    ended(straight)
    final = [read_weights(tmp_path / name / script.final) for name in ("straight", "parts")]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(tensor, final[1][name]) for name, tensor in final[0].items())
    line = err.splitlines()[-1]
    assert line.startswith(f"phema track: {script.steps} steps, continued at {middle}, "), err
    expected, found = (
        dict(stored_averages(tmp_path / name / "snapshots")) for name in ("straight", "parts")
    )
    assert {time for time, _ in found} == {time for time, _ in expected} | {middle}
    for place, tensors in expected.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(found[place][name], values, strict=True)


def stored_averages(folder):
    """Each stored average: (time, sigma_rel) and its tensors, bit for bit."""
    with pe.SnapshotStore.open(folder) as store:
        for record in store.averages:
            with store.read(record) as reader:
                yield (
                    (record.time, record.sigma_rel),
                    {
                        entry.name: reader.values(entry, 0, math.prod(entry.shape))
                        for entry in store.table.entries.values()
                        if entry.averaged
                    },
                )
