"""The tracker's own state in files: exact, complete or absent, readable on any number of ranks."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from posthoc_ema.errors import (
    ConfigError,
    PhemaError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotWriteError,
)
from posthoc_ema.torch import Tracker, state_files
from posthoc_ema.torch.distributed.sharding import Layout
from posthoc_ema.torch.state_files import (
    host_copy,
    load_state,
    remove_state,
    save_state,
    saved_states,
)

SHAPES = {"w": (7, 5), "b": (3,), "gain": (), "empty": (0, 4), "big": (600, 700)}
_KEY = "posthoc_ema_state"


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    averages = {
        name: torch.randn((2, *shape), generator=generator) for name, shape in SHAPES.items()
    }
    return {
        "schema": 1,
        "run_id": "abc",
        "clock": "steps",
        "time": 12,
        "sigma_rels": [0.05, 0.1],
        "failed": False,
        "averages": averages,
    }


def targets(shapes=SHAPES):
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def save_ranks(folder, state, world, *, session="a1", cut=0):
    """Files as `world` ranks would write them: rank by rank, each with its rows (or columns)."""
    time = state["time"]
    for rank in range(world):
        scalars = {key: value for key, value in state.items() if key != "averages"}
        pieces, offsets, digests = {}, {}, {}
        for name, stack in state["averages"].items():
            whole = stack.numpy()
            axis = min(cut, whole.ndim - 2) + 1
            if whole.ndim == 1:
                box, at = (slice(0, None) if rank == 0 else slice(0, 0),), [0]
            else:
                step = -(-whole.shape[axis] // world)
                start = min(rank * step, whole.shape[axis])
                box = (slice(None),) * axis + (slice(start, start + step),)
                at = [0] * whole.ndim
                at[axis] = start
            piece = np.ascontiguousarray(whole[box])
            if piece.size:
                pieces[name], offsets[name] = piece, at
                flat = piece.reshape(-1)
                blocks = range(0, flat.size, state_files._BLOCK)
                digests[name] = "".join(
                    state_files.checksum(flat[b : b + state_files._BLOCK].tobytes()) for b in blocks
                )
        own = {
            "schema": 1,
            "rank": rank,
            "world": world,
            "session": session,
            "state": scalars,
            "extra": {"rank": rank},
            "shapes": {name: list(t.shape) for name, t in state["averages"].items()},
            "offsets": offsets,
            "xxh3": digests,
        }
        name = f"{time:012d}-{session}-{rank:05d}-of-{world:05d}.safetensors"
        save_file(pieces, folder / name, metadata={_KEY: json.dumps(own)})


def rows(shape, rank, world):
    """The layout of `rank` when every tensor is cut by rows."""
    if not shape:
        return Layout((), (), ())
    step = -(-shape[0] // world)
    start = min(rank * step, shape[0])
    local = (min(step, shape[0] - start), *shape[1:])
    return Layout(shape, (start, *[0] * (len(shape) - 1)), local)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_state_is_read_back_bit_by_bit(tmp_path, state):
    state["averages"]["w"][0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    save_state(tmp_path, state, {"steps": {"0": 12}})
    (saved,) = saved_states(tmp_path)
    assert (saved.time, saved.extra) == (12, {"steps": {"0": 12}})
    loaded = load_state(saved, targets())
    assert {k: v for k, v in loaded.items() if k != "averages"} == {
        k: v for k, v in state.items() if k != "averages"
    }
    for name, tensor in state["averages"].items():
        assert torch.equal(loaded["averages"][name].view(torch.int32), tensor.view(torch.int32))


def test_state_of_a_tracker_continues_the_run(tmp_path):
    def train(tracker, model, steps):
        for _ in range(steps):
            with torch.no_grad():
                model.weight.add_(0.1)
            tracker.step()

    model = nn.Linear(3, 2)
    with Tracker(model, tmp_path / "a", every=None, on_error="raise") as tracker:
        train(tracker, model, 3)
        save_state(tmp_path / "state", tracker.state_dict(), {})
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(tracker, model, 2)
        expected = {s: dict(tracker.averages(s)) for s in tracker.sigma_rels}
    model.load_state_dict(weights)
    with Tracker(model, tmp_path / "a", every=None, resume=True, on_error="raise") as tracker:
        (saved,) = saved_states(tmp_path / "state")
        tracker.load_state_dict(load_state(saved, dict(model.named_parameters())))
        train(tracker, model, 2)
        for sigma_rel in tracker.sigma_rels:
            same(tracker.averages(sigma_rel), expected[sigma_rel])


def test_state_without_averages_is_saved(tmp_path, state):
    save_state(tmp_path, {**state, "averages": {}}, {})
    assert load_state(saved_states(tmp_path)[0], targets())["averages"] == {}


def test_states_are_listed_by_time_and_removed(tmp_path, state):
    assert saved_states(tmp_path / "missing") == []
    for time in (30, 4, 1_000_000_000_000_000):
        save_state(tmp_path, {**state, "time": time}, {})
    (tmp_path / "notes.safetensors").write_text("not ours")
    found = saved_states(tmp_path)
    assert [s.time for s in found] == [4, 30, 1_000_000_000_000_000]
    remove_state(found[1])
    assert [s.time for s in saved_states(tmp_path)] == [4, 1_000_000_000_000_000]


@pytest.mark.parametrize(("written", "read"), [(4, 2), (4, 1), (1, 4), (2, 3), (3, 7)])
@pytest.mark.parametrize("cut", [0, 1])
def test_parts_of_any_number_of_ranks_are_put_together(tmp_path, state, written, read, cut):
    save_ranks(tmp_path, state, written, cut=cut)
    (saved,) = saved_states(tmp_path)
    assert saved.extra == {"rank": 0}
    for rank in range(read):
        layouts = {name: rows(shape, rank, read) for name, shape in SHAPES.items()}
        loaded = load_state(saved, layouts)["averages"]
        for name, layout in layouts.items():
            expected = state["averages"][name][(slice(None), *layout.box)]
            assert torch.equal(loaded[name], expected), (name, rank)


def test_a_reader_reads_the_blocks_that_it_needs(tmp_path, state, monkeypatch):
    save_state(tmp_path, state, {})
    read = []
    original = state_files.TensorFile.read_bytes

    def read_bytes(self, start, end):
        read.append(end - start)
        return original(self, start, end)

    monkeypatch.setattr(state_files.TensorFile, "read_bytes", read_bytes)
    layout = {name: rows(shape, 599, 600) for name, shape in SHAPES.items()}
    load_state(saved_states(tmp_path)[0], layout)
    total = sum(t.numel() * 4 for t in state["averages"].values())
    assert sum(read) < 0.7 * total  # two of the four blocks of the large tensor, none of the others


def test_a_state_counts_when_the_files_of_all_ranks_are_there(tmp_path, state):
    save_ranks(tmp_path, state, 3)
    saved_states(tmp_path)[0].paths[1].unlink()
    assert saved_states(tmp_path) == []


def test_files_of_two_starts_are_never_one_state(tmp_path, state):
    save_ranks(tmp_path, state, 2, session="a")
    save_ranks(tmp_path, state, 2, session="b")
    for saved, rank in zip(saved_states(tmp_path), (0, 1), strict=True):
        saved.paths[rank].unlink()
    assert saved_states(tmp_path) == []


def test_the_state_that_was_written_last_comes_last(tmp_path, state):
    for session in ("b", "a"):
        save_state(tmp_path, state, {"session": session}, session=session)
    newest = tmp_path / "000000000012-a-00000-of-00001.safetensors"
    os.utime(newest, ns=(2**62, 2**62))
    assert [s.session for s in saved_states(tmp_path)] == ["b", "a"]


def test_missing_part_is_an_error(tmp_path, state):
    save_ranks(tmp_path, state, 2)
    path = saved_states(tmp_path)[0].paths[1]
    tensors = load_file(path)
    del tensors["w"]
    own = _own(path)
    del own["offsets"]["w"], own["xxh3"]["w"]
    save_file(tensors, path, metadata={_KEY: json.dumps(own)})
    with pytest.raises(SnapshotFormatError, match=r"parts of average 'w' are in no file"):
        load_state(saved_states(tmp_path)[0], targets())


def _own(path):
    return json.loads(state_files.read_header(path).metadata[_KEY])


def _overlapping(own):
    own["offsets"]["w"][1] -= 1


def _outside(own):
    own["offsets"]["w"][1] += 1


CHANGES = {
    "overlap": _overlapping,
    "outside": _outside,
    "newer": lambda own: own.update(schema=2),
    "other time": lambda own: own["state"].update(time=13),
    "other state": lambda own: own["state"].update(run_id="x"),
    "other rank": lambda own: own.update(rank=0),
    "no extra": lambda own: own.pop("extra"),
    "extra is a list": lambda own: own.update(extra=[]),
    "negative": lambda own: own["offsets"].update(w=[0, -1, 0]),
    "giant": lambda own: own["shapes"].update(w=[2, 2**62, 2**62]),
    "shapes are a list": lambda own: own.update(shapes=[]),
    "digests are numbers": lambda own: own["xxh3"].update(w=16),
    "unnamed": lambda own: own["shapes"].pop("w"),
    "other shape": lambda own: own["shapes"].update(w=[2, 8, 5]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_files_are_refused_by_name(tmp_path, state, change):
    save_ranks(tmp_path, state, 2)
    path = saved_states(tmp_path)[0].paths[1]
    own = _own(path)
    CHANGES[change](own)
    save_file(load_file(path), path, metadata={_KEY: json.dumps(own)})
    with pytest.raises(PhemaError, match=path.name):
        load_state(saved_states(tmp_path)[0], targets())


@pytest.mark.parametrize("position", [3, 200, -5])
def test_damage_anywhere_is_found(tmp_path, state, position):
    save_state(tmp_path, state, {})
    (saved,) = saved_states(tmp_path)
    data = bytearray(saved.paths[0].read_bytes())
    data[position] ^= 0x10
    saved.paths[0].write_bytes(data)
    with pytest.raises(SnapshotFormatError, match=saved.paths[0].name):
        load_state(saved, targets())


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_files_that_were_cut_short_are_refused(tmp_path, state, size):
    save_state(tmp_path, state, {})
    (saved,) = saved_states(tmp_path)
    saved.paths[0].write_bytes(saved.paths[0].read_bytes()[:size])
    with pytest.raises(SnapshotFormatError, match=saved.paths[0].name):
        load_state(saved, targets())
    with pytest.raises(SnapshotFormatError, match=saved.paths[0].name):
        _ = saved.extra


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({**SHAPES, "w": (7, 6)}, r"'w' has shape \(7, 5\), the model needs \(7, 6\)"),
        ({**SHAPES, "new": (1,)}, r"'new' has shape None, the model needs \(1,\)"),
        (
            {k: v for k, v in SHAPES.items() if k != "b"},
            r"'b' has shape \(3,\), the model needs None",
        ),
    ],
)
def test_the_state_of_another_model_is_refused(tmp_path, state, shapes, words):
    save_state(tmp_path, state, {})
    with pytest.raises(SnapshotMismatchError, match=words):
        load_state(saved_states(tmp_path)[0], targets(shapes))


@pytest.mark.parametrize("extra", [{"a": {1, 2}}, {"a": float("nan")}])
def test_values_that_json_lacks_are_refused(tmp_path, state, extra):
    with pytest.raises(ConfigError, match="saved as JSON"):
        save_state(tmp_path, state, extra)
    assert saved_states(tmp_path) == []


def test_a_session_that_is_no_plain_word_is_refused(tmp_path, state):
    with pytest.raises(ConfigError, match="session must be letters"):
        save_state(tmp_path, state, {}, session="../x")


def test_a_folder_that_cannot_be_written_is_a_write_error(tmp_path, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotWriteError, match="file"):
        save_state(tmp_path / "file", state, {})


def test_what_a_killed_writer_left_goes_with_the_next_state(tmp_path, state):
    mine = tmp_path / ".tmp-000000000004-00000-of-00001.safetensors-0123abcd"
    other = tmp_path / ".tmp-000000000004-00001-of-00002.safetensors-0123abcd"
    for path in (mine, other):
        path.write_bytes(b"half")
    save_state(tmp_path, state, {})
    assert not mine.exists()
    assert other.exists()


def test_a_host_copy_keeps_the_values_of_its_time(tmp_path, state):
    copy = host_copy(state)
    before = {name: tensor.clone() for name, tensor in state["averages"].items()}
    for tensor in state["averages"].values():
        tensor.zero_()
    save_state(tmp_path, copy, {})
    same(load_state(saved_states(tmp_path)[0], targets())["averages"], before)
