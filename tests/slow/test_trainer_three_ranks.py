"""A run of three processes that is resumed ends bit for bit like one that was not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from reference_trainer.checkpoint import checkpoint_paths, read_checkpoint
from reference_trainer.config import NetworkConfig, OptimConfig, TrackConfig, TrainConfig

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
        dropout=0.1,
    ),
    optim=OptimConfig(lr_ref=0.01, t_ref=100.0, rampup_images=24),
    track=TrackConfig(snapshot_every=48),
    batch_size=12,
    total_images=96,
    checkpoint_every=48,
    status_every=48,
)


def train_by_three(folder):
    """`torchrun --nproc-per-node 3 ... phema train`."""
    file = folder.with_suffix(".json")
    file.write_text(CONFIG.to_json())
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = ("-m", "phema", "train", "--device", "cpu", "--config", file, "--out", folder)
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "3", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_run_of_three_processes_resumes_bit_equal(tmp_path):
    """Three, because sums of two do not depend on their order."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_by_three(whole)
    shutil.copytree(whole, resumed)
    checkpoint_paths(resumed / "checkpoints")[0].unlink()
    assert "continuing at 48 of 96 images" in train_by_three(resumed)
    a, b = (read_checkpoint(checkpoint_paths(f / "checkpoints")[0]) for f in (whole, resumed))
    assert a.nimg == b.nimg == 96
    assert a.tensors.keys() == b.tensors.keys()
    assert [n for n in a.tensors if a.tensors[n].tobytes() != b.tensors[n].tobytes()] == []
