"""Folders that two ranks wrote with torch.distributed.checkpoint, averaged without a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

RANK = """
import os
import sys, warnings
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for step in (100, 200, 300):
    def whole(*shape):
        return torch.arange(float(torch.Size(shape).numel())).reshape(shape) * step
    # Uneven rows, columns, a tensor that every rank holds whole, one that is smaller than the mesh.
    state = {
        "rows": distribute_tensor(whole(5, 4), mesh, [Shard(0)]),
        "columns": distribute_tensor(whole(4, 6), mesh, [Shard(1)]),
        "whole": distribute_tensor(whole(3), mesh, [Replicate()]),
        "half": distribute_tensor(whole(4, 2).bfloat16(), mesh, [Shard(0)]),
        "single": distribute_tensor(whole(1, 3), mesh, [Shard(0)]),
    }
    value = {"model": state, "optim": {"m": torch.ones(2)}, "step": step}
    dcp.save(value, checkpoint_id=f"{folder}/dcp/step-{step}")
    writer = HuggingFaceStorageWriter(f"{folder}/hf/step-{step}", save_distributed=True)
    dcp.save(state, storage_writer=writer)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # all is written; a thread of gloo that ends late would abort the interpreter's exit
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of 100, 200, 300 steps in both formats."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("kind", ["dcp", "hf"])
def test_checkpoints_of_two_ranks_are_averaged(written, phema, kind):
    value = json.loads(
        phema(
            *("synth", written / kind, "--from-checkpoints", "--sigma-rel", "0.2"),
            *("--out", "a.safetensors", "--dtype", "float32", "--json"),
        ).succeeded()
    )
    assert (value["time"], value["inputs"]) == (300, 3)
    found = load_file("a.safetensors")
    shapes = {"rows": (5, 4), "columns": (4, 6), "whole": (3,), "half": (4, 2), "single": (1, 3)}
    assert {name: tuple(v.shape) for name, v in found.items()} == shapes
    factor = found["rows"].reshape(-1)[1].item()  # the average of 100, 200, 300
    assert 100 < factor < 300
    for name, shape in shapes.items():
        expected = np.arange(np.prod(shape)).reshape(shape) * factor
        np.testing.assert_allclose(found[name], expected, rtol=1e-2 if name == "half" else 1e-6)
