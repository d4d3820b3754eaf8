"""Runs scenarios of several ranks, as a program: `python sharded_ranks.py WORLD FOLDER SCENARIO...`.

The ranks are processes that are forked before anything is computed: one import of PyTorch serves all. All
scenarios of a call run in one process group (gloo), one after the other. What they find goes into
FOLDER/SCENARIO-RANK.json.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from sharded_models import CODECS, OPTIONS, drive, make_odd, set_weights, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from posthoc_ema import SnapshotStore
from posthoc_ema.errors import PhemaError
from posthoc_ema.torch import Tracker, track
from posthoc_ema.torch.distributed import rank_group, snapshots
from posthoc_ema.torch.state_files import load_state, remove_state, save_state, saved_states

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def sharded(mesh=None):
    """The odd model under FSDP2, in two groups: one for each dtype."""
    model = make_odd()
    for part in (model.low, model):
        fully_shard(part, **({} if mesh is None else {"mesh": mesh}))
    return model


def run(model, folder, **options):
    with Tracker(model, folder, **{**OPTIONS, **options}) as tracker:
        drive(model, tracker, 7)
        return tracker.num_snapshots


# ---- snapshots


@scenario
def fsdp_codecs(folder):
    """FSDP2, each codec; written in the background or not."""
    for codec in CODECS:
        run(sharded(), folder / codec, dtype=codec, background=codec != "float32")


@scenario
def hybrid(folder):
    """Replicas of shards: of each part one rank is the writer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = sharded(mesh)
    written = {}
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, 7)
        for name in ("large", "norm.running_mean"):
            written[name] = tracker._ranks.is_written_here(name)
    return written


@scenario
def two_dimensions(folder):
    """Tensor parallelism within FSDP2: rows cut twice (a strided shard), rows and columns, columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = make_odd()
    parallelize_module(model.narrow, mesh["tensor"], ColwiseParallel())
    for name, cut in (("large", 1), ("frozen.weight", 1)):
        owner = model.get_submodule(name.rpartition(".")[0])
        old = getattr(owner, name.rpartition(".")[2])
        new = nn.Parameter(distribute_tensor(old.detach(), mesh["tensor"], [Shard(cut)]))
        setattr(owner, name.rpartition(".")[2], new.requires_grad_(old.requires_grad))
    fully_shard(model.low, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    run(model, folder)
    placed = {name: str(p.placements) for name, p in model.named_parameters()}
    return {name: placed[name] for name in ("narrow.weight", "large", "frozen.weight")}


@scenario
def slices_of_a_mesh(folder):
    """Tensor parallelism in two replicas that know nothing of each other: still one store."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tensor"))["tensor"]
    model = make_odd()
    for owner in list(model.modules()):
        for name, p in list(owner.named_parameters(recurse=False)):
            if p.requires_grad and p.dim() == 2 and p is not model.embed.weight:
                setattr(owner, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(1)])))
    run(model, folder)


@scenario
def replicas(folder):
    """DistributedDataParallel: the first rank works, the others count."""
    model = DistributedDataParallel(make_odd())
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, 7)
        found = {
            "time": tracker.time,
            "snapshots": tracker.num_snapshots,
            "has_averages": bool(tracker.state_dict()["averages"]),
            "memory": tracker._averages is not None,
        }
        dist.barrier()
        found["times"] = tracker.store.times
        try:
            tracker.averages(0.04)
        except PhemaError as error:
            found["refused"] = str(error)
    return found


@scenario
def plain_replicas(folder):
    """A model without a wrapper, while a process group is up."""
    run(make_odd(), folder)


@scenario
def thinned(folder):
    """A budget of stored averages, all raw weights, and a clock of images."""
    model = sharded()
    options = {**OPTIONS, "every": 8, "keep": 4, "raw": "all", "clock": "images"}
    with Tracker(model, folder, samples_per_step=4, **options) as tracker:
        drive(model, tracker, 12)


@scenario
def split_replicas(folder):
    """Averages split over the ranks."""
    model = DistributedDataParallel(make_odd())
    with Tracker(model, folder, shard_averages=True, **OPTIONS) as tracker:
        drive(model, tracker, 7)
        held = sum(t.to_local().numel() for t in tracker.averages(0.04).values())
        whole = {n: t.full_tensor() for n, t in tracker.averages(0.04).items()}
    torch.save(whole, folder.with_suffix(".whole.pt"))
    return {"held": held}


# ---- training


