"""Scenarios of `swapped` on several ranks: `python swapped_ranks.py WORLD FOLDER SCENARIO...`."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from sharded_models import OPTIONS, drive, make_odd, train
from sharded_ranks import fork, scenario, sharded
from torch.nn.parallel import DistributedDataParallel

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.distributed.sharding import is_sharded

STEPS = 7
LENGTHS = {"tracked": {"sigma_rel": 0.04}, "other": {"sigma_rel": 0.07}, "now": {"sigma_rel": 0.07}}
LENGTHS["now"]["snapshot"] = True


def digest(model):
    """What the model holds, whole: the same on all ranks."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        found.update(name.removeprefix("module.").encode())
        found.update(whole.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def gather(model):
    """FSDP2: a forward without backward leaves the root's weights gathered, as evaluation does."""
    if hasattr(model, "unshard"):
        model.eval()
        model(torch.arange(7))
        model.train()


def look(model, tracker, **options):
    """Digests before, inside and after each swap, and which modules are in train mode after."""
    seen = {"before": digest(model)}
    for name, length in LENGTHS.items():
        gather(model)
        with tracker.swapped(model, **length, **options):
            seen[name] = digest(model)
            gather(model)
    seen["after"] = digest(model)
    seen["training"] = all(module.training for module in model.modules())
    return seen


def looked_at(model, folder, tracker_options=None, **options):
    model.train()
    with Tracker(model, folder, **OPTIONS, **(tracker_options or {})) as tracker:
        drive(model, tracker, STEPS)
        return look(model, tracker, **options)


@scenario
def one_process_of(folder):
    """What all others must see."""
    return looked_at(make_odd(), folder)


@scenario
def replicas(folder):
    """The first rank sends."""
    return looked_at(DistributedDataParallel(make_odd()), folder, broadcast=True)


@scenario
def split_averages(folder):
    """Each rank has rows of the averages, and needs them all."""
    return looked_at(DistributedDataParallel(make_odd()), folder, {"shard_averages": True})


@scenario
def sharded_model(folder):
    return looked_at(sharded(), folder)


@scenario
def first_rank_alone(folder):
    """Without `broadcast` the first rank may evaluate by itself; another is told what to do."""
    model = DistributedDataParallel(make_odd())
    told = []
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, STEPS)
        for sigma_rel in (0.04, 0.07):
            try:
                with tracker.swapped(sigma_rel=sigma_rel):
                    told.append("entered")
            except TrackingError as error:
                told.append(str(error))
    return told


@scenario
def nothing_to_send(folder):
    """Nothing is averaged yet: an error on all ranks, not a wait."""
    model = DistributedDataParallel(make_odd())
    with Tracker(model, folder, **OPTIONS) as tracker:
        try:
            with tracker.swapped(sigma_rel=0.04, broadcast=True):
                return "entered"
        except TrackingError as error:
            return str(error)


@scenario
def training_goes_on(folder):
    """FSDP2: the trained weights are the same with and without evaluation in between."""
    found = []
    for evaluates in (True, False):
        model = sharded()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        with track(optimizer, model, folder / str(evaluates), **OPTIONS) as tracker:
            for step in range(4):
                train(model, optimizer, 1, start=step)
                if evaluates:
                    with tracker.swapped(sigma_rel=0.04), torch.no_grad():
                        model(torch.arange(7))
        found.append(digest(model))
    return found


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    running = {fork(rank, world, folder, sys.argv[3:]) for rank in range(world)}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(status):  # the others would wait for it
            for other in running:
                os.kill(other, 9)
            sys.exit(1)
