"""`phema train`, `sample`, `evaluate` and `sweep` end to end at tiny scale; a disk that fills up."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from posthoc_ema import SnapshotStore

LONGER = ("--set", "total_images=1536", "--set", "track.snapshot_every=96")  # later ones win
QUICK = ("--steps", 2, "--seeds", "0-19")


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


# ---- train


def test_train_writes_a_run_that_the_other_commands_understand(phema, run_folder):
    assert sorted(path.name for path in run_folder.iterdir() if path.name != ".lock") == [
        "checkpoints",
        "config.json",
        "data.json",
        "direct",
        "log.jsonl",
        "snapshots",
    ]
    assert SnapshotStore.open(run_folder / "snapshots").times == list(range(32, 321, 32))
    assert SnapshotStore.open(run_folder / "direct").sigma_rels == [0.075]
    assert "run/snapshots: 21 files, " in phema("verify", "run").succeeded()


def test_train_again_has_nothing_to_do(phema, run_folder, tiny, unchanged):
    words = ("train", *tiny, "--direct", "0.075", "--out", "run")
    with unchanged():
        assert phema(*words).succeeded() == "run: complete at 320 images, nothing to do\n"
        value = json.loads(phema(*words, "--json").succeeded())
    assert value == {
        "folder": "run",
        "images": 320,
        "started_at": 320,
        "snapshots": "run/snapshots",
    }


def test_train_resumes_from_the_last_checkpoint_and_says_so(phema, run_folder, tiny, trained_run):
    for path in sorted((run_folder / "checkpoints").iterdir())[1:]:
        path.unlink()
    (left,) = (run_folder / "checkpoints").iterdir()
    done = phema("train", *tiny, "--direct", "0.075", "--out", "run")
    assert done.code == 0
    assert done.err == f"phema: continuing at {int(left.stem.split('-')[1])} of 320 images\n"
    assert done.out == "run: trained to 320 images; snapshots in run/snapshots\n"
    for path in sorted((trained_run / "snapshots").glob("*.safetensors")):
        assert path.read_bytes() == (run_folder / "snapshots" / path.name).read_bytes()


def test_train_takes_the_configuration_of_a_run(phema, run_folder):
    out = phema("train", "--config", "run/config.json", "--out", "run").succeeded()
    assert "nothing to do" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "seed=3"), "these differ (there and here): seed (0 and 3)."),
        (("--seed", "4"), "these differ (there and here): seed (0 and 4)."),
        (("--set", "optim.lr_ref=0.5"), "optim.lr_ref (0.05 and 0.5)"),
        (
            ("--set", "batchsize=3"),
            "batchsize is no field of TrainConfig. Did you mean batch_size?",
        ),
        (("--set", "track.snapshots_every=3"), "Did you mean track.snapshot_every?"),
        (("--set", "netwrk.dropout=0.1"), "no section 'netwrk'. Did you mean 'network'?"),
        (("--set", "other.x=1"), "no section 'other'. Sections here: network, track"),
        (("--set", "seed"), "--set must be KEY=VALUE, got 'seed'."),
        (("--set", "seed=-1"), "seed must not be negative, got -1."),
        (
            ("--set", "total_images=330"),
            "a positive multiple of batch_size = 16, got 330. Try 320.",
        ),
        (("--set", "total_images=many"), "total_images must be of type int, got 'many'."),
        (("--direct", "raw"), "--direct takes lengths"),
        (("--direct", "0.3"), "sigma_rel must lie in (0, 0.2887], got 0.3."),
        (("--device", "abacus"), "device must be auto, cpu, cuda or cuda:N, got 'abacus'."),
        (("--config", "run/config.json"), "give --preset (digits-xs, digits-s"),
        (
            ("--microbatch", "5"),
            "must divide the 16 images that each of 1 processes has of a batch",
        ),
        (("--parallel", "zero"), "parallel must be one of ddp, fsdp2, got 'zero'."),
        (("--log", "paper"), "--log must be one of tensorboard, wandb, trackio, got 'paper'."),
        (("--data", "gone.zip"), "gone.zip"),
    ],
)
def test_train_refuses_what_does_not_fit_and_names_it(
    phema, run_folder, tiny, unchanged, words, message
):
    with unchanged():
        phema("train", *tiny, "--direct", "0.075", "--out", "run", *words).refused(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--preset", "digits-xl"),
            "no preset 'digits-xl'. Did you mean 'digits-xs'?",
        ),
        (("--seed", "3"), "or --config FILE.json alone (as a run saves it)."),
        (("--config", "G"), "with --config A to G for a config of the paper"),
        (("--config", "missing.json"), "missing.json: cannot be read: No such file or directory."),
        (("--config", "broken.json"), "broken.json: cannot be used as a configuration"),
        (("--config", "binary.json"), "binary.json: cannot be used as a configuration"),
        (("--preset", "digits-xs", "--out", "broken.json"), "broken.json cannot be used for a run"),
    ],
)
def test_train_refuses_a_start_that_cannot_be(phema, tmp_path, unchanged, words, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\x80\x00\xff")
    with unchanged():
        phema("train", "--out", "new", *words).refused(message)


def test_a_dry_run_prints_the_cost_and_the_configuration_and_does_nothing(phema, unchanged):
    with unchanged():
        words = ("train", "--preset", "edm2-img512-xxs", "--config", "F", "--dry-run")
        value = json.loads(phema(*words, "--microbatch", 64, "--json").succeeded())
        lines = phema(*words).succeeded()
    assert round(value["num_parameters"] / 1e6, 1) == 31.3  # the sheet of facts has 31.31 for G
    assert 10 < value["gflops_per_evaluation"] < 13
    assert value["config"]["network"]["norm"] == "pixel"
    assert not value["config"]["network"]["gains"]
    assert value["config"]["compute"]["microbatch"] == 64
    assert value["training_zflops"] == pytest.approx(
        3e-12 * value["gflops_per_evaluation"] * value["total_images"]
    )
    assert "31.31 million" in lines
    assert "per device, 2048 images per pass" in lines


def test_a_run_needs_a_folder(phema):
    done = phema("train", "--preset", "digits-xs")
    assert (done.code, done.out) == (2, "")
    assert "--out RUN (or --dry-run)" in done.err


def test_a_config_of_the_paper_trains_with_its_loss_and_other_settings_go_on(phema, tiny):
    words = ("train", *tiny, "--config", "A", "--set", "status_every=320", "--out", "run")
    phema(*words, "--log", "tensorboard").succeeded()
    config = json.loads(Path("run/config.json").read_text())
    assert config["loss"]["weighting"] == "static"
    assert config["optim"]["loss_scale"] == 100
    assert list(Path("run/tensorboard").iterdir())
    for path in sorted(Path("run/checkpoints").iterdir())[1:]:
        path.unlink()
    done = phema(*words, "--microbatch", 8)
    assert done.code == 0
    changed, going_on = done.err.splitlines()
    assert changed == (
        "phema: the run goes on with other settings (there and here): compute.microbatch (None and 8)"
    )
    assert going_on.startswith("phema: continuing at ")
    assert json.loads(Path("run/config.json").read_text())["compute"]["microbatch"] == 8


def test_out_of_memory_is_one_line_that_says_which_microbatch_to_try(phema, tiny, monkeypatch):
    """A real step, whose forward pass asks for more than there is."""
    from reference_trainer.precond import Precond

    forward = Precond.forward

    def greedy(self, x, *arguments, **options):
        if len(x) > 4:
            torch.empty(2**50)
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(Precond, "forward", greedy)
    words = ("train", *tiny, "--out", "run")
    phema(*words).refused("with 16 images per forward pass: try --microbatch 8. The gradients")
    assert phema(*words, "--microbatch", 4).code == 0


def test_a_process_whose_fellow_has_failed_ends_without_a_word(phema, tiny, monkeypatch):
    from reference_trainer import loop
    from reference_trainer.distributed import OtherRankError

    def fail(*arguments, **options):
        raise OtherRankError("process 0 of 2 has failed and says why.")

    monkeypatch.setattr(loop, "train", fail)
    done = phema("train", *tiny, "--out", "run")
    assert (done.code, done.out, done.err) == (1, "", "")


def test_status_lines_are_short_and_come_now_and_then(capfd, monkeypatch):
    from phema import train_report
    from reference_trainer.run_log import Status

    status = Status(
        event="status",
        nimg=64000,
        total_images=131072,
        loss=0.5123,
        images_per_second=812.4,
        seconds_left=3900.0,
        memory_bytes=600_000_000,
    )
    report = train_report.reporter(lambda *progress: None)
    report(status)
    assert capfd.readouterr().err == ""  # a short run says nothing
    monkeypatch.setattr(train_report, "PATIENCE_SECONDS", 0.0)
    report(status)
    assert capfd.readouterr().err == (
        "phema: 64000 of 131072 images, loss 0.512, 812 images/s, 600.0 MB, 1 h 5 min left\n"
    )


def test_weights_and_biases_gets_the_log_without_a_network(phema, tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    phema("train", *tiny, "--log", "wandb", "--out", "run").succeeded()
    (file,) = Path("run/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"learning_rate", b"images_per_second"):
        assert name in content


# ---- sample, evaluate, sweep


def test_sample_shows_several_lengths_side_by_side(phema, run_folder):
    words = ("sample", "run", "--sigma-rel", "raw,0.05,0.1", "--out", "new/a.png", *QUICK)
    assert phema(*words).succeeded() == "new/a.png\n"
    height, width = picture("new/a.png").shape
    assert 800 < width < 4000
    assert 300 < height < 2000


def test_sample_gives_the_same_images_for_the_same_seeds(phema, run_folder):
    words = ("sample", "run", "--sigma-rel", "0.1", "--steps", 2)
    phema(*words, "--seeds", "0-9", "--out", "a.png").succeeded()
    phema(*words, "--seeds", "0-9", "--out", "b.png").succeeded()
    phema(*words, "--seeds", "10-19", "--out", "c.png").succeeded()
    phema(*words, "--seeds", "0-9", "--columns", 5, "--out", "d.png").succeeded()
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()
    assert picture("d.png").shape[0] == pytest.approx(2 * picture("a.png").shape[0], rel=0.2)
    assert picture("a.png").std() > 20


def test_a_synthesized_file_works_like_the_length_it_was_made_for(phema, run_folder):
    phema("synth", "run", "--sigma-rel", "0.07", "--out", "w.safetensors").succeeded()
    phema("sample", "w.safetensors", "--out", "a.png", *QUICK).succeeded()
    phema("sample", "run", "--sigma-rel", "0.07", "--out", "b.png", *QUICK).succeeded()
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    options = ("--num-images", 40, "--steps", 2, "--json")
    file = json.loads(phema("evaluate", "w.safetensors", *options).succeeded())
    store = json.loads(phema("evaluate", "run", "--sigma-rel", "0.07", *options).succeeded())
    assert file["results"] == [{**store["results"][0], "weights": "w"}]


def test_evaluate_prints_what_its_json_holds(phema, run_folder):
    words = ("evaluate", "run", "--sigma-rel", "raw,0.1", "--num-images", 40, "--steps", 2)
    lines = phema(*words).succeeded().splitlines()
    value = json.loads(phema(*words, "--json").succeeded())
    assert lines[0].split() == ["weights", "fd", "accuracy"]
    assert lines[-1] == value["metric"] == "fd-digits num_images=40 steps=2 seed=0"
    for line, row in zip(lines[1:-1], value["results"], strict=True):
        assert line.split() == [row["weights"], f"{row['fd']:.3f}", f"{row['accuracy']:.1%}"]
        assert 0 < row["fd"] < 1000
        assert 0 <= row["accuracy"] <= 1


def test_sweep_measures_with_the_trainer_what_evaluate_measures(phema, run_folder):
    options = ("--num-images", 40, "--steps", 2, "--json")
    done = phema("sweep", "run", "--sigma-rel", "0.05,0.1", "--out", "sweep", *options)
    rows = json.loads(done.out)["rows"]
    one = json.loads(phema("evaluate", "run", "--sigma-rel", "raw,0.05,0.1", *options).succeeded())
    assert [row["values"] for row in rows] == [
        {"fd": row["fd"], "accuracy": row["accuracy"]} for row in one["results"]
    ]
    before = Path("sweep/sweep.json").read_bytes()
    phema("sweep", "run", "--sigma-rel", "0.05,0.1", "--out", "sweep", *options)
    assert Path("sweep/sweep.json").read_bytes() == before


def test_networks_without_classes_are_sampled_and_measured(phema, tiny):
    phema("train", *tiny, "--set", "network.label_dim=0", "--out", "run").succeeded()
    phema("sample", "run", "--sigma-rel", "0.1", "--classes", "--out", "a.png", *QUICK).succeeded()
    words = ("evaluate", "run", "--sigma-rel", "0.1", "--num-images", 20, "--steps", 2)
    assert phema(*words).succeeded().splitlines()[0].split() == ["weights", "fd"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "run", "--out", "a.jpg"), "--out must end in .png, got a.jpg."),
        (
            ("sample", "run", "--out", "a.png"),
            "say which average of the snapshots: --sigma-rel 0.1",
        ),
        (("sample", "gone", "--out", "a.png"), "gone does not exist."),
        (("sample", "run", "--out", "a.png", "--seeds", "9-1"), "--seeds must be numbers"),
        (
            ("evaluate", "w.safetensors", "--sigma-rel", "0.1"),
            "w.safetensors is one average already",
        ),
        (("evaluate", "w.safetensors", "--at", "32"), "w.safetensors is one average already"),
        (("evaluate", "run/config.json"), "run/config.json: not a readable safetensors file"),
        (("evaluate", "snapshots", "--sigma-rel", "0.1"), "does not come from `phema train`"),
        (("evaluate", "run", "--sigma-rel", "raw", "--at", "32"), "the raw weights only at 320"),
    ],
)
def test_sample_and_evaluate_refuse_what_they_cannot_use(
    phema, run_folder, snapshots, unchanged, words, message
):
    phema("synth", "run", "--sigma-rel", "0.07", "--out", "w.safetensors").succeeded()
    with unchanged():
        phema(*words).refused(message)


# ---- a disk that fills up, and Ctrl-C, while a run trains


def wait_for_times(folder, count, process):
    """Wait until the store in `folder` holds `count` times."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        if (folder / "manifest.json").exists() and len(SnapshotStore.open(folder).times) >= count:
            return
        time.sleep(0.005)


