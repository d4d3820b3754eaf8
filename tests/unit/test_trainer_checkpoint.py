"""Checkpoints and the log: what is written, what survives damage."""

import json

import pytest
import torch

from posthoc_ema import SnapshotFormatError, SnapshotMismatchError
from reference_trainer.checkpoint import (
    METADATA_KEY,
    capture,
    checkpoint_paths,
    latest_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from reference_trainer.config import NetworkConfig, OptimConfig, TrackConfig, TrainConfig
from reference_trainer.data import load_dataset, new_batches
from reference_trainer.run_log import RunLog, Status, read_log, to_line
from reference_trainer.state import new_state, train_step

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=4,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
        logvar_channels=4,
    ),
    track=TrackConfig(snapshot_every=8),
    batch_size=8,
    total_images=64,
    checkpoint_every=8,
    status_every=8,
    optim=OptimConfig(rampup_images=0),
)


@pytest.fixture
def run(tmp_path):
    """A state after two steps, and what makes further ones."""
    batches = new_batches(load_dataset("digits"), CONFIG, CPU)
    state = new_state(CONFIG, tmp_path, CPU)
    for _ in range(2):
        train_step(state, batches, CONFIG)
    yield state, batches, tmp_path
    state.trackers["snapshots"].close()


def same(a, b):
    return a.numbers == b.numbers and all(
        (a.tensors[name] == b.tensors[name]).all() for name in a.tensors.keys() | b.tensors.keys()
    )


def test_checkpoint_restores_every_number_and_every_bit(run):
    state, batches, folder = run
    path = save_checkpoint(state, folder / "checkpoints")
    state.trackers["snapshots"].close()
    resumed = new_state(CONFIG, folder, CPU)
    restore(resumed, read_checkpoint(path))
    assert same(capture(state), capture(resumed))
    reference = new_state(CONFIG, folder / "reference", CPU)
    for _ in range(3):
        train_step(reference, batches, CONFIG)
    train_step(resumed, batches, CONFIG)
    a, b = capture(reference), capture(resumed)
    assert all((a.tensors[name] == b.tensors[name]).all() for name in a.tensors)
    assert a.numbers["adam_step"] == b.numbers["adam_step"] == 3
    for each in (reference, resumed):
        each.trackers["snapshots"].close()


def test_last_two_checkpoints_are_kept_and_later_ones_removed(run):
    state, batches, folder = run
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "checkpoint-000000000999.safetensors").write_bytes(b"damaged, of a lost future")
    for _ in range(3):
        train_step(state, batches, CONFIG)
        save_checkpoint(state, checkpoints)
    names = [path.stem for path in checkpoint_paths(checkpoints)]
    assert names == ["checkpoint-000000000040", "checkpoint-000000000032"]


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign"])
def test_damaged_newest_checkpoint_falls_back_to_the_older(run, damage):
    state, batches, folder = run
    older = save_checkpoint(state, folder / "checkpoints")
    train_step(state, batches, CONFIG)
    newest = save_checkpoint(state, folder / "checkpoints")
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes({"cut": data[:-9], "flip": bytes(data), "foreign": b"hello"}[damage])
    checkpoint, problems = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.nimg == read_checkpoint(older).nimg == 16
    assert len(problems) == 1
    assert newest.name in problems[0]


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(run):
    state, _, folder = run
    save_checkpoint(state, folder / "checkpoints").write_bytes(b"")
    with pytest.raises(SnapshotFormatError, match="no readable checkpoint"):
        latest_checkpoint(folder / "checkpoints")


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert latest_checkpoint(tmp_path / "checkpoints") == (None, [])


def test_checkpoint_of_a_newer_schema_is_refused_not_passed_over(run):
    state, _, folder = run
    path = save_checkpoint(state, folder / "checkpoints")
    newer = path.read_bytes().replace(rb"{\"schema\": 2, \"nimg\"", rb"{\"schema\": 9, \"nimg\"")
    path.write_bytes(newer)
    with pytest.raises(SnapshotMismatchError, match="schema 9"):
        latest_checkpoint(folder / "checkpoints")


def test_checkpoint_is_a_safetensors_file_of_plain_names(run):
    from safetensors import safe_open

    state, _, folder = run
    path = save_checkpoint(state, folder / "checkpoints")
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()[METADATA_KEY])["nimg"] == 16
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {"network", "adam", "tracker", "loss_sums"}


def status(nimg, loss=1.0):
    return Status(event="status", nimg=nimg, total_images=64, loss=loss)


def test_log_is_written_and_reported(tmp_path):
    seen = []
    log = RunLog(tmp_path / "log.jsonl", seen.append)
    log.write(status(8))
    log.show(status(16))
    assert [s.nimg for s in seen] == [8, 16]
    assert read_log(tmp_path / "log.jsonl") == [
        {"event": "status", "nimg": 8, "total_images": 64, "loss": 1.0}
    ]


def test_log_line_leaves_out_what_json_cannot_say():
    assert "loss" not in json.loads(to_line(status(8, float("nan"))))


def test_truncated_log_has_neither_later_nor_unfinished_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for nimg in (8, 16, 24):
        log.write(status(nimg))
    with path.open("a") as file:
        file.write('{"event": "status", "ni')
    log.truncate(16)
    assert [line["nimg"] for line in read_log(path)] == [8, 16]
    log.write(status(24))
    assert [line["nimg"] for line in read_log(path)] == [8, 16, 24]
