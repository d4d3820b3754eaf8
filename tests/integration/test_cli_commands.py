"""What `ls`, `verify`, `synth` and `plot` do with sound stores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from posthoc_ema import SnapshotStore, plan_synthesis, synthesize


def rows_of(text):
    return [line.split() for line in text.splitlines()]


# ---- ls and verify


def test_ls_shows_run_model_and_every_time(phema, snapshots):
    lines = phema("ls", "snapshots").succeeded().splitlines()
    store = SnapshotStore.open(snapshots)
    assert lines[0] == f"snapshots: run {store.run_id}, time in steps"
    parameters = 24 * 24 + 24 + 2 * 24 + 24 * 24 + 24
    assert lines[1] == (
        f"6 averaged tensors, {parameters} parameters; 4 copied tensors, 1 tied names"
    )
    assert [line.split()[0] for line in lines[3:-1]] == [str(t) for t in range(4, 44, 4)]
    assert all(" 0.05, 0.1 " in line and " float32 " in line for line in lines[3:-1])
    assert ["yes" in line for line in lines[3:-1]] == [False] * 9 + [True]
    assert lines[-1].startswith("21 files, ")


def test_ls_as_json_holds_what_the_table_shows(phema, snapshots):
    value = json.loads(phema("ls", "snapshots", "--json").succeeded())
    store = SnapshotStore.open(snapshots)
    assert (value["folder"], value["run_id"], value["clock"]) == (
        "snapshots",
        store.run_id,
        "steps",
    )
    assert value["times"] == list(range(4, 44, 4))
    assert value["sigma_rels"] == [0.05, 0.1]
    assert [row["file"] for row in value["snapshots"]] == [r.file for r in store.records]
    assert sum(row["bytes"] for row in value["snapshots"]) == sum(
        path.stat().st_size for path in snapshots.glob("*.safetensors")
    )


def test_verify_says_that_all_is_good(phema, unchanged, snapshots):
    with unchanged():
        out = phema("verify", "snapshots").succeeded()
    assert out.startswith("snapshots: 21 files, ")
    assert out.endswith(": all good\n")
    value = json.loads(phema("verify", "snapshots", "--json").succeeded())
    assert (value["files"], value["problems"]) == (21, [])


def test_verify_as_json_names_each_problem(phema, snapshots):
    file = next(iter(sorted(snapshots.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-1])
    done = phema("verify", "snapshots", "--json")
    assert (done.code, done.err) == (1, "")
    (problem,) = json.loads(done.out)["problems"]
    assert problem["file"] == file.name
    assert "not a readable safetensors file" in problem["what"]


def test_verify_drop_takes_damaged_snapshots_out_and_the_store_goes_on(phema, snapshots):
    file = snapshots / "000000000020-sigma_rel-0.05.safetensors"
    file.write_bytes(b"")
    done = phema("verify", "snapshots", "--drop")
    assert done.code == 0
    assert "dropped 1 snapshots, 20 are left" in done.err
    assert not file.exists()
    phema("verify", "snapshots").succeeded()
    phema("synth", "snapshots", "--sigma-rel", "0.07").succeeded()


def test_verify_rebuild_brings_a_lost_manifest_back(phema, snapshots):
    manifest = snapshots / "manifest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()
    assert phema("verify", "snapshots", "--rebuild").code == 0
    after = json.loads(manifest.read_text())
    assert after["snapshots"] == before["snapshots"]
    assert after["run_id"] == before["run_id"]
    phema("synth", "snapshots", "--sigma-rel", "0.07").succeeded()


def test_verify_rebuild_also_takes_the_run_folder(phema, snapshots, tmp_path):
    (tmp_path / "run").mkdir()
    inner = snapshots.rename(tmp_path / "run" / "snapshots")
    (inner / "manifest.json").write_text("{")
    assert phema("verify", "run", "--rebuild").code == 0
    phema("verify", "run").succeeded()


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("synth", "--sigma-rel", "0.05")])
def test_the_run_folder_stands_for_the_snapshots_in_it(phema, snapshots, tmp_path, command):
    (tmp_path / "run").mkdir()
    snapshots.rename(tmp_path / "run" / "snapshots")
    assert "run/snapshots" in phema(command[0], "run", *command[1:]).succeeded()


# ---- synth


def test_synth_makes_a_file_that_loads_strictly_into_the_model(phema, snapshots, make_model):
    phema("synth", "snapshots", "--sigma-rel", "0.07", "--out", "mine.safetensors").succeeded()
    model = make_model()
    tensors = load_file("mine.safetensors")
    model.load_state_dict(tensors, strict=True)
    assert {n: t.dtype for n, t in tensors.items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert torch.isfinite(model(torch.randn(4, 24))).all()


def test_synth_of_raw_is_the_last_state_of_the_model_bit_for_bit(phema, snapshots, final_model):
    phema("synth", "snapshots", "--sigma-rel", "raw", "--out", "raw.safetensors").succeeded()
    tensors = load_file("raw.safetensors")
    for name, tensor in final_model.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def test_synth_of_a_tracked_length_is_the_stored_average(phema, snapshots):
    phema(
        "synth", "snapshots", "--sigma-rel", "0.1", "--at", 24, "--out", "a.safetensors"
    ).succeeded()
    made = load_file("a.safetensors")
    stored = load_file(snapshots / "000000000024-sigma_rel-0.1.safetensors")
    assert torch.allclose(made["first.weight"], stored["first.weight"], rtol=1e-6, atol=1e-9)
    assert torch.equal(made["norm.num_batches_tracked"], torch.tensor(24))


def test_synth_writes_many_lengths_into_a_folder_and_says_where(phema, snapshots, tmp_path):
    out = phema(
        "synth", "snapshots", "--sigma-rel", "raw,0.05,0.10,...,0.20", "--out", "deep/folder"
    ).succeeded()
    names = sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir())
    assert names == [
        "raw-at-40.safetensors",
        *(f"sigma_rel-{s}-at-40.safetensors" for s in (0.05, 0.1, 0.15, 0.2)),
    ]
    rows = rows_of(out)[1:-1]
    assert [row[0] for row in rows] == ["raw", "0.05", "0.1", "0.15", "0.2"]
    assert all(Path(row[-1]).exists() for row in rows)
    assert out.splitlines()[-1].startswith("at 40 steps, from 21 files (")
    expected = synthesize(str(snapshots), 0.15)
    np.testing.assert_allclose(
        load_file("deep/folder/sigma_rel-0.15-at-40.safetensors")["first.weight"].numpy(),
        expected["first.weight"],
        atol=1e-6,
    )


def test_synth_writes_into_the_current_folder_by_default(phema, snapshots, tmp_path):
    phema("synth", "snapshots", "--sigma-rel", "0.07").succeeded()
    assert (tmp_path / "sigma_rel-0.07-at-40.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_synth_converts_averages_and_leaves_buffers_alone(phema, snapshots, make_model, dtype):
    path = "a.safetensors"
    phema("synth", "snapshots", "--sigma-rel", "0.07", "--dtype", dtype, "--out", path).succeeded()
    tensors = load_file(path)
    wanted = getattr(torch, dtype)
    assert {tensors[n].dtype for n in ("first.weight", "last.weight", "norm.weight")} == {wanted}
    assert tensors["norm.num_batches_tracked"].dtype == torch.int64
    assert tensors["norm.running_mean"].dtype == torch.float32
    make_model().load_state_dict(tensors, strict=True)


def test_synth_as_json_holds_what_the_table_shows(phema, snapshots):
    command = ("synth", "snapshots", "--sigma-rel", "raw,0.05,0.07", "--overwrite")
    table = rows_of(phema(*command).succeeded())
    value = json.loads(phema(*command, "--json").succeeded())
    assert (value["time"], value["clock"], value["inputs"]) == (40, "steps", 21)
    assert [r["file"] for r in value["results"]] == [row[-1] for row in table[1:4]]
    assert [r["sigma_rel"] for r in value["results"]] == [None, 0.05, 0.07]
    assert [r["raw"] for r in value["results"]] == [True, False, False]
    for result, row in zip(value["results"], table[1:4], strict=True):
        assert f"{result['predicted_error']:.1e}" == row[1]
        assert f"{result['profile_error']:.1e}" == row[2]
        assert f"{result['amplification']:.1f}" == row[3]


def test_synth_writes_its_provenance_into_the_file(phema, snapshots):
    phema(
        "synth", "snapshots", "--sigma-rel", "0.07", "--at", 20, "--out", "a.safetensors"
    ).succeeded()
    with safe_open("a.safetensors", "pt") as file:
        own = json.loads(file.metadata()["posthoc_ema"])
    plan = plan_synthesis(SnapshotStore.open(snapshots), [0.07], at=20)
    assert (own["kind"], own["sigma_rel"], own["time"], own["clock"]) == (
        "synthesized", 0.07, 20, "steps",
    )  # fmt: skip
    coefficients = [row["coefficient"] for row in own["inputs"]]
    assert coefficients == plan.coefficients[:, 0].tolist()
    assert math.isclose(sum(coefficients), 1, rel_tol=1e-12)
    assert max(row["time"] for row in own["inputs"]) == 20


@pytest.mark.parametrize("norm", ["random-walk", "density", "published"])
def test_synth_takes_each_norm(phema, snapshots, norm):
    value = json.loads(
        phema("synth", "snapshots", "--sigma-rel", "0.07", "--norm", norm, "--json").succeeded()
    )
    assert value["norm"] == norm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--norm", "l2"), "norm must be one of random-walk, density, published, got 'l2'."),
        (("--dtype", "f16"), "dtype must be model, float32, float16 or bfloat16, got 'f16'."),
        (("--sigma-rel", "raw", "--at", "20"), "holds the raw weights only at 40, not at 20"),
        (
            ("--sigma-rel", "0.1,0.2", "--out", "a.safetensors"),
            "is one file, but 2 lengths are asked for",
        ),
    ],
)
def test_synth_refuses_what_it_does_not_know(phema, unchanged, snapshots, options, message):
    with unchanged():
        phema("synth", "snapshots", "--sigma-rel", "0.07", "--out", "out", *options).refused(
            message
        )


def test_synth_says_when_a_length_is_out_of_reach_and_makes_it_anyway(phema, snapshots):
    done = phema("synth", "snapshots", "--sigma-rel", "0.005,0.07")
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert "sigma_rel 0.005: the error is above 25% of what averaging does." in done.err
    assert "0.07" not in done.err


def test_synth_overwrites_when_asked(phema, snapshots, tmp_path):
    (tmp_path / "a.safetensors").write_text("old")
    phema(
        "synth", "snapshots", "--sigma-rel", "0.07", "--out", "a.safetensors", "--overwrite"
    ).succeeded()
    assert "first.weight" in load_file("a.safetensors")


# ---- plot


def picture(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[::-1], float(np.mean(pixels < 250))


def test_plot_draws_the_profiles_of_a_store(phema, snapshots):
    assert phema("plot", "snapshots", "--out", "new/p.png").succeeded() == "new/p.png\n"
    size, ink = picture("new/p.png")
    assert size == (1152, 1632)
    assert 0.01 < ink < 0.3
    phema("plot", "snapshots", "--sigma-rel", "0.1", "--at", 20, "--out", "new/q.png").succeeded()
    assert Path("new/q.png").read_bytes() != Path("new/p.png").read_bytes()


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_plot_writes_the_format_of_the_ending(phema, snapshots, ending, start):
    phema("plot", "snapshots", "--out", f"p.{ending}").succeeded()
    assert Path(f"p.{ending}").read_bytes().startswith(start)


def sweep(phema, out, code="$PHEMA_SIGMA_REL", *options):
    metric = f"echo {code} {{weights}} | cut -d' ' -f1"
    done = phema(
        *("sweep", "snapshots", "--sigma-rel", "0.05,0.1,...,0.25", "--no-raw"),
        *("--metric", metric, "--out", out, *options),
    )
    assert done.code == 0, done


def test_plot_draws_one_or_several_sweeps(phema, snapshots):
    sweep(phema, "a")
    sweep(phema, "b", "0.1")
    phema("plot", "a", "--out", "a.png", "--ylabel", "what", "--title", "why").succeeded()
    phema(
        "plot", "a/sweep.json", "--out", "json.png", "--ylabel", "what", "--title", "why"
    ).succeeded()
    phema("plot", "a", "b", "--out", "both.png").succeeded()
    assert Path("a.png").read_bytes() == Path("json.png").read_bytes()
    for name in ("a.png", "both.png"):
        size, ink = picture(name)
        assert size == (1152, 704)
        assert 0.01 < ink < 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("snapshots", "--out", "p.jpg"), "--out must end in .png, .pdf or .svg, got p.jpg."),
        (("snapshots", "missing", "--out", "p.png"), "missing does not exist. Check the path."),
        (
            ("a", "snapshots", "--out", "p.png"),
            "snapshots holds no sweep.json; several sources must",
        ),
        (("a", "up", "--out", "p.png"), "the sweeps measured different things"),
        (("broken.json", "--out", "p.png"), "broken.json: not a sweep of this version"),
        (("snapshots", "--sigma-rel", "raw", "--out", "p.png"), "at least one length besides raw"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(phema, unchanged, snapshots, words, message):
    sweep(phema, "a")
    sweep(phema, "up", "$PHEMA_SIGMA_REL", "--higher-is-better")
    Path("broken.json").write_text("{}")
    with unchanged():
        phema("plot", *words).refused(message)