def averages(folder):
    return {path.name: load_file(path) for path in folder.glob("*sigma_rel*.safetensors")}


def test_a_full_disk_stops_training_with_one_line_and_the_same_command_completes_it(
    start, process, phema, tiny, tmp_path
):
    words = ("train", *tiny, *LONGER, "--out", "run")
    running = start(*words)
    wait_for_times(tmp_path / "run" / "snapshots", 3, running)
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert err.startswith("phema: run/")
    assert err.count("\n") == 1
    assert (
        "could not be written: File too large. Make room (or raise the quota) and run again" in err
    )
    assert "all good" in phema("verify", "run").succeeded()
    phema("synth", "run", "--sigma-rel", "0.05", "--out", "a.safetensors").succeeded()

    done = process(*words)
    assert (done.code, done.out) == (0, "run: trained to 1536 images; snapshots in run/snapshots\n")
    phema("verify", "run").succeeded()
    process("train", *tiny, *LONGER, "--out", "undisturbed").succeeded()
    expected = averages(tmp_path / "undisturbed" / "snapshots")
    found = averages(tmp_path / "run" / "snapshots")
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert all(torch.equal(tensors[name], found[file][name]) for name in tensors), file


def test_ctrl_c_stops_training_with_one_line_and_the_same_command_goes_on(
    start, process, phema, tiny, tmp_path
):
    words = ("train", *tiny, *LONGER, "--out", "run")
    running = start(*words)
    wait_for_times(tmp_path / "run" / "snapshots", 2, running)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err == "phema: interrupted; run the same command again to continue.\n"
    found = json.loads(phema("verify", "run", "--json").out)["problems"]
    assert all("not listed in the manifest" in problem["what"] for problem in found), found
    phema("synth", "run", "--sigma-rel", "0.05", "--out", "a.safetensors").succeeded()
    done = process(*words)
    assert done.code == 0
    assert done.err.startswith("phema: continuing at ")
    assert done.err.endswith(" of 1536 images\n")
    phema("verify", "run").succeeded()


