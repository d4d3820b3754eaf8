"""Sweeps: what is measured, kept, written and refused."""

import csv
import json
import sys
from dataclasses import dataclass, field

import pytest

from posthoc_ema import (
    RAW,
    ConfigError,
    MetricError,
    PhemaWarning,
    SnapshotFormatError,
    SnapshotNotFoundError,
    SnapshotStore,
    SnapshotWriteError,
)
from posthoc_ema.sweep import RESULTS, TABLE, ShellMetric, label, read_results, run_sweep, to_json
from posthoc_ema.tensor_files import read_header

from .stores import TABLE as MODEL
from .stores import averages_of, make_store


@dataclass
class Valley:
    """A metric with its optimum at 0.1; counts its calls and fails at one of them."""

    description: str = "valley"
    fail_at: int | None = None
    calls: list = field(default_factory=list)

    def __call__(self, weights, sigma_rel):
        self.calls.append(sigma_rel)
        assert read_header(weights).tensors.keys() >= {"conv.weight"}
        if len(self.calls) == self.fail_at:
            raise MetricError("no luck")
        return {"fd": abs(sigma_rel - 0.1), "other": sigma_rel}


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def lengths(result):
    return [row.sigma_rel for row in result.rows]


def test_rows_rise_with_the_raw_weights_first_and_the_best_is_found(store, out):
    result = run_sweep(store, [0.2, 0.05, RAW, 0.1], Valley(), out)
    assert lengths(result) == [RAW, 0.05, 0.1, 0.2]
    assert (result.best.sigma_rel, result.key) == (0.1, "fd")
    assert result.raw.values == {"fd": 0.1, "other": 0.0}
    assert [row.sigma_rel for row in result.averaged] == [0.05, 0.1, 0.2]


def test_the_raw_weights_are_never_the_best(store, out):
    assert run_sweep(store, [RAW, 0.05, 0.2], Valley(), out, key="other").best.sigma_rel == 0.05


def test_higher_is_better_turns_the_search_around(store, out):
    result = run_sweep(store, [0.05, 0.1, 0.25], Valley(), out, higher_is_better=True)
    assert result.best.sigma_rel == 0.25


def test_key_chooses_the_value_that_decides(store, out):
    result = run_sweep(store, [0.05, 0.1], Valley(), out, key="other")
    assert (result.key, result.best.sigma_rel) == ("other", 0.05)


def test_json_and_csv_agree_and_come_back(store, out):
    result = run_sweep(store, [RAW, 0.05, 0.07], Valley(), out)
    assert read_results(out) == read_results(out / RESULTS) == result
    value = json.loads((out / RESULTS).read_text())
    assert value == to_json(result)
    assert (value["run_id"], value["time"], value["clock"]) == ("run-1", 30, "images")
    rows = list(csv.DictReader((out / TABLE).read_text().splitlines()))
    assert list(rows[0]) == ["sigma_rel", "fd", "other", "predicted_error"]
    assert [row["sigma_rel"] for row in rows] == ["raw", "0.05", "0.07"]
    for row, entry in zip(rows, value["rows"], strict=True):
        assert float(row["fd"]) == entry["values"]["fd"]
        assert float(row["predicted_error"]) == entry["predicted_error"]


def test_predicted_errors_are_small_for_stored_lengths_only(store, out):
    with pytest.warns(PhemaWarning, match="0.02: .* below the tracked lengths"):
        result = run_sweep(store, [0.05, 0.02], Valley(), out)
    errors = {row.sigma_rel: row.predicted_error for row in result.rows}
    assert errors[0.05] < 1e-6 < 0.01 < errors[0.02]


def test_a_second_run_measures_nothing(store, out):
    first = run_sweep(store, [0.05, 0.1], Valley(), out)
    metric = Valley()
    assert run_sweep(store, [0.05, 0.1], metric, out) == first
    assert metric.calls == []


