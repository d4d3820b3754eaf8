"""`phema sweep` with a metric of one's own: what it measures, keeps, resumes and refuses."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

METRIC = '''\
"""Evaluate a weights file: the distance of its length from 0.1; counts its calls in a file."""
import json, os, pathlib, sys

calls = pathlib.Path("calls.txt")
number = len(calls.read_text().splitlines()) + 1 if calls.exists() else 1
length = os.environ["PHEMA_SIGMA_REL"]
calls.write_text((calls.read_text() if number > 1 else "") + length + "\\n")
if number == int(os.environ.get("FAIL_AT", 0)):
    sys.exit("the evaluation ran out of memory")
data = pathlib.Path(sys.argv[1]).read_bytes()
assert "first.weight" in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
print("progress: 100%")
print(json.dumps({"fid": 1 + abs(float(length) - 0.1) if length != "raw" else 9.0, "is": 2.0}))
'''


@pytest.fixture
def measure(phema, snapshots):
    """`phema sweep` with that metric; LIST and further options."""
    Path("metric.py").write_text(METRIC)

    def call(lengths, *options, metric=f"{sys.executable} -I -S metric.py {{weights}}"):
        words = ("sweep", "snapshots", "--sigma-rel", lengths, "--metric", metric, "--out", "out")
        return phema(*words, *options)

    return call


def calls():
    return Path("calls.txt").read_text().split()


def test_a_sweep_finds_the_best_length_and_measures_the_raw_weights(measure):
    out = measure("0.05,0.075,...,0.15").succeeded()
    lines = out.splitlines()
    assert lines[0].split() == ["sigma_rel", "fid", "is", "error"]
    assert [line.split()[0] for line in lines[1:-1]] == [
        "raw",
        "0.05",
        "0.075",
        "0.1",
        "0.125",
        "0.15",
    ]
    assert [line.endswith("<- best") for line in lines[1:-1]] == [False] * 3 + [True] + [False] * 2
    assert "metric.py {weights}; table in out/sweep.csv" in lines[-1]
    assert calls() == ["raw", "0.05", "0.075", "0.1", "0.125", "0.15"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["sweep.csv", "sweep.json"]


def test_csv_json_and_the_printed_json_agree(measure):
    value = json.loads(measure("0.05,0.1,0.2", "--json").succeeded())
    assert value == json.loads(Path("out/sweep.json").read_text())
    assert (value["key"], value["best_sigma_rel"], value["time"]) == ("fid", 0.1, 40)
    rows = list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))
    assert [row["sigma_rel"] for row in rows] == ["raw", "0.05", "0.1", "0.2"]
    assert [float(row["fid"]) for row in rows] == [r["values"]["fid"] for r in value["rows"]]
    assert [r["raw"] for r in value["rows"]] == [True, False, False, False]


def test_a_plain_number_is_enough(measure):
    value = measure("0.05,0.1,0.2", "--json", metric="echo {weights}; echo 0.5")
    assert [r["values"] for r in json.loads(value.out)["rows"]] == [{"value": 0.5}] * 4


def test_the_raw_weights_are_left_out_on_request_and_where_they_are_not_stored(measure):
    measure("0.05,0.1,0.2", "--no-raw").succeeded()
    assert calls() == ["0.05", "0.1", "0.2"]
    Path("calls.txt").unlink()
    measure("0.05,0.1,0.2", "--at", 20).succeeded()
    assert calls() == ["0.05", "0.1", "0.2"]


@pytest.mark.parametrize(("lengths", "end"), [("0.1,0.15", "0.1"), ("0.02,0.05", "0.05")])
def test_a_best_length_at_the_end_of_the_range_is_pointed_out(measure, lengths, end):
    done = measure(lengths)
    assert done.code == 0
    assert f"the best length, {end}, is the end of the range" in done.err


def test_a_second_sweep_into_the_folder_adds_lengths_to_the_first(measure):
    measure("0.05,0.1,0.2").succeeded()
    value = json.loads(measure("0.07,0.1,0.15", "--json").succeeded())
    assert calls() == ["raw", "0.05", "0.1", "0.2", "0.07", "0.15"]
    assert [row["sigma_rel"] for row in value["rows"]] == [None, 0.05, 0.07, 0.1, 0.15, 0.2]


def test_higher_is_better_and_key_choose_the_optimum(measure):
    value = json.loads(measure("0.05,0.1,0.25", "--higher-is-better", "--json").out)
    assert value["best_sigma_rel"] == 0.25
    value = json.loads(measure("0.05,0.1,0.25", "--key", "is", "--json").out)
    assert (value["key"], value["best_sigma_rel"]) == ("is", 0.05)
    assert len(calls()) == 4


def test_a_failed_metric_stops_the_sweep_and_the_next_run_measures_only_the_rest(
    measure, monkeypatch
):
    monkeypatch.setenv("FAIL_AT", "3")
    measure("0.05,0.1,0.15,0.2").refused(
        "the metric command ended with code 1 at sigma_rel 0.1: the evaluation ran out of memory",
        "metric.py",
    )
    rows = list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))
    assert [row["sigma_rel"] for row in rows] == ["raw", "0.05"]
    monkeypatch.delenv("FAIL_AT")
    assert measure("0.05,0.1,0.15,0.2").code == 0
    assert calls() == ["raw", "0.05", "0.1", "0.1", "0.15", "0.2"]
    assert measure("0.05,0.1,0.15,0.2").code == 0
    assert len(calls()) == 6


def test_another_metric_or_time_is_measured_anew_instead_of_mixed(measure):
    measure("0.05,0.1,0.2").succeeded()
    measure("0.05,0.1,0.2", "--at", 32).succeeded()
    assert calls() == ["raw", "0.05", "0.1", "0.2", "0.05", "0.1", "0.2"]
    value = json.loads(measure("0.1,0.2", "--json", metric="echo {weights}; echo 4").out)
    assert [r["values"] for r in value["rows"]] == [{"value": 4.0}] * 3


def test_weights_are_kept_on_request(measure):
    measure("0.05,0.1,0.2", "--keep-weights", "--batch", 1).succeeded()
    assert sorted(path.name for path in Path("out").glob("*.safetensors")) == [
        *(f"weights-{s}.safetensors" for s in (0.05, 0.1, 0.2)),
        "weights-raw.safetensors",
    ]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("echo FID 3.5 # {weights}", "the last line of the metric's output must be a number"),
        ("true {weights}", "must be a number or a JSON object of numbers, got ''"),
        ("echo nan # {weights}", "the metric gave value = nan"),
        ("exit 7 # {weights}", "ended with code 7 at sigma_rel raw: no message"),
        ("no-such-program {weights}", "not found"),
        ("python eval.py", "a metric command must hold {weights}"),
    ],
)
def test_a_metric_without_a_number_is_refused_and_leaves_nothing(
    measure, unchanged, metric, message
):
    with unchanged():
        measure("0.05,0.1", metric=metric).refused(message)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ("raw", (), "a sweep needs at least one length besides raw"),
        ("0.05", ("--norm", "x"), "norm must be one of"),
        ("raw,0.05", ("--at", "20"), "holds the raw weights only at 40, not at 20"),
    ],
)
def test_an_impossible_sweep_is_refused(measure, unchanged, lengths, options, message):
    with unchanged():
        measure(lengths, *options).refused(message)


def test_a_wrong_key_names_the_right_ones(measure):
    measure("0.05,0.1", "--key", "fd").refused("gives fid, is, not 'fd'", "--key")
    assert len(calls()) == 1


def test_the_default_metric_refuses_a_store_of_another_model(phema, unchanged, snapshots):
    with unchanged():
        phema("sweep", "snapshots", "--sigma-rel", "0.05", "--out", "out").refused(
            "snapshots does not come from `phema train`", "phema sweep --metric 'COMMAND {weights}'"
        )