OWN_LOOP = """
import resource
import torch
from posthoc_ema.torch import track

torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tracker = track(optimizer, model, "snapshots", every=10, dtype="float16")
for step in range(1, 61):
    if step in (25, 45):
        tracker.flush()  # what is written in the background is before the change
    if step == 25:  # the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    if step == 45:  # and has room again
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
print("trained", step, "steps")
"""


def test_an_own_loop_goes_on_when_the_disk_is_full_and_stores_again_when_it_is_not(
    process, phema, snapshots
):
    """The averages stay whole: those after the gap are as if there had been none."""
    (snapshots.parent / "snapshots").rename(snapshots.parent / "unused")
    done = process(program=("-c", OWN_LOOP))
    assert (done.code, done.out) == (0, "trained 60 steps\n")
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "snapshot at time 30 not stored",
        "snapshot at time 40 not stored",
    ]
    assert all("could not be written: File too large. Make room" in line for line in lines)
    phema("verify", "snapshots").succeeded()
    store = SnapshotStore.open("snapshots")
    assert store.times == [10, 20, 50, 60]
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".tmp")]
    phema("synth", "snapshots", "--sigma-rel", "0.07", "--out", "full").succeeded()
    store.folder.rename(store.folder.with_name("with-gap"))
    process(program=("-c", OWN_LOOP.replace("4000", "10**9"))).succeeded()
    for name, tensors in averages(Path("with-gap")).items():
        undisturbed = load_file(Path("snapshots") / name)
        assert all(torch.equal(tensors[k], undisturbed[k]) for k in tensors), name