def test_a_second_run_adds_lengths_and_keeps_the_others(store, out):
    run_sweep(store, [0.05, 0.1], Valley(), out)
    metric = Valley()
    result = run_sweep(store, [0.07, 0.1], metric, out)
    assert metric.calls == [0.07]
    assert lengths(result) == lengths(read_results(out)) == [0.05, 0.07, 0.1]


def test_a_failure_keeps_the_rows_so_far_and_the_next_run_measures_the_rest(store, out):
    with pytest.raises(MetricError, match="no luck"):
        run_sweep(store, [0.05, 0.07, 0.1, 0.2], Valley(fail_at=3), out)
    assert lengths(read_results(out)) == [0.05, 0.07]
    metric = Valley()
    result = run_sweep(store, [0.05, 0.07, 0.1, 0.2], metric, out)
    assert metric.calls == [0.1, 0.2]
    assert lengths(result) == [0.05, 0.07, 0.1, 0.2]


@pytest.mark.parametrize("changed", ["metric", "norm", "time", "run"])
def test_rows_of_something_else_are_measured_anew(store, out, tmp_path, changed):
    run_sweep(store, [0.05, 0.1], Valley(), out)
    metric = Valley("valley of another number of images" if changed == "metric" else "valley")
    options = {"norm": {"norm": "density"}, "time": {"at": 20}}.get(changed, {})
    if changed == "run":
        with SnapshotStore.create(tmp_path / "b", clock="images", table=MODEL, run_id="b") as store:
            store.add(30, averages_of(30))
    result = run_sweep(store, [0.1], metric, out, **options)
    assert metric.calls == [0.1]
    assert lengths(result) == [0.1]


def test_a_wrong_key_is_refused_without_losing_the_measurement(store, out):
    metric = Valley()
    with pytest.raises(ConfigError, match=r"gives fd, other, not 'fid'\. Choose one of these"):
        run_sweep(store, [0.05, 0.1], metric, out, key="fid")
    assert lengths(read_results(out)) == metric.calls == [0.05]
    run_sweep(store, [0.05, 0.1], metric, out, key="other")
    assert metric.calls == [0.05, 0.1]


def test_weights_files_go_unless_they_are_to_be_kept(store, out):
    run_sweep(store, [RAW, 0.05], Valley(), out)
    assert names_in(out) == [TABLE, RESULTS]
    metric = Valley()
    run_sweep(store, [RAW, 0.05], metric, out, keep_weights=True)
    assert metric.calls == []
    names = ["weights-0.05.safetensors", "weights-raw.safetensors"]
    assert names_in(out) == [TABLE, RESULTS, *names]


def test_weights_files_go_when_the_metric_fails(store, out):
    with pytest.raises(MetricError):
        run_sweep(store, [0.05, 0.1], Valley(fail_at=1), out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_number_of_lengths_per_pass_does_not_matter(store, tmp_path, batch):
    result = run_sweep(store, [0.05, 0.07, 0.1], Valley(), tmp_path / str(batch), batch=batch)
    assert lengths(result) == [0.05, 0.07, 0.1]


def test_at_most_one_batch_of_weights_lies_on_disk(store, out):
    seen = []

    class Looking(Valley):
        def __call__(self, weights, sigma_rel):
            seen.append(len(list(out.glob("weights-*"))))
            return super().__call__(weights, sigma_rel)

    run_sweep(store, [0.05, 0.06, 0.07, 0.08, 0.1], Looking(), out, batch=2)
    assert max(seen) == 2


def test_report_counts_to_the_total_also_when_rows_were_there(store, out):
    run_sweep(store, [0.05, 0.25], Valley(), out)
    told = []
    run_sweep(
        store,
        [0.05, 0.07, 0.1],
        Valley(),
        out,
        report=lambda row, *n: told.append((row.sigma_rel, *n)),
    )
    assert told == [(0.05, 1, 3), (0.07, 2, 3), (0.1, 3, 3)]


def test_impossible_targets_are_refused_before_any_work(store, out):
    with pytest.raises(SnapshotNotFoundError, match="--at must be a stored time"):
        run_sweep(store, [0.05], Valley(), out, at=11)
    assert not out.exists()


def test_an_unusable_folder_is_named(store, out):
    out.touch()
    with pytest.raises(SnapshotWriteError, match="out: cannot be made or used"):
        run_sweep(store, [0.05], Valley(), out)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"format": "something else"}',
        pytest.param("[" * 100_000, id="deep"),
        {"schema": 99},
        {"rows": [{"sigma_rel": 0.1}]},
        {"key": "unknown"},
        {"rows": [{"raw": True, "values": {"fd": float("nan")}, "predicted_error": 0.0}]},
    ],
)
def test_damaged_results_are_refused_and_not_overwritten(store, out, damage):
    run_sweep(store, [0.05], Valley(), out)
    value = json.loads((out / RESULTS).read_text())
    text = damage if isinstance(damage, str) else json.dumps(value | damage)
    (out / RESULTS).write_text(text)
    with pytest.raises(SnapshotFormatError, match=r"sweep\.json: not a sweep of this version"):
        run_sweep(store, [0.05], Valley(), out)
    assert (out / RESULTS).read_text() == text


