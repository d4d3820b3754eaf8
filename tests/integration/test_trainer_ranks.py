"""Training by two processes under torchrun: the results of one process, and of interrupted runs.

Must-show 7 of the trainer: the losses of one process to 1e-5 over 50 steps and the same snapshots; kill -9
of a rank ends all with a sentence; the same command goes on bit by bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import posthoc_ema as pe
from posthoc_ema.tensor_files import TensorFile
from reference_trainer.checkpoint import checkpoint_paths, read_checkpoint
from reference_trainer.config import (
    ComputeConfig,
    NetworkConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)
from reference_trainer.loop import train
from reference_trainer.run_log import read_log

PROGRAM = Path(__file__).with_name("trainer_ranks.py")
CONFIG = TrainConfig(
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        logvar_channels=8,
        clip_act=None,
    ),
    optim=OptimConfig(lr_ref=0.01, t_ref=100.0, rampup_images=160),
    track=TrackConfig(snapshot_every=160, direct_sigma_rels=(0.07,)),
    batch_size=16,
    total_images=16 * 50,
    checkpoint_every=160,
    status_every=16,
    telemetry_every=160,
)
SHARDED = dataclasses.replace(CONFIG, compute=ComputeConfig(parallel="fsdp2", microbatch=4))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def phema(config, folder):
    """The words of `phema train` for a run."""
    file = folder.with_suffix(".json")
    file.write_text(config.to_json())
    words = ("-m", "phema", "train", "--device", "cpu", "--config", file, "--out", folder)
    return [str(word) for word in words]


def launch(*words):
    """`torchrun ...` in a session of its own."""
    return subprocess.Popen(
        [*TORCHRUN, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words):
    process = launch(*words)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def sentences(err):
    """What our own processes say, without the launcher's lines."""
    return [line for line in err.splitlines() if line.startswith("phema: ")]


def statuses(folder):
    lines = [line for line in read_log(folder / "log.jsonl") if line["event"] == "status"]
    timing = ("images_per_second", "seconds", "seconds_left", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def outcome(folder):
    """Every number that a run leaves."""
    checkpoint = read_checkpoint(checkpoint_paths(folder / "checkpoints")[0])
    found = {("checkpoint", name): array for name, array in checkpoint.tensors.items()}
    for place in ("snapshots", "direct"):
        store = pe.SnapshotStore.open(folder / place)
        assert list(store.verify()) == []
        for record in store.records:
            with TensorFile(store.path(record)) as file:
                for name in file.header.tensors:
                    found[place, record.time, str(record.profile), name] = file.read(name)
    return found


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].tobytes() != b[key].tobytes()] == []


def assert_same_training(found, expected):
    """Losses to 1e-5 over 50 steps, and the averages of both stores."""
    assert len(statuses(found)) == len(statuses(expected)) == 50
    for a, b in zip(statuses(found), statuses(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    stores = [pe.SnapshotStore.open(folder / "snapshots") for folder in (found, expected)]
    assert [r.profile for r in stores[0].records] == [r.profile for r in stores[1].records]
    for time_ in stores[0].times:
        a, b = (pe.synthesize(store, 0.1, time_) for store in stores)
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(CONFIG, folder, device="cpu")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The runs of two processes: `two` by replicas, `sharded` by shards and in two passes per step."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in (("sharded", SHARDED), ("two", CONFIG)):
        (folder / f"{name}.json").write_text(config.to_json())
    code, out, err = run(str(PROGRAM), str(folder))
    assert (code, out) == (0, ""), err
    assert "Warning" not in err
    return folder


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_two_processes_train_like_one(ranks, one, kind):
    assert_same_training(ranks / kind, one)


def test_an_error_that_all_would_have_is_raised_by_one(ranks):
    first, second = (json.loads((ranks / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first["two"] == [0, 800, True]
    assert second["two"] == [0, 800, False]
    assert first["refused"][0] == "ConfigError"
    assert "these differ (there and here): seed (0 and 7)." in first["refused"][1]
    assert second["refused"] == ["OtherRankError", "process 0 of 2 has failed and says why."]


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_dynamics_of_two_processes_are_those_of_one(ranks, one, kind):
    """Weights, updates and gradients; activations are those of other images."""
    found, expected = (
        next(line["dynamics"] for line in statuses(f) if "dynamics" in line)
        for f in (ranks / kind, one)
    )
    for what in ("weights", "updates", "gradients", "loss_by_ln_sigma"):
        assert found[what] == pytest.approx(expected[what], rel=2e-3), what
    assert found["activations"] == pytest.approx(expected["activations"], rel=0.5)


def wait_for_checkpoint(process, folder, count=2):
    deadline = time.monotonic() + 120
    while len(checkpoint_paths(folder / "checkpoints")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(process):
    """The processes that torchrun has started, by their rank."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def kill_a_rank(config, folder, rank):
    """kill -9 of one rank in the middle of a run; what the others said, and how long they took to end."""
    process = launch(*phema(config, folder))
    try:
        wait_for_checkpoint(process, folder)
        ranks_of(process)[rank].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    return err, time.monotonic() - begin


def test_a_killed_rank_ends_all_with_a_sentence_and_the_same_command_goes_on(tmp_path, ranks):
    folder = tmp_path / "run"
    err, seconds = kill_a_rank(CONFIG, folder, rank=1)
    assert seconds < 45
    (sentence,) = sentences(err)
    assert sentence.startswith("phema: another process of this job has ended, so process 0 of 2 ")
    assert sentence.endswith("the same command continues from the last checkpoint.")

    code, out, err = run(*phema(CONFIG, folder))
    assert code == 0, err
    assert out == f"{folder}: trained to 800 images; snapshots in {folder}/snapshots\n"
    (said,) = sentences(err)
    assert said.startswith("phema: continuing at ")
    assert_bit_equal(outcome(folder), outcome(ranks / "two"))
    assert statuses(folder) == statuses(ranks / "two")


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_one_process_goes_on_with_what_two_have_begun_and_says_so(tmp_path, ranks, one, kind):
    folder = Path(shutil.copytree(ranks / kind, tmp_path / "run"))
    checkpoint_paths(folder / "checkpoints")[0].unlink()  # the one at the end
    result = train(CONFIG, folder, device="cpu")
    assert 0 < result.started_at < CONFIG.total_images
    assert_same_training(folder, one)
    said = [x["message"] for x in read_log(folder / "log.jsonl") if x["event"] == "changed"]
    changed = "compute.microbatch (4 and None), compute.parallel (fsdp2 and ddp)"
    assert [changed in message for message in said] == [True] * (kind == "sharded")
