"""Studies that really train and measure, at the scale that takes seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

import posthoc_ema as pe
from reference_trainer.studies import apply as apply_module
from reference_trainer.studies import run_study, scale_named, study_named

TINY = scale_named("tiny")
TIME = study_named("ema-over-time")


def run(out, study=TIME, seeds=(0,), **options):
    return run_study(study, TINY, out, seeds=seeds, device="cpu", **options)


def contents(folder):
    """Every file but logs and locks, with the time of its last change."""
    files = [
        p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(("lock", ".jsonl"))
    ]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return run(out), out


def test_a_study_leaves_a_table_a_figure_and_its_numbers(finished):
    result, out = finished
    written = json.loads((out / "ema-over-time" / "results.json").read_text())
    assert written["finding"] == result.report.finding
    assert len(written["numbers"]) == 3 * len(TINY.sigma_rels)
    assert all(row["values"]["fd"] > 0 for row in written["numbers"])
    text = (out / "ema-over-time" / "results.md").read_text()
    assert "| steps | best distance | best sigma_rel |" in text
    assert result.report.finding in text
    with Image.open(out / "ema-over-time" / "figure.png") as picture:
        assert min(picture.size) > 300
    assert pe.SnapshotStore.open(out / "runs" / "G-seed0" / "snapshots").times[-1] == 192


def test_a_second_call_trains_and_measures_nothing(finished, monkeypatch):
    result, out = finished
    import reference_trainer.studies.measuring as measuring

    monkeypatch.setattr(measuring, "measure", lambda *args: pytest.fail("measured again"))
    before = contents(out / "runs"), contents(out / "numbers")
    again = run(out)
    assert (contents(out / "runs"), contents(out / "numbers")) == before
    assert again.numbers == result.numbers


def test_numbers_of_a_run_that_was_made_anew_are_measured_anew(finished, tmp_path):
    import shutil

    _, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "runs")
    numbers = copy / "numbers" / "G-seed0.json"
    before = json.loads(numbers.read_text())["numbers"]
    run(copy)
    after = json.loads(numbers.read_text())["numbers"]
    assert after[: len(before)] == before
    assert [row["values"] for row in after[len(before) :]] == [row["values"] for row in before]


def test_several_processes_give_the_numbers_of_one(finished, tmp_path):
    result, _ = finished
    parallel = run(tmp_path / "out", seeds=(0, 1), jobs=2)
    assert {m: v for m, v in parallel.numbers.items() if m.weights.run == "G-seed0"} == {
        m: pytest.approx(v, rel=1e-3) for m, v in result.numbers.items()
    }


def start(out):
    command = [sys.executable, "-m", "phema", "study", "ema-over-time", "--scale", "tiny"]
    command += ["--seeds", "0", "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def test_a_study_killed_at_work_goes_on_with_the_same_command(finished, tmp_path):
    """Killed once while it trains and once while it measures."""
    result, _ = finished
    for reached in ("runs/G-seed0/snapshots/manifest.json", "numbers/G-seed0.json"):
        process = start(tmp_path)
        while process.poll() is None and not (tmp_path / reached).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not (tmp_path / "ema-over-time").exists()
    assert start(tmp_path).wait() == 0
    written = json.loads((tmp_path / "ema-over-time" / "results.json").read_text())
    values = [row["values"] for row in written["numbers"]]
    # In another process a pixel may round to its other neighbour.
    assert values == [pytest.approx(v, rel=1e-3) for v in result.numbers.values()]


def test_a_later_stage_builds_on_the_numbers_of_the_first(tmp_path):
    result = run(tmp_path, study_named("per-tensor-ema"))
    varied = [m for m in result.numbers if m.weights.overrides]
    assert {m.weights.run for m in varied} == {"B-seed0", "G-seed0"}
    assert {m.weights.sigma_rel for m in varied} <= set(TINY.sigma_rels)


def test_guided_networks_are_measured(tmp_path):
    result = run(tmp_path, study_named("ema-under-guidance"))
    guided = {m: v["fd"] for m, v in result.numbers.items() if m.guide}
    unguided = {m.weights: v["fd"] for m, v in result.numbers.items() if not m.guide}
    assert len(guided) == 9 * len(TINY.sigma_rels[::2])
    assert all(value != unguided[m.weights] for m, value in guided.items())


def test_a_folder_of_another_scale_is_refused_by_the_fields_that_differ(finished):
    _, out = finished
    with pytest.raises(pe.ConfigError, match="total_images"):
        run_study(TIME, scale_named("digits"), out, seeds=(0,), device="cpu")


def test_numbers_that_are_kept_at_the_same_time_are_all_kept(tmp_path):
    def keep(i):
        apply_module.keep_number(tmp_path, "a", json.dumps([i]), {"fd": float(i)})

    threads = [threading.Thread(target=keep, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = apply_module.read_numbers(tmp_path, "a")
    assert numbers == {json.dumps([i]): {"fd": float(i)} for i in range(20)}


def test_damaged_numbers_are_named(finished, tmp_path):
    import shutil

    _, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    numbers = apply_module.numbers_file_of(copy, "G-seed0")
    for damage in (
        "{",
        "[]",
        '{"format": "x"}',
        numbers.read_text().replace('"fd": ', '"fd": NaN'),
    ):
        numbers.write_text(damage)
        with pytest.raises(pe.SnapshotFormatError, match=r"G-seed0\.json"):
            run(copy)


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,)])
def test_odd_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(pe.ConfigError, match="seeds"):
        run(tmp_path, seeds=seeds)
    assert not list(tmp_path.iterdir())


# The command line


def test_the_list_names_every_study_and_scale(phema):
    out = phema("study", "--list").succeeded()
    listed = json.loads(phema("study", "--list", "--json").succeeded())
    assert [s["name"] for s in listed["scales"]] == ["tiny", "digits", "gpu"]
    assert all(s["name"] in out and s["claim"] for s in listed["studies"])


def test_a_dry_run_says_what_would_be_trained(phema):
    plan = json.loads(phema("study", "growth", "--dry-run", "--seeds", "3", "--json").succeeded())
    assert [run["name"] for run in plan["runs"]] == [f"{c}-seed3" for c in "ABCDEFG"]
    text = phema("study", "growth", "--dry-run", "--seeds", "3").succeeded()
    assert f"7 runs of {plan['training_images']} images" in text


def test_the_command_prints_what_was_found(phema, finished):
    result, out = finished
    words = ("study", "ema-over-time", "--scale", "tiny", "--seeds", "0", "--out", out)
    assert result.report.finding in phema(*words).succeeded()
    assert json.loads(phema(*words, "--json").succeeded())["study"] == "ema-over-time"


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("ema", "--out", "x"), ("study must be one of", "Did you mean")),
        (("growth", "--scale", "huge", "--out", "x"), ("scale must be one of",)),
        (("growth",), ("--out DIR",)),
        (("growth", "--out", "x", "--seeds", "0,b"), ("--seeds must be numbers", "0,1,2")),
        (("--out", "x"), ("phema study --list",)),
    ],
)
def test_bad_words_are_one_line(phema, words, fragments):
    phema("study", *words).refused(*fragments)