@scenario
def training(folder):
    """Real steps under FSDP2, through the hook, with forward passes and checkpoints between."""
    model = sharded()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with track(optimizer, model, folder, **OPTIONS) as tracker:
        for step in range(8):
            train(model, optimizer, 1, start=step)
            with torch.no_grad():
                model(torch.tensor([1, 2, 3]))  # gathers the weights, and no backward follows
            gathered = not isinstance(model.narrow.weight, DTensor)
            dcp_state.get_state_dict(model, optimizer)  # counts as no step
        kind = type(tracker.averages(0.04)["narrow.weight"]).__name__
        records = tracker.snapshot()
        tracker.step()  # by hand, with the weights gathered
    return {"gathered": gathered, "kind": kind, "stored": [r.time for r in records]}


@scenario
def evaluating(folder):
    """Averages in the model for a while: the tracked one of now, and one from the store."""
    model = sharded()
    x = torch.tensor([1, 2, 3, 4])
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, 6)
        before = model.eval()(x)
        found = {}
        for name, sigma_rel in (("tracked", 0.04), ("stored", 0.1)):
            with tracker.swapped(sigma_rel=sigma_rel), torch.no_grad():
                found[name] = model(x).tolist()
        assert torch.equal(model(x), before)
        drive(model, tracker, 1, start=6)
    return found


# ---- resuming


@scenario
def interrupted(folder):
    """Seven steps; the state is saved after the fifth, in two ways."""
    model = sharded()
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, 5)
        state = tracker.state_dict()
        dcp.save({"tracker": state}, checkpoint_id=folder.parent / "dcp")
        save_state(folder / "state", state, {"five": 5}, session=tracker.session)
        drive(model, tracker, 2, start=5)


def resumed(model, folder, load):
    with Tracker(model, folder, resume=True, **OPTIONS) as tracker:
        load(tracker, model)
        drive(model, tracker, 7, start=5)
        return {"time": tracker.time, "steps": tracker.steps}


def load_dcp(tracker, model):
    state = {"tracker": tracker.state_dict()}
    dcp.load(state, checkpoint_id=tracker.folder.parent / "dcp")
    tracker.load_state_dict(state["tracker"])


def load_files(tracker, model):
    (saved,) = saved_states(tracker.folder / "state")
    assert saved.extra == {"five": 5}
    tracker.load_state_dict(load_state(saved, tracker._model.averaged()))


@scenario
def resumed_from_dcp(folder):
    return resumed(sharded(), folder, load_dcp)


@scenario
def resumed_from_files(folder):
    return resumed(sharded(), folder, load_files)


@scenario
def resumed_split(folder):
    """The state of a sharded model goes on in replicas that split the averages."""

    def load(tracker, model):
        (saved,) = saved_states(tracker.folder / "state")
        tracker.load_state_dict(load_state(saved, tracker._model.averaged()))

    with Tracker(make_odd(), folder, resume=True, shard_averages=True, **OPTIONS) as tracker:
        load(tracker, None)
        drive(tracker._model.module, tracker, 7, start=5)


@scenario
def replicas_by_dcp(folder):
    """The state of replicas, whole or split, through torch.distributed.checkpoint."""
    for split in (False, True):
        options = {**OPTIONS, "shard_averages": split}
        name = "split" if split else "whole"
        with Tracker(make_odd(), folder / name, **options) as tracker:
            drive(tracker._model.module, tracker, 5)
            dcp.save({"tracker": tracker.state_dict()}, checkpoint_id=folder / f"dcp-{name}")
            drive(tracker._model.module, tracker, 2, start=5)
        with Tracker(make_odd(), folder / name, resume=True, **options) as tracker:
            state = {"tracker": tracker.state_dict()}
            dcp.load(state, checkpoint_id=folder / f"dcp-{name}")
            tracker.load_state_dict(state["tracker"])
            drive(tracker._model.module, tracker, 7, start=5)


@scenario
def rewound(folder):
    """A tracker goes back to a state of its own; another one starts the run anew."""
    model = sharded()
    with Tracker(model, folder, **OPTIONS) as tracker:
        drive(model, tracker, 5)
        state = copy.deepcopy(tracker.state_dict())
        drive(model, tracker, 4, start=5)
        tracker.load_state_dict(state)
        drive(model, tracker, 2, start=5)
        times = tracker.store.times
    dist.barrier()
    with Tracker(model, folder, resume=True, **OPTIONS) as tracker:
        tracker.restart()
        drive(model, tracker, 7)
    return times


