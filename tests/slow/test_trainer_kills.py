"""kill -9 at random moments, each followed by the same command, changes no bit of the result."""

import os
import random
import signal
import subprocess
import sys
import time

import posthoc_ema as pe
from posthoc_ema.tensor_files import TensorFile
from reference_trainer.checkpoint import checkpoint_paths, read_checkpoint
from reference_trainer.config import NetworkConfig, OptimConfig, TrackConfig, TrainConfig
from reference_trainer.run_log import read_log

KILLS = 20
CONFIG = TrainConfig(
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        logvar_channels=16,
    ),
    optim=OptimConfig(lr_ref=0.01, t_ref=100.0, rampup_images=320),
    track=TrackConfig(snapshot_every=96, direct_sigma_rels=(0.075,)),
    batch_size=32,
    total_images=32 * 600,
    checkpoint_every=32 * 10,
    status_every=32 * 4,
)


def start(config_file, folder):
    command = [sys.executable, "-W", "error", "-m", "phema", "train", "--device", "cpu"]
    command += ["--config", str(config_file), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def contents(folder):
    """Bits of the last checkpoint and of every snapshot, and the status lines without timing."""
    checkpoint = read_checkpoint(checkpoint_paths(folder / "checkpoints")[0])
    found = {("checkpoint", k): v.tobytes() for k, v in checkpoint.tensors.items()}
    for place in ("snapshots", "direct"):
        store = pe.SnapshotStore.open(folder / place)
        assert list(store.verify()) == []
        for record in store.records:
            with TensorFile(store.path(record)) as file:
                for name in file.header.tensors:
                    found[place, record.time, str(record.profile), name] = file.read(name).tobytes()
    for line in read_log(folder / "log.jsonl"):
        if line["event"] == "status":
            assert ("log", line["nimg"]) not in found
            found["log", line["nimg"]] = (line["loss"], line["learning_rate"])
    return found


def reference_run(config_file, folder):
    """Run without interruption; seconds until training began, and seconds of training."""
    begin = time.perf_counter()
    process = start(config_file, folder)
    while process.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    startup = time.perf_counter() - begin
    assert process.wait() == 0
    return startup, time.perf_counter() - begin - startup


def kill_moment(moments, startup, training):
    """A fifth of the kills while starting, the others spread over a tenth of the training."""
    if moments.random() < 0.2:
        return startup * moments.uniform(0.5, 1.0)
    return startup + training / 10 * moments.random()


def test_run_killed_twenty_times_ends_bit_equal(tmp_path):
    config_file = tmp_path / "config.json"
    config_file.write_text(CONFIG.to_json())
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    startup, training = reference_run(config_file, reference)
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(config_file, killed)
        try:
            code = process.wait(timeout=kill_moment(moments, startup, training))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
            continue
        assert code == 0, "the trainer failed by itself"
        # On a machine that became faster the run may end before all kills: the rest hit a new one.
        assert contents(killed) == contents(reference)
        killed = tmp_path / f"killed-{kills}"
    assert start(config_file, killed).wait() == 0
    assert contents(killed) == contents(reference)
