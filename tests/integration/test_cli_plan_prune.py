"""`phema plan` before training, and `phema prune` on real stores of every codec."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from posthoc_ema import SnapshotStore, plan_synthesis, synthesize
from posthoc_ema.codecs import CODECS
from posthoc_ema.pruning import plan_pruning, prune
from posthoc_ema.torch import track

PLAN = ("plan", "--steps", "1000", "--parameters", "1e6")


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory):
    """Stores of one run of 40 times x (0.05, 0.10), one for each codec."""
    folder = tmp_path_factory.mktemp("long_runs")
    torch.set_num_threads(1)
    for codec in CODECS:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        wanted = torch.randn(64, 64)
        options = {"every": 16, "dtype": codec, "sigma_rels": (0.05, 0.10), "on_error": "raise"}
        with track(optimizer, model, folder / codec, **options):
            for _ in range(640):
                x = torch.randn(16, 64)
                optimizer.zero_grad()
                (model(x) - x @ wanted + torch.randn(16, 64)).square().mean().backward()
                optimizer.step()
    return folder


@pytest.fixture
def long_run(long_runs, tmp_path):
    return shutil.copytree(long_runs / "float32", tmp_path / "run")


# ---- plan


def test_plan_says_what_snapshots_cost_and_give(phema):
    done = phema(*PLAN, "--every", "20", "--dtype", "float16", "--sigma-rels", "0.05,0.1")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0] == (
        "a snapshot every 20 of 1000: 50 times x (0.05, 0.1) = 100 files, stored as float16"
    )
    assert lines[1] == "disk 200.0 MB, memory of the tracker 8.0 MB"
    assert [line.split()[0] for line in lines[3:-1]] == [
        *("0.02", "0.03", "0.05", "0.07", "0.1", "0.13", "0.16", "0.2", "0.25")
    ]
    assert "errors assume a drift of 0.4" in done.err
    assert done.err.count("\n") == 1


def test_plan_as_json_holds_what_it_shows(phema):
    value = json.loads(phema(*PLAN, "--drift", "0.5", "--json").succeeded())
    assert (value["every"], value["times"], value["files"]) == (15, 66, 132)
    assert (value["dtype"], value["drift"], value["tracker_bytes"]) == ("delta", 0.5, 8_000_000)
    assert value["worst_error"] == max(row["error"] for row in value["errors"])


def test_plan_finds_the_cheapest_for_an_error(phema):
    words = (*PLAN, "--drift", "0.3", "--range", "0.03,0.2", "--json")
    cheap = json.loads(phema(*words, "--error", "1e-3").succeeded())
    good = json.loads(phema(*words, "--error", "1e-4").succeeded())
    assert cheap["worst_error"] <= 1.05e-3  # at lengths between those that were searched, too
    assert good["worst_error"] <= 1.05e-4
    assert cheap["disk_bytes"] < good["disk_bytes"]
    fixed = json.loads(
        phema(
            *words, "--error", "1e-3", "--dtype", "float16", "--sigma-rels", "0.05,0.1"
        ).succeeded()
    )
    assert (fixed["dtype"], fixed["sigma_rels"]) == ("float16", [0.05, 0.1])
    assert fixed["disk_bytes"] >= cheap["disk_bytes"]


def test_plan_draws_a_picture(phema, tmp_path):
    phema(*PLAN, "--drift", "0.3", "--out", "new/plan.png").succeeded()
    assert (tmp_path / "new" / "plan.png").stat().st_size > 5000


def test_plan_like_an_earlier_run_predicts_what_that_run_has(phema, long_run):
    """The prediction before training, against what a synthesis of the run itself predicts."""
    words = ("plan", "--steps", 640, "--every", 16, "--dtype", "float32", "--like", long_run)
    words = (*words, "--sigma-rels", "0.05,0.10")
    value = json.loads(phema(*words, "--json").succeeded())
    assert value["parameters"] == 64 * 64 + 64
    planned = {row["sigma_rel"]: row["error"] for row in value["errors"]}
    plan = plan_synthesis(SnapshotStore.open(long_run), [0.02, 0.03, 0.2, 0.25])
    for sigma_rel, error in zip(plan.sigma_rels, plan.predicted_error, strict=True):
        assert planned[sigma_rel] == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--every", "2000"), "every must be 1 to the 1000 steps of the run, got 2000"),
        (("--sigma-rels", "raw"), "--sigma-rels are tracked lengths"),
        (("--sigma-rels", "0.4"), "sigma_rel must lie in (0, 0.2887], got 0.4"),
        (("--dtype", "int4"), "dtype must be one of float32, "),
        (("--range", "0.2,0.1"), "--range must be two rising lengths such as 0.03,0.20"),
        (("--range", "0.1,0.2,0.25"), "--range must be two rising lengths"),
        (("--range", "raw,0.2"), "--range must be two rising lengths"),
        (("--drift", "0"), "drift must be positive, got 0"),
        (("--error", "0.1", "--every", "10"), "leave out --every"),
        (("--error", "1e-9"), "no plan of up to 333 snapshots reaches an error of 1e-09"),
        (("--out", "plan.txt"), "--out must end in .png, .pdf or .svg"),
        (("--like", "nowhere"), "nowhere"),
        (("--like", "nowhere", "--drift", "1"), "leave out --drift"),
    ],
)
def test_plan_refuses_what_makes_no_sense(phema, unchanged, words, what):
    with unchanged():
        phema(*PLAN, *words).refused(what)


def test_plan_needs_to_know_the_size_of_the_model(phema):
    phema("plan", "--steps", "1000").refused("give --parameters, the number of averaged weights")


# ---- prune


def test_prune_shows_and_changes_nothing(phema, unchanged, long_run):
    with unchanged():
        done = phema("prune", long_run, "--keep", 8, "--range", "0.03,0.2")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[1].split() == ["files", "81", "9"]
    assert lines[3].startswith("error at 0.03")
    assert lines[-1].split()[:2] == ["640", "raw,"]
    assert "72 files would go; nothing was removed. Add --apply" in done.err


def test_prune_applied_keeps_what_it_said(phema, long_run):
    words = ("prune", long_run, "--keep", 8, "--range", "0.03,0.2", "--json")
    said = json.loads(phema(*words).succeeded())
    done = json.loads(phema(*words, "--apply").succeeded())
    assert (said["applied"], done["applied"]) == (False, True)
    assert {**said, "applied": None} == {**done, "applied": None}
    store = SnapshotStore.open(long_run)
    assert [record.file for record in store.records] == said["kept"]
    assert sorted(path.name for path in long_run.glob("*.safetensors")) == sorted(said["kept"])
    assert sum(record.file_bytes for record in store.records) == said["bytes_after"]
    assert list(store.verify()) == []


@pytest.mark.parametrize("codec", CODECS)
def test_prune_predicts_errors_and_bytes_of_every_codec(long_runs, tmp_path, codec):
    """What pruning says before, against the pruned store: files, bytes, errors that a synthesis sees."""
    folder = shutil.copytree(long_runs / codec, tmp_path / "run")
    plan = plan_pruning(SnapshotStore.open(folder), (0.03, 0.2), keep=10)
    with SnapshotStore.edit(folder) as store:
        prune(store, plan)
    store = SnapshotStore.open(folder)
    kept = [(r.time, r.sigma_rel) for r in plan.kept]
    assert [(r.time, r.sigma_rel) for r in store.records] == kept
    assert list(store.verify()) == []
    assert sum(r.file_bytes for r in store.records) == pytest.approx(plan.bytes_after, rel=0.05)
    after = plan_synthesis(store, plan.sigma_rels.tolist()).predicted_error
    # Fewer averages measure the pace less well; most of the factor is that. (Against the true errors
    # of float32, the plan is 0.5 to 2.0 and the pruned store 1.7 to 2.4.)
    assert np.all(after < 5 * plan.errors)
    assert np.all(after > plan.errors / 5)


def test_prune_loses_much_less_than_even_thinning_in_true_error(long_runs, tmp_path):
    folder = long_runs / "float32"
    store = SnapshotStore.open(folder)
    lengths = (0.03, 0.05, 0.1, 0.15, 0.2)
    # All 80 averages are tens of times better than 16 of them: they stand for the truth.
    truth = synthesize(store, sigma_rel=lengths)

    def worst(name, removed):
        copy = shutil.copytree(folder, tmp_path / name)
        with SnapshotStore.edit(copy) as editable:
            editable.remove(removed)
        made = synthesize(SnapshotStore.open(copy), sigma_rel=lengths)
        errors = []
        for true, got in zip(truth, made, strict=True):
            lost = sum(float(np.sum((true[n] - got[n]) ** 2)) for n in true)
            errors.append(lost / sum(float(np.sum(true[n] ** 2)) for n in true))
        return max(errors) ** 0.5

    plan = plan_pruning(store, (0.03, 0.2), keep=16)
    even = [r for r in store.records if r.time % 80]
    assert len(store.records) - len(even) == 17  # 8 times x 2, and the raw weights
    pruned, evenly = worst("pruned", plan.removed), worst("even", even)
    assert pruned < evenly / 2, (pruned, evenly)


def test_prune_to_a_size_fits_with_key_frames_that_are_written_anew(phema, long_runs, tmp_path):
    folder = shutil.copytree(long_runs / "delta", tmp_path / "run")
    limit = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4
    phema("prune", folder, "--max-size", f"{limit / 1000}kB", "--apply", "--json").succeeded()
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.6 * limit < total <= 1.03 * limit  # headers are not counted to the byte


def test_prune_to_an_error_keeps_few_that_are_good_enough(phema, long_run):
    words = ("prune", long_run, "--error", "1e-3", "--range", "0.03,0.2", "--json")
    value = json.loads(phema(*words).succeeded())
    assert max(row["after"] for row in value["errors"]) <= 1.05e-3
    assert 2 <= len(value["kept"]) < 20


@pytest.mark.parametrize(("raw", "left"), [("last", 1), ("all", 10), ("none", 0)])
def test_prune_leaves_the_raw_weights_that_are_asked_for(tmp_path, raw, left):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with track(optimizer, model, tmp_path / "run", every=1, raw="all", on_error="raise"):
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).square().sum().backward()
            optimizer.step()
    plan = plan_pruning(SnapshotStore.open(tmp_path / "run"), keep=4, keep_raw=raw)
    assert sum(r.sigma_rel is None for r in plan.kept) == left
    assert sum(r.sigma_rel is not None for r in plan.kept) == 4


def test_prune_that_has_nothing_to_remove_says_so(phema, unchanged, long_run):
    with unchanged():
        done = phema("prune", long_run, "--keep", 1000, "--apply")
    assert (done.code, done.err) == (0, "phema: nothing is to be removed.\n")


def test_prune_draws_before_and_after(phema, long_run, tmp_path):
    phema("prune", long_run, "--keep", 8, "--out", "new/prune.svg", "--json").succeeded()
    assert (tmp_path / "new" / "prune.svg").stat().st_size > 5000


def test_prune_refuses_a_store_that_has_changed(long_run):
    from posthoc_ema import SnapshotError

    plan = plan_pruning(SnapshotStore.open(long_run), keep=8)
    with SnapshotStore.edit(long_run) as store:
        store.remove(store.records[:1])
        with pytest.raises(SnapshotError, match="has changed since the pruning was planned"):
            prune(store, plan)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "give exactly one of --keep N, --max-size SIZE and --error E"),
        (("--keep", 4, "--error", 1), "give exactly one"),
        (("--max-size", "many"), "--max-size must be a size such as 20GB or 500MiB, got 'many'"),
        (("--max-size", "1B"), "the smallest store that is of use takes"),
        (("--error", "1e-9"), "max_error must be at least what all 80 stored averages give"),
        (("--keep", 4, "--range", "0.3"), "sigma_rel must lie in (0, 0.2887]"),
        (("--keep", 4, "--criterion", "best"), "criterion must be one of worst, mean-log"),
        (("--keep", 4, "--raw", "some"), "keep_raw must be last, all or none, got 'some'"),
        (("--keep", 4, "--out", "a.txt"), "--out must end in .png, .pdf or .svg"),
    ],
)
def test_prune_refuses_what_makes_no_sense(phema, unchanged, long_run, words, what):
    with unchanged():
        phema("prune", long_run, *words, "--apply").refused(what)


def test_prune_refuses_a_damaged_store(phema, unchanged, long_run):
    file = sorted(long_run.glob("*.safetensors"))[3]
    file.write_bytes(b"")
    with unchanged():
        phema("prune", long_run, "--keep", 4, "--apply").refused(file.name)


def test_prune_of_a_store_without_averages(phema, tmp_path):
    phema("prune", "nowhere", "--keep", 4).refused("nowhere")