@scenario
def resumed_wrongly(folder):
    """The first rank alone saves a state that is split, and all ranks load it."""
    found = {}
    for kind, model, split in (("split", make_odd(), True), ("fsdp", sharded(), False)):
        options = {**OPTIONS, "shard_averages": split}
        with Tracker(model, folder / kind, **options) as tracker:
            drive(model, tracker, 2)
            if dist.get_rank() == 0:
                torch.save(tracker.state_dict(), folder / f"{kind}.pt")
            dist.barrier()
            state = torch.load(folder / f"{kind}.pt", weights_only=True)
            found[kind] = outcome(lambda t=tracker, s=state: t.load_state_dict(s))["told"]
    return found


# ---- when things go wrong


def outcome(action):
    start = time.time()
    try:
        action()
        told = None
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return {"told": told, "seconds": time.time() - start}


@scenario
def taken_folder(folder):
    """The first rank refuses a folder that holds a store; the others hear why, at once."""
    run(sharded(), folder)
    model = sharded()
    tracker = Tracker(model, folder, resume=True, **OPTIONS)
    return outcome(lambda: drive(model, tracker, 1))


@scenario
def one_rank_fails(folder):
    """One rank's tracker stops; the others stop at the next snapshot, training goes on everywhere."""
    model = sharded()
    options = {**OPTIONS, "on_error": "warn"}
    with Tracker(model, folder, **options) as tracker:
        drive(model, tracker, 4)
        if dist.get_rank() == 1:
            del model.narrow._parameters["bias"]
            model.narrow.bias = nn.Parameter(torch.zeros(4))
        for _ in range(8):
            tracker.step()
        tracker.flush()
        dist.barrier()
        return {"failure": tracker.failure, "times": tracker.store.times}


@scenario
def different_models(folder):
    model = sharded() if dist.get_rank() else nn.Sequential(sharded())
    tracker = Tracker(model, folder, **OPTIONS)
    return outcome(lambda: drive(model, tracker, 1))


@scenario
def different_times(folder):
    model = sharded()
    tracker = Tracker(model, folder, every=3 + dist.get_rank(), on_error="raise")
    return outcome(lambda: drive(model, tracker, 1))


@scenario
def pipeline(folder):
    """Each rank has a stage of its own."""
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"stage{rank}": nn.Linear(3, 2 + rank)})
    with Tracker(stage, folder, every=2, on_error="warn") as tracker:
        dist.barrier()  # the stages of a pipeline wait for each other
        for _ in range(4):
            tracker.step()
        tracker.flush()
        return {"failure": tracker.failure, "stored": tracker.num_snapshots}


@scenario
def replicas_of_several_models(folder):
    """Plain replicas track two models, and the first rank a third, alone: nothing is amiss."""
    models = [nn.Linear(3, 2), nn.Linear(2, 2)] + [nn.Linear(4, 4)] * (dist.get_rank() == 0)
    trackers = [Tracker(model, folder / str(i), every=2) for i, model in enumerate(models)]
    dist.barrier()
    for tracker in trackers:
        with tracker:
            for _ in range(4):
                tracker.step()
    return [tracker.failure for tracker in trackers]


@scenario
def different_batches(folder):
    """The last rank's second batch is shorter; in the second run its third one is longer by as much."""
    found = []
    for name, batches in (("less", (4, 3, 4, 4)), ("equal", (4, 3, 5, 4))):
        mine = batches if dist.get_rank() == dist.get_world_size() - 1 else (4, 4, 4, 4)
        every = 8 if name == "less" else 12
        with Tracker(sharded(), folder / name, every=every, clock="images") as tracker:
            for step, samples in enumerate(mine):
                tracker.advance(samples)
                drive(tracker._model.module, tracker, 1, start=step)
            tracker.flush()
            found.append(tracker.failure)
    return found


