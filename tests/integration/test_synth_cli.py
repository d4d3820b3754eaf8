"""`phema synth` beyond one file: folders, shards, dry runs, kills, raw checkpoints."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posthoc_ema import synthesize

SYNTH = ("synth", "snapshots", "--sigma-rel", "0.07")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def load_shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(folder / file)
    assert set(tensors) == set(index["weight_map"])
    return tensors


# ---- folders


def test_shards_of_several_lengths_go_to_a_folder_each(phema, snapshots, tmp_path, make_model):
    out = phema(
        *("synth", "snapshots", "--sigma-rel", "raw,0.07", "--shard-size", "2kB", "--out", "out")
    ).succeeded()
    assert names(tmp_path / "out") == ["raw-at-40", "sigma_rel-0.07-at-40"]
    rows = [line.split() for line in out.splitlines()]
    assert [row[-1] for row in rows[1:3]] == ["out/raw-at-40", "out/sigma_rel-0.07-at-40"]
    tensors = load_shards(tmp_path / "out" / "sigma_rel-0.07-at-40")
    make_model().load_state_dict(tensors, strict=True)
    np.testing.assert_allclose(
        tensors["first.weight"], synthesize(str(snapshots), 0.07)["first.weight"], atol=1e-6
    )


def test_dry_run_says_what_would_be_written_and_writes_nothing(phema, snapshots, unchanged):
    with unchanged():
        out = phema(*SYNTH, "--shard-size", "2kB", "--out", "out", "--dry-run").succeeded()
        assert "would write model-00004-of-00004.safetensors (1.7 kB)" in out
        out = phema(*SYNTH, "--dry-run").succeeded()
        assert "would write 1 files of " in out
        value = json.loads(phema(*SYNTH, "--dry-run", "--json").succeeded())
    assert value["dry_run"] is True
    assert value["results"][0]["file"] == "sigma_rel-0.07-at-40.safetensors"


def test_same_command_again_finds_everything_there(phema, snapshots, hash_folder, tmp_path):
    command = (*SYNTH, "--shard-size", "2kB", "--out", "out")
    phema(*command).succeeded()
    before = hash_folder(tmp_path / "out")
    assert "4 of 4 files were there already" in phema(*command).succeeded()
    assert hash_folder(tmp_path / "out") == before
    phema(
        "synth", "snapshots", "--sigma-rel", "0.1", "--shard-size", "2kB", "--out", "out"
    ).refused("exists already; choose another --out or --overwrite.")
    assert hash_folder(tmp_path / "out") == before


def test_another_file_of_the_name_is_not_replaced(phema, snapshots, tmp_path, unchanged):
    (tmp_path / "a.safetensors").write_text("mine")
    with unchanged():
        phema(*SYNTH, "--out", "a.safetensors").refused("a.safetensors exists already")


def test_killed_synthesis_is_continued_by_the_same_command(start, phema, snapshots, tmp_path):
    """Killed with the first shard in place: no index is there, the rest is made, the shard stays."""
    program = (
        "-c",
        "import sys, time\n"
        "from posthoc_ema.synthesis import writing\n"
        "write = writing._write_files\n"
        "def slow(*a):\n"
        "    yield from write(*a)\n"
        "    time.sleep(1)\n"
        "writing._write_files = slow\n"
        "from phema.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n",
    )
    command = (*SYNTH, "--shard-size", "2kB", "--out", "out")
    process = start(*command, program=program)
    first = tmp_path / "out" / "model-00001-of-00004.safetensors"
    deadline = time.monotonic() + 60
    while not first.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "out" / ".tmp-model-00002-of-00004.safetensors-0123abcd").write_text("half")
    assert not {"model.safetensors.index.json", "phema.json"} & set(names(tmp_path / "out"))
    made = first.stat().st_mtime_ns
    out = phema(*command).succeeded()
    assert "files were there already" in out
    assert first.stat().st_mtime_ns == made
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]
    assert "first.weight" in load_shards(tmp_path / "out")


# ---- which times, which lengths


def test_overrides_and_left_out_times(phema, snapshots):
    value = json.loads(
        phema(
            *(*SYNTH, "--override", "norm.*=0.2", "--override", "last.bias=raw"),
            *("--exclude", "4:12,20", "--out", "a.safetensors", "--json"),
        ).succeeded()
    )
    assert value["overrides"] == {"norm.*": 0.2, "last.bias": 0.0}
    found = load_file("a.safetensors")
    raw = synthesize(str(snapshots), 0)
    np.testing.assert_array_equal(found["last.bias"].float(), raw["last.bias"])
    used = phema(*SYNTH, "--include", "20:", "--out", "b.safetensors", "--json").succeeded()
    assert json.loads(used)["inputs"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--override", "no.*=0.1"), "--override 'no.*' matches none of the"),
        (("--override", "norm.*"), "--override 'norm.*': write PATTERN=SIGMA_REL"),
        (("--override", "norm.*=0.4"), "sigma_rel must lie in (0, 0.2887], got 0.4"),
        (("--exclude", "5"), "time 5, which is to be included or excluded, is not stored"),
        (("--exclude", "41:50"), "--exclude 41:50: there is no time from 41 to 50."),
        (("--include", "x"), "--include 'x': 'x' is not a whole number"),
        (("--shard-size", "big"), "a size is written as 5GB, 500MB or 2GiB, got 'big'."),
        (("--variant", "ema"), "--variant names the files of a model folder; add --like"),
        (("--like", "none"), "--like none does not exist."),
        (("--profile", "half-life:3"), "--profile is for raw checkpoints; add --from-checkpoints"),
        (("--times", "1"), "--times is for raw checkpoints"),
        (("--shard-size", "1kB", "--out", "a.safetensors"), "give a folder, not a file."),
        (("--device", "cuda:77"), "device must be one that PyTorch can use here, got 'cuda:77'"),
    ],
)
def test_wrong_options_are_refused(phema, snapshots, unchanged, options, message):
    with unchanged():
        phema(*SYNTH, "--out", "out", *options).refused(message)


# ---- raw checkpoints


@pytest.fixture
def checkpoints(tmp_path, make_model):
    """Files of torch.save of a small model, 100 to 500 steps."""
    (tmp_path / "run").mkdir()
    model = make_model()
    for step in range(100, 501, 100):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        torch.save(
            {"model": model.state_dict(), "step": step}, tmp_path / "run" / f"step-{step}.pt"
        )
    return tmp_path / "run"


def test_checkpoints_are_averaged_by_any_profile(phema, checkpoints, tmp_path, make_model):
    out = phema(
        *("synth", "run", "--from-checkpoints", "--sigma-rel", "raw,0.2", "--out", "out"),
        *("--profile", "uniform:100", "--profile", "half-life:200"),
    ).succeeded()
    assert names(tmp_path / "out") == [
        "half-life-200-at-500.safetensors", "raw-at-500.safetensors",
        "sigma_rel-0.2-at-500.safetensors", "uniform-100-500-at-500.safetensors",
    ]  # fmt: skip
    assert "at 500 steps, from 5 checkpoints (" in out
    last = torch.load(checkpoints / "step-500.pt", weights_only=True)["model"]
    raw = load_file("out/raw-at-500.safetensors")
    assert all(torch.equal(raw[n], v) for n, v in last.items())
    uniform = load_file("out/uniform-100-500-at-500.safetensors")
    make_model().load_state_dict(uniform, strict=True)
    # The parameters rise by 0.1 a checkpoint; a window over four gaps weighs 1/8, 1/4, 1/4, 1/4, 1/8
    # under the random walk, whose best guess inside a gap is the middle of its ends.
    x = json.loads(
        phema(
            *("synth", "run", "--from-checkpoints", "--profile", "uniform:100", "--out", "j"),
            "--json",
        ).succeeded()
    )
    assert x["results"][0]["target"] == "uniform 100-500"
    delta = (last["first.bias"] - uniform["first.bias"]).mean().item()
    assert delta == pytest.approx(0.2, abs=1e-4)


def test_checkpoints_in_any_order_with_times(phema, checkpoints, tmp_path):
    files = sorted(checkpoints.iterdir(), reverse=True)
    command = ("synth", *files, "--from-checkpoints", "--sigma-rel", "0.2")
    phema(*command, "--out", "a.safetensors").succeeded()
    phema("synth", "run", "--from-checkpoints", "--sigma-rel", "0.2", "--out", "b.safetensors")
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in a)
    value = json.loads(phema(*command, "--times", "10,8,6,4,2", "--json", "--dry-run").succeeded())
    assert value["time"] == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--sigma-rel", "0.1"), "holds no tracked averages, but files that may be raw"),
        (("snapshots", "--from-checkpoints", "--sigma-rel", "0.1"), "leave out --from-checkpoints"),
        (("snapshots", "run", "--sigma-rel", "0.1"), "2 were given. Raw checkpoints"),
        (("run", "--from-checkpoints", "--profile", "lawa"), "write uniform:START,END or half-life:H"),
        (("run", "--from-checkpoints", "--profile", "uniform:1,900"), "ends after the last checkpoint"),
        (("run", "--from-checkpoints", "--profile", "uniform:x"), "'x' is not a number"),
        (("run", "--from-checkpoints", "--sigma-rel", "0.1", "--key", "ema"), "has no 'ema'"),
        (("run", "--from-checkpoints", "--sigma-rel", "0.1", "--times", "1"), "for 5 checkpoints"),
        (("run", "--from-checkpoints", "--sigma-rel", "0.1", "--at", "150"), "the nearest are"),
        (("run", "--from-checkpoints", "--sigma-rel", "0.1", "--norm", "density"), "--norm must be"),
    ],
)  # fmt: skip
def test_wrong_checkpoints_are_refused(phema, snapshots, checkpoints, unchanged, words, message):
    with unchanged():
        phema("synth", *words, "--out", "out").refused(message)


def test_neither_length_nor_profile_is_a_usage_error(phema, checkpoints):
    done = phema("synth", "run", "--from-checkpoints")
    assert done.code == 2
    assert "Missing option '--sigma-rel' (or --profile)" in done.err


def test_checkpoints_stream_in_bounded_memory(process, tmp_path):
    """Four of 40 MB each: what is held at once is pieces, not tensors and not files."""
    for step in (100, 200, 300, 400):
        tensors = {f"w{i}": torch.full((2_500, 1_000), float(step)) for i in range(4)}
        torch.save({"model": tensors}, tmp_path / f"step-{step}.pt")
    program = (
        "import sys, threading, time\n"
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        lines = open('/proc/self/status').readlines()\n"
        "        peak = max(peak, *(int(l.split()[1]) for l in lines if l.startswith('RssAnon')))\n"
        "        time.sleep(0.002)\n"
        "from phema.app import run\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "code = run(sys.argv[1:])\n"
        "print('peak', peak)\n"
        "sys.exit(code)\n"
    )
    words = ("synth", ".", "--from-checkpoints", "--sigma-rel", "0.25", "--out", "out")
    done = process(*words, program=("-c", program))
    assert done.code == 0, done
    assert int(done.out.split()[-1]) < 100_000  # kB; the inputs are 160 MB