def test_missing_results_say_what_makes_them(out):
    with pytest.raises(SnapshotFormatError, match="`phema sweep --out` makes it"):
        read_results(out / RESULTS)


# ---- shell commands as metrics


def shell(code, rest=""):
    return ShellMetric(f'{sys.executable} -c "{code}" {{weights}} {rest}')


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("print(0.5)", {"value": 0.5}),
        ("print(1); print(2)", {"value": 2.0}),
        ("print('noise'); print('3e-4'); print()", {"value": 3e-4}),
        ("import json; print(json.dumps(dict(fid=2, name='x', ok=True)))", {"fid": 2.0}),
        ("import sys; sys.stderr.write('loud'); print(7)", {"value": 7.0}),
    ],
)
def test_the_last_line_of_a_shell_metric_counts(tmp_path, code, values):
    assert shell(code)(tmp_path / "w", 0.1) == values


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", "must be a number or a JSON object of numbers, got ''"),
        ("print('FID: 3.5')", "got 'FID: 3.5'"),
        ("print(True)", "got 'True'"),
        ("print('true')", "got 'true'"),
        ("print([1, 2])", r"got '\[1, 2\]'"),
        ("print('{}')", r"got '\{\}'"),
        ("print('1' + '0' * 400)", "must be a number|inf"),
        ("print('[' * 9999)", "must be a number"),
        ("print(float('nan'))", "gave value = nan"),
        ("print('{\\\"fid\\\": Infinity}')", "gave fid = inf"),
        (
            "import sys; sys.exit('out of memory')",
            "ended with code 1 at sigma_rel 0.1: out of memory",
        ),
        ("import sys; sys.exit(3)", "ended with code 3 at sigma_rel 0.1: no message"),
    ],
)
def test_a_shell_metric_that_gives_no_number_is_refused(tmp_path, code, message):
    with pytest.raises(MetricError, match=message):
        shell(code)(tmp_path / "w", 0.1)


def test_a_shell_metric_gets_the_quoted_path_and_the_length(tmp_path):
    weights = tmp_path / "a b'c.safetensors"
    weights.write_bytes(b"12345")
    code = (
        "import os,sys; print(os.path.getsize(sys.argv[1]) + float(os.environ['PHEMA_SIGMA_REL']))"
    )
    assert shell(code)(weights, 0.25) == {"value": 5.25}


def test_a_metric_command_without_the_place_of_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"must hold \{weights\}.*Example"):
        ShellMetric("python eval.py")


def test_labels_are_exact():
    assert [label(s) for s in (RAW, 0.1, 1 / 3)] == ["raw", "0.1", "0.3333333333333333"]