@scenario
def one_rank_takes_a_snapshot(folder):
    """The second rank comes late to `snapshot`, and then not at all: the first says so. Comes last."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("posthoc_ema").addHandler(handler)
    rank_group.PATIENCE_SECONDS, rank_group.ANSWER_SECONDS = 0.5, 2.0
    model = sharded()
    tracker = Tracker(model, folder, every=50, on_error="raise")
    drive(model, tracker, 2)
    time.sleep(1.0 * dist.get_rank())
    stored = len(tracker.snapshot())
    drive(model, tracker, 1, start=2)
    found = outcome(tracker.snapshot) if dist.get_rank() == 0 else {}
    dist.barrier()
    return {**found, "said": said, "stored": stored}


@scenario
def unwritable_parts(folder):
    """A rank that cannot write its parts loses the snapshot for all, and the next one is stored."""
    model = sharded()
    options = {**OPTIONS, "on_error": "warn"}
    with Tracker(model, folder, **options) as tracker:
        drive(model, tracker, 2)
        if dist.get_rank() == 1:
            original = snapshots._write_parts

            def broken(path, *arguments):
                path.parent.mkdir(exist_ok=True)
                path.write_text("in the way")
                original(path, *arguments)

            snapshots._write_parts = broken
        drive(model, tracker, 1, start=2)
        tracker.flush()
        dist.barrier()
        if dist.get_rank() == 1:
            snapshots._write_parts = original
        left = [path.name for path in folder.glob(".parts-*")]
        dist.barrier()
        drive(model, tracker, 4, start=3)
        tracker.flush()
        dist.barrier()
        return {"failure": tracker.failure, "times": tracker.store.times, "left": left}


@scenario
def absent_rank(folder):
    """Only the first rank makes a tracker of a sharded model. Comes last."""
    before, rank_group.MEETING_SECONDS = rank_group.MEETING_SECONDS, 2.0
    try:
        if dist.get_rank() == 0:
            model = sharded()
            tracker = Tracker(model, folder, **OPTIONS)
            return outcome(lambda: drive(model, tracker, 1))
    finally:
        rank_group.MEETING_SECONDS = before


@scenario
def killed(folder):
    """Goes on from its newest state, however often it is killed, up to step 30."""
    model = sharded()
    states = folder / "state"
    with Tracker(model, folder, resume=True, **{**OPTIONS, "every": 2}) as tracker:
        found = saved_states(states)
        if found:
            tracker.load_state_dict(load_state(found[-1], tracker._model.averaged()))
        else:
            tracker.restart()
        for step in range(tracker.time, 30):
            drive(model, tracker, 1, start=step)
            save_state(states, tracker.state_dict(), {}, session=tracker.session)
            if dist.get_rank() == 0:
                for old in saved_states(states)[:-2]:
                    remove_state(old)
    return [len(found), found[-1].time if found else 0]


@scenario
def memory(folder):
    """Averages in host memory by a thread, and bfloat16 ones, of shards."""
    run(sharded(), folder / "offloaded", device="cpu")
    with Tracker(sharded(), folder / "rounded", average_dtype="bfloat16", **OPTIONS) as tracker:
        drive(tracker._model.module, tracker, 6)
        whole = tracker.averages(0.15)["large"].full_tensor()
    return whole.double().sum().item()


@scenario
def destroyed_group(folder):
    """The program ends its process groups while the last snapshot is being written. Comes last."""
    model = sharded()
    tracker = Tracker(model, folder, **OPTIONS)
    drive(model, tracker, 6)
    dist.destroy_process_group()
    tracker.flush()
    return {"times": tracker.store.times}


@scenario
def dying_rank(folder):
    """A rank dies before a snapshot: the others are told at once. Comes last."""
    model = sharded()
    tracker = Tracker(model, folder, **OPTIONS)
    drive(model, tracker, 4)
    tracker.flush()
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    set_weights(model, 5)
    return outcome(lambda: (drive(model, tracker, 3, start=4), tracker.flush()))


# ---- the program


def main(rank, world, folder, names, attempt=0):
    torch.set_num_threads(1)
    logging.basicConfig(format="%(name)s: %(message)s")
    meeting = f"file://{folder}/meet-{world}-{names[0]}-{os.getppid()}-{attempt}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    for name in names:
        start = time.time()
        found = SCENARIOS[name](folder / name)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
        if rank == 0:
            print(f"{name}: {time.time() - start:.1f} s", flush=True)
        if dist.is_initialized() and name != "dying_rank":
            dist.barrier()


def fork(rank, *arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        main(rank, *arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(world, folder, names, attempt=0, fatal_step=None):
    """Run the ranks, or kill them all soon after a step; returns the highest exit code."""
    running = {fork(rank, world, folder, names, attempt) for rank in range(world)}
    if fatal_step is not None:
        while not any(s.time >= fatal_step for s in saved_states(folder / names[0] / "state")):
            time.sleep(0.005)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        for pid in running:
            os.kill(pid, signal.SIGKILL)
    codes = []
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] > 0:  # the others would wait for it
            for other in running:
                os.kill(other, signal.SIGKILL)
    return max(codes)


if __name__ == "__main__":
    world, folder, kills = int(sys.argv[1]), Path(sys.argv[2]), int(os.environ.get("KILLS", "0"))
    for attempt in range(kills):
        launch(world, folder, sys.argv[3:], attempt, fatal_step=3 + 4 * attempt)
        for store in folder.glob("*/manifest.json"):  # readable at any time
            problems = SnapshotStore.open(store.parent).verify()
            assert all("not listed in the manifest" in problem.what for problem in problems)
    sys.exit(launch(world, folder, sys.argv[3:], kills))
