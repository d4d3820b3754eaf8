"""A process that drives one kind of tracker, task after task: see `trackers.Workers`.

python -m tests.contract.worker KIND [MEETING_FILE] < requests
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .outcomes import Task
from .trackers import InProcess


def replicated(model):
    return DistributedDataParallel(model)


def sharded(model):
    """FSDP2 over all ranks, but for what it cannot cut: that stays whole on every rank.

    It refuses 0-dim parameters, and the parts that it makes of empty ones are not those that their
    placements say.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.dim() == 0 or p.numel() == 0}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


KINDS = {
    "triton": InProcess({"kernel": "triton"}),
    "process-group": InProcess(in_memory="first"),
    "ddp": InProcess(wrap=replicated, in_memory="first"),
    "ddp-split": InProcess({"shard_averages": True}, wrap=replicated, in_memory="none"),
    "fsdp": InProcess(wrap=sharded),
}


def main():
    kind, *meeting = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to standard error
    if meeting:
        store = dist.FileStore(meeting[0], ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        try:
            outcome = KINDS[kind].drive(Task.from_json(request["task"]), folder)
            if rank == 0:
                outcome.save(folder.with_name(folder.name + "-outcome"))
            answer = "done"
        except Exception:
            traceback.print_exc()
            answer = f"rank {rank}: {traceback.format_exc().splitlines()[-1]}"
        print(answer, file=answers, flush=True)
    if meeting:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
