"""Averages of raw checkpoints: coefficients, formats, times, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from posthoc_ema import (
    ConfigError,
    PowerProfile,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
    gamma_from_sigma_rel,
    power_step_weights,
)
from posthoc_ema.synthesis import (
    Output,
    checkpoint_recipe,
    choose_times,
    find_checkpoints,
    gap_message,
    plan_checkpoints,
    single_file,
    table_tensors,
    write_outputs,
)
from posthoc_ema.synthesis.checkpoint_files import open_checkpoint
from posthoc_ema.synthesis.checkpoint_names import TimedCheckpoint, time_of
from posthoc_ema.synthesis.checkpoints import power_target

from .stores import make_store

TIMES = (100, 200, 300, 400)


def state(time, dtype=torch.float32):
    """Weights at a time: tied, transposed, scalar, whole-number and statistics tensors."""
    generator = torch.Generator().manual_seed(time)
    weight = torch.randn(6, 4, generator=generator).to(dtype)
    return {
        "a.weight": weight,
        "a.bias": torch.randn(6, generator=generator).to(dtype),
        "t.weight": torch.randn(3, 5, generator=generator).to(dtype).t(),
        "scale": torch.tensor(float(time), dtype=dtype),
        "norm.running_var": torch.full((3,), float(time)),
        "norm.num_batches_tracked": torch.tensor(time),
    }


def expected(plan, target=0, states=state):
    x = plan.coefficients[:, target]
    values = {}
    for name, last in states(plan.time).items():
        if "norm" in name:
            values[name] = last
        else:
            terms = [c * states(i.time)[name].double() for c, i in zip(x, plan.inputs, strict=True)]
            values[name] = sum(terms)
    return values


def average(plan, path, dtype="float32", **options):
    with checkpoint_recipe(plan, **options) as recipe:
        layout = single_file(path.name, table_tensors(recipe.table, dtype))
        outputs = [Output(path.parent, layout, alone=True)]
        write_outputs(recipe, outputs)
    return safetensors.torch.load_file(path)


def plan_of(paths, *sigma_rels, times=None):
    found = find_checkpoints(paths, times)
    return plan_checkpoints(found, [power_target(s, found[-1].time) for s in sigma_rels])


def check(found, wanted):
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].double(), values.double(), rtol=1e-5, atol=1e-6)


# ---- coefficients


def test_power_coefficients_are_positive_and_differences_of_mean_tails(tmp_path):
    """The optimum under the random walk, by the closed form: mean tails over neighbouring gaps."""
    checkpoints = [TimedCheckpoint(t, tmp_path) for t in (100, 150, 300, 400)]
    plan = plan_checkpoints(checkpoints, [power_target(0.1, 400)])
    tau = np.linspace(0, 1, 200_001)
    tail = PowerProfile(400, 0.1).tail
    edges = [0, 100, 150, 300, 400]
    means = [np.trapezoid(tail(a + (b - a) * tau), tau) for a, b in itertools.pairwise(edges)]
    # theta(t_i) takes the step of the mean tail from the gap before t_i to the one after it; the mass
    # that the first gap lost goes to the first checkpoint, where the sum is one.
    wanted = -np.diff([1.0, *means[1:], 0.0])
    np.testing.assert_allclose(plan.coefficients[:, 0], wanted, atol=1e-9)
    assert (plan.coefficients > 0).all()
    assert plan.amplification[0] == pytest.approx(1)


def test_error_falls_with_the_number_of_checkpoints(tmp_path):
    errors = [
        plan_checkpoints(
            [TimedCheckpoint(1000 * (i + 1) // n, tmp_path) for i in range(n)],
            [power_target(0.1, 1000)],
        ).profile_error[0]
        for n in (4, 8, 16, 32)
    ]
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(errors))


def test_raw_is_the_last_checkpoint_exactly(tmp_path):
    for t in TIMES:
        safetensors.torch.save_file(
            state(t) | {"t.weight": torch.ones(1)}, tmp_path / f"{t}.safetensors"
        )
    plan = plan_of([tmp_path], 0.0)
    assert plan.coefficients[:, 0].tolist() == [0, 0, 0, 1]
    found = average(plan, tmp_path.parent / "raw.safetensors")
    assert torch.equal(found["a.weight"], state(400)["a.weight"])


def test_too_few_checkpoints_are_said(tmp_path):
    checkpoints = [TimedCheckpoint(t, tmp_path) for t in TIMES]
    plan = plan_checkpoints(checkpoints, [power_target(s, 400) for s in (0.02, 0.25)])
    message = gap_message(plan, 0.25)
    assert message.startswith("sigma_rel 0.02: the 4 checkpoints are too few")
    assert "0.25:" not in message.split("(")[0]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_predicted_error_is_that_of_a_random_walk(tmp_path, rng, sigma_rel):
    """The walk is known at every step, the checkpoints hold every fiftieth."""
    steps, size = 1000, 4000
    walk = np.cumsum(rng.normal(size=(steps, size)), axis=0)
    for t in range(50, steps + 1, 50):
        torch.save({"w": torch.from_numpy(walk[t - 1]).float()}, tmp_path / f"{t}.pt")
    plan = plan_of([tmp_path], sigma_rel)
    with checkpoint_recipe(plan) as recipe:
        predicted = recipe.provenance[0]["predicted_error"]
    gamma = float(gamma_from_sigma_rel(sigma_rel))
    wanted = power_step_weights(range(1, steps + 1), gamma) @ walk
    found = average(plan, tmp_path.parent / "out.safetensors")["w"].numpy()
    true = np.linalg.norm(found - wanted) / np.linalg.norm(walk[-1])
    assert true / 1.3 < predicted < 1.3 * true


def test_single_checkpoint_predicts_nothing(tmp_path):
    torch.save(state(100), tmp_path / "100.pt")
    plan = plan_of([tmp_path], 0.1, 0.0)
    with checkpoint_recipe(plan) as recipe:
        assert [p["predicted_error"] for p in recipe.provenance] == [None, 0.0]


# ---- formats


def save_safetensors(folder, time):
    tensors = {n: v.contiguous() for n, v in state(time).items()}
    safetensors.torch.save_file(tensors, folder / f"step_{time:06d}.safetensors")


def save_sharded(folder, time):
    inner = folder / f"checkpoint-{time}"
    inner.mkdir()
    tensors = {n: v.contiguous() for n, v in state(time).items()}
    names = list(tensors)
    weight_map = {}
    for k, part in enumerate((names[:2], names[2:]), start=1):
        file = f"model-{k:05d}-of-00002.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, inner / file)
        weight_map |= dict.fromkeys(part, file)
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"state": {}}, inner / "optimizer.pt")


def save_model_folder(folder, time):
    inner = folder / f"checkpoint-{time}"
    inner.mkdir()
    torch.save(state(time), inner / "pytorch_model.bin")


def save_pt(folder, time):
    torch.save(state(time), folder / f"{time}.pt")


def save_legacy_pt(folder, time):
    torch.save(state(time), folder / f"{time}.pth", _use_new_zipfile_serialization=False)


def save_nested(folder, time):
    wrapped = {f"module.{n}": v for n, v in state(time).items()}
    value = {"epoch": 3, "model": wrapped, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save(value, folder / f"epoch=3-step={time}.ckpt")


def save_dcp(folder, time):
    value = {"model": state(time), "optim": {"state": {"m": torch.ones(2)}}, "step": time}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=str(folder / f"step-{time}"), no_dist=True)


def save_hf(folder, time, **options):
    writer = HuggingFaceStorageWriter(str(folder / f"step-{time}"), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {n: v.contiguous() for n, v in state(time).items()}
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def save_hf_ranks(folder, time):
    save_hf(folder, time, save_distributed=True)


def save_hf_two_files(folder, time):
    names = list(state(time))
    save_hf(folder, time, fqn_to_index_mapping={n: 1 + i % 2 for i, n in enumerate(names)})


@pytest.mark.parametrize(
    "save",
    [save_safetensors, save_sharded, save_model_folder, save_pt, save_legacy_pt, save_nested,
     save_dcp, save_hf, save_hf_ranks, save_hf_two_files],
)  # fmt: skip
def test_average_of_each_format(tmp_path, save):
    folder = tmp_path / "run"
    folder.mkdir()
    for time in TIMES:
        save(folder, time)
    plan = plan_of([folder], 0.15)
    assert [c.time for c in plan.inputs] == list(TIMES)
    check(average(plan, tmp_path / "out.safetensors"), expected(plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_averaged_in_float32_and_come_back(tmp_path, dtype):
    def states(time):
        return {"w": state(time, dtype)["t.weight"]}

    for time in TIMES:
        torch.save(states(time), tmp_path / f"{time}.pt")
    plan = plan_of([tmp_path], 0.15)
    check(average(plan, tmp_path / "out.safetensors"), expected(plan, states=states))
    own = average(plan, tmp_path / "own.safetensors", dtype="model")
    assert own["w"].dtype == dtype


def test_tied_tensors_are_averaged_once_and_written_under_both_names(tmp_path):
    for time in TIMES:
        weight = state(time)["a.weight"]
        torch.save({"e.weight": weight, "head.weight": weight}, tmp_path / f"{time}.pt")
    plan = plan_of([tmp_path], 0.15)
    with checkpoint_recipe(plan) as recipe:
        assert recipe.table.aliases == {"head.weight": "e.weight"}
    found = average(plan, tmp_path / "out.safetensors")
    assert torch.equal(found["e.weight"], found["head.weight"])


def test_names_may_be_copied_on_request(tmp_path):
    for time in TIMES:
        torch.save(state(time), tmp_path / f"{time}.pt")
    plan = plan_of([tmp_path], 0.15)
    found = average(plan, tmp_path / "out.safetensors", copied=["a.*", "norm.*"])
    assert torch.equal(found["a.weight"], state(400)["a.weight"])
    assert not torch.equal(found["scale"], state(400)["scale"])


def test_override_gives_some_tensors_another_length(tmp_path):
    for time in TIMES:
        torch.save(state(time), tmp_path / f"{time}.pt")
    found = find_checkpoints([tmp_path])
    targets = [power_target(0.1, 400), power_target(0.2, 400)]
    plain = plan_checkpoints(found, targets)
    plan = plan_checkpoints(found, targets[:1], overrides=[("a.*", 0.2)])
    result = average(plan, tmp_path / "out.safetensors")
    np.testing.assert_allclose(result["a.weight"], expected(plain, 1)["a.weight"], atol=1e-6)
    np.testing.assert_allclose(result["t.weight"], expected(plain, 0)["t.weight"], atol=1e-6)
    lost = plan_checkpoints(found, targets[:1], overrides=[("no.*", 0.2)])
    with pytest.raises(ConfigError, match="matches none"), checkpoint_recipe(lost):
        pass


def test_state_dict_under_an_unusual_key_is_named(tmp_path):
    for time in TIMES:
        torch.save({"ema": {"net": state(time)}, "lr": 0.1}, tmp_path / f"{time}.pt")
    plan = plan_of([tmp_path], 0.15)
    with pytest.raises(ConfigError, match=r"holds no state_dict.*keys are ema, lr.*--key"):
        average(plan, tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="has no 'x'"):
        average(plan, tmp_path / "out.safetensors", key="ema.x")
    check(average(plan, tmp_path / "out.safetensors", key="ema.net"), expected(plan))


def test_pieces_of_several_ranks_make_up_a_tensor(tmp_path):
    """FSDP shards rows, tensor parallelism columns; written here as each rank would."""
    whole = torch.arange(24.0).reshape(4, 6)
    for rank, (rows, columns) in enumerate([((0, 2), (0, 6)), ((2, 4), (0, 3)), ((2, 4), (3, 6))]):
        piece = whole[slice(*rows), slice(*columns)].contiguous()
        info = {"w": {"saved_offsets": [rows[0], columns[0]]}}
        safetensors.torch.save_file(
            {"w": piece},
            tmp_path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(info)},
        )
    with contextlib.ExitStack() as stack:
        found = open_checkpoint(tmp_path, stack).tensors["w"]
        np.testing.assert_array_equal(found.read(0, 24), whole.reshape(-1))
        np.testing.assert_array_equal(found.read(7, 20), whole.reshape(-1)[7:20])
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(SnapshotFormatError, match="files of some ranks are missing"),
    ):
        open_checkpoint(tmp_path, stack)


def test_hostile_metadata_of_a_dcp_folder_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with contextlib.ExitStack() as stack, pytest.raises(SnapshotFormatError):
        open_checkpoint(folder, stack)
    assert not canary.exists()


# ---- times


@pytest.mark.parametrize(
    ("path", "time"),
    [
        ("run/checkpoint-1000", 1000),
        ("run/checkpoint-1000/unet", 1000),
        ("run/checkpoint-1000/model.safetensors", 1000),
        ("step_000123.safetensors", 123),
        ("epoch=3-step=1200.ckpt", 1200),
        ("ema_0.9999_100000.pt", 100000),
        ("v2-100.fp16.safetensors", 100),
        ("100-bf16.pt", 100),
        ("100-ema-0.9999.pt", 100),
    ],
)  # fmt: skip
def test_time_is_the_last_number_of_the_name(tmp_path, path, time):
    from pathlib import Path

    assert time_of(Path(path)) == time


def test_name_without_a_number_needs_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    for name in ("a", "b"):
        torch.save(state(1), tmp_path / f"{name}.pt")
    paths = [Path("a.pt"), Path("b.pt")]
    with pytest.raises(ConfigError, match=r"a.pt: no number in its name.*--times"):
        find_checkpoints(paths)
    assert [c.time for c in find_checkpoints(paths, [200, 100])] == [100, 200]
    with pytest.raises(ConfigError, match="--times has 1 values for 2 checkpoints"):
        find_checkpoints(paths, [200])


def test_listing_says_times_and_paths(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("a", "b c"):
        torch.save(state(1), tmp_path / "x" / f"{name}.pt")
    listing = tmp_path / "list.txt"
    listing.write_text("# mine\n\n200 x/a.pt\n100 x/b c.pt\n")
    found = find_checkpoints([listing])
    assert [(c.time, c.path.name) for c in found] == [(100, "b c.pt"), (200, "a.pt")]
    listing.write_text("200 x/none.pt\n")
    with pytest.raises(SnapshotNotFoundError, match="line 1"):
        find_checkpoints([listing])
    listing.write_text("200 x/a.pt\nx/a.pt\n")
    with pytest.raises(SnapshotFormatError, match="line 2 is not `time path`"):
        find_checkpoints([listing])


def test_time_zero_is_left_out_and_equal_times_are_refused(tmp_path):
    for time in (0, 100, 200):
        torch.save(state(time), tmp_path / f"{time}.pt")
    assert [c.time for c in find_checkpoints([tmp_path])] == [100, 200]
    torch.save(state(100), tmp_path / "b-100.pt")
    with pytest.raises(ConfigError, match="are both of time 100"):
        find_checkpoints([tmp_path])


def test_folder_of_tracked_averages_is_recognised(tmp_path):
    make_store(tmp_path / "store")
    with pytest.raises(ConfigError, match="leave out --from-checkpoints"):
        find_checkpoints([tmp_path / "store"])


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(SnapshotNotFoundError, match="does not exist"):
        find_checkpoints([tmp_path / "no"])
    with pytest.raises(SnapshotNotFoundError, match="holds no checkpoints"):
        find_checkpoints([tmp_path])


def test_times_may_be_chosen(tmp_path):
    found = [TimedCheckpoint(t, tmp_path) for t in TIMES]

    def times(**options):
        left = choose_times(found, **{"at": None, "include": None, "exclude": ()} | options)
        return [c.time for c in left]

    assert times() == [100, 200, 300, 400]
    assert times(at=300) == [100, 200, 300]
    assert times(exclude=[200]) == [100, 300, 400]
    assert times(include=[200, 400]) == [200, 400]
    assert times(include=[200], at=300) == [200, 300]
    with pytest.raises(SnapshotNotFoundError, match="no checkpoint is of time 250"):
        times(at=250)
    with pytest.raises(SnapshotNotFoundError, match="is excluded"):
        times(at=300, exclude=[300])


# ---- mixtures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a.bias"), r"200.pt: tensor 'a.bias' is missing, .*400.pt has it"),
        (lambda s: s.update(more=torch.ones(1)), r"400.pt: tensor 'more' is missing"),
        (
            lambda s: s.update({"a.bias": torch.ones(7)}),
            r"200.pt: tensor 'a.bias' is float32 \(7,\), in .*400.pt it is float32 \(6,\)",
        ),
        (
            lambda s: s.update({"a.bias": torch.ones(6).half()}),
            r"200.pt: tensor 'a.bias' is float16 \(6,\)",
        ),
    ],
)
def test_checkpoints_of_two_models_are_refused_by_file_and_tensor(tmp_path, change, message):
    for time in TIMES:
        values = state(time)
        if time == 200:
            change(values)
        torch.save(values, tmp_path / f"{time}.pt")
    plan = plan_of([tmp_path], 0.15)
    with pytest.raises(SnapshotMismatchError, match=message):
        average(plan, tmp_path / "out.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage", b"\x80\x02}q\x00."])
def test_damaged_checkpoint_is_named(tmp_path, content):
    for time in TIMES:
        torch.save(state(time), tmp_path / f"{time}.pt")
    (tmp_path / "300.pt").write_bytes(content)
    plan = plan_of([tmp_path], 0.15)
    with pytest.raises((SnapshotFormatError, ConfigError), match=r"300\.pt"):
        average(plan, tmp_path / "out.safetensors")
