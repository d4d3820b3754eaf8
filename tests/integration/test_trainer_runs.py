"""Whole runs in a folder: resume, completion, damage, refusal, agreement of syntheses."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest

import posthoc_ema as pe
from posthoc_ema.tensor_files import TensorFile
from reference_trainer.checkpoint import checkpoint_paths, read_checkpoint
from reference_trainer.config import NetworkConfig, OptimConfig, TrackConfig, TrainConfig
from reference_trainer.loop import resolve_device, train
from reference_trainer.run_log import read_log

CONFIG = TrainConfig(
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        dropout=0.1,
        logvar_channels=8,
    ),
    optim=OptimConfig(lr_ref=0.01, t_ref=8.0, rampup_images=32),
    track=TrackConfig(snapshot_every=24, direct_sigma_rels=(0.075,)),
    batch_size=8,
    total_images=200,
    checkpoint_every=48,
    status_every=16,
)


class Interrupt(Exception):
    """Stands for whatever ends a process."""


def interrupt_at(nimg):
    def report(status):
        if status.event == "status" and status.nimg == nimg:
            raise Interrupt

    return report


def outcome(folder):
    """Everything that a run leaves and that must not depend on interruptions."""
    checkpoint = read_checkpoint(checkpoint_paths(folder / "checkpoints")[0])
    arrays = {("checkpoint", name): array for name, array in checkpoint.tensors.items()}
    for place in ("snapshots", "direct"):
        store = pe.SnapshotStore.open(folder / place)
        for record in store.records:
            with TensorFile(store.path(record)) as file:
                for name in file.header.tensors:
                    arrays[place, record.time, str(record.profile), name] = file.read(name)
    return arrays


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def status_lines(folder):
    timing = ("images_per_second", "seconds", "seconds_left", "memory_bytes")
    lines = [line for line in read_log(folder / "log.jsonl") if line["event"] == "status"]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(CONFIG, folder, device="cpu")
    return folder


@pytest.mark.parametrize("points", [(16,), (64, 112), (200,)])
def test_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, uninterrupted, points):
    for point in points:
        with pytest.raises(Interrupt):
            train(CONFIG, tmp_path, device="cpu", report=interrupt_at(point))
    result = train(CONFIG, tmp_path, device="cpu")
    assert result.started_at == {16: 0, 64: 96, 200: 192}[points[0]]
    assert_bit_equal(outcome(tmp_path), outcome(uninterrupted))
    assert status_lines(tmp_path) == status_lines(uninterrupted)


def test_run_folder_holds_what_the_documentation_says(uninterrupted):
    assert TrainConfig.from_json((uninterrupted / "config.json").read_text()) == CONFIG
    assert [p.stem for p in checkpoint_paths(uninterrupted / "checkpoints")] == [
        "checkpoint-000000000200",
        "checkpoint-000000000192",
    ]
    store = pe.SnapshotStore.open(uninterrupted / "snapshots")
    assert store.times == [*range(24, 200, 24), 200]
    assert TrainConfig.from_json(store.metadata["reference_trainer"]) == CONFIG
    direct = pe.SnapshotStore.open(uninterrupted / "direct")
    assert (direct.times, direct.sigma_rels) == ([200], [0.075])


def test_complete_run_returns_at_once_and_changes_nothing(uninterrupted):
    before = (uninterrupted / "log.jsonl").read_text(), outcome(uninterrupted)
    events = []
    result = train(CONFIG, uninterrupted, device="cpu", report=events.append)
    assert result.already_complete
    assert [event.event for event in events] == ["complete"]
    assert (uninterrupted / "log.jsonl").read_text() == before[0]
    assert_bit_equal(outcome(uninterrupted), before[1])


def test_damaged_newest_checkpoint_costs_time_and_not_the_result(tmp_path, uninterrupted):
    with pytest.raises(Interrupt):
        train(CONFIG, tmp_path, device="cpu", report=interrupt_at(112))
    newest = checkpoint_paths(tmp_path / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    result = train(CONFIG, tmp_path, device="cpu")
    assert result.started_at == 48
    assert_bit_equal(outcome(tmp_path), outcome(uninterrupted))
    (line,) = [x for x in read_log(tmp_path / "log.jsonl") if x["event"] == "fallback"]
    assert newest.name in line["message"]


def test_other_configuration_is_refused_by_the_fields_that_differ(uninterrupted):
    other = dataclasses.replace(
        CONFIG, seed=7, track=dataclasses.replace(CONFIG.track, dtype="float32")
    )
    with pytest.raises(pe.ConfigError) as caught:
        train(other, uninterrupted, device="cpu")
    assert "track.dtype (delta and float32), seed (0 and 7)" in str(caught.value)


def test_second_process_in_the_same_folder_is_refused(tmp_path):
    inside, done = threading.Event(), threading.Event()

    def hold(status):
        inside.set()
        done.wait(10)
        raise Interrupt

    def first():
        with pytest.raises(Interrupt):
            train(CONFIG, tmp_path, device="cpu", report=hold)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert inside.wait(10)
        with pytest.raises(pe.ConfigError, match="another process"):
            train(CONFIG, tmp_path, device="cpu")
    finally:
        done.set()
        thread.join()


def test_damaged_configuration_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(pe.ConfigError, match=r"config\.json: .*not valid JSON"):
        train(CONFIG, tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(pe.ConfigError, match="device"):
        resolve_device(device)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
def test_synthesized_average_agrees_with_a_directly_tracked_one(tmp_path, dtype, tolerance):
    """32 snapshots of (0.05, 0.10) against a third average at 0.075 of the same run."""
    config = dataclasses.replace(
        CONFIG,
        total_images=256 * 8,
        status_every=256 * 8,
        checkpoint_every=256 * 8,
        optim=OptimConfig(lr_ref=0.01, t_ref=80.0, rampup_images=64),
        network=dataclasses.replace(CONFIG.network, dropout=0.0),
        track=TrackConfig(snapshot_every=64, dtype=dtype, direct_sigma_rels=(0.075,)),
    )
    train(config, tmp_path, device="cpu")
    wanted = pe.synthesize(tmp_path / "direct", 0.075)
    made = pe.synthesize(tmp_path / "snapshots", 0.075)
    error = sum(float(((made[k] - wanted[k]).astype("f8") ** 2).sum()) for k in wanted)
    size = sum(float((wanted[k].astype("f8") ** 2).sum()) for k in wanted)
    assert (error / size) ** 0.5 < tolerance


def test_snapshots_without_a_checkpoint_are_not_discarded(uninterrupted, tmp_path):
    """Checkpoints are large and removed first; the averages of a whole run must not go with them."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = pe.SnapshotStore.open(tmp_path / "run" / "snapshots").records
    with pytest.raises(pe.SnapshotNotFoundError, match="there is no checkpoint to continue from"):
        train(CONFIG, tmp_path / "run", device="cpu")
    assert pe.SnapshotStore.open(tmp_path / "run" / "snapshots").records == before
