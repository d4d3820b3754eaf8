"""LIST and SEEDS as users write them, and what the parsers refuse."""

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phema.commands.sample import parse_seeds
from phema.options import extra, find_store, need_file, parse_sigma_rels
from posthoc_ema import SIGMA_REL_MAX, ConfigError, InvalidProfileError, PhemaError
from posthoc_ema.errors import SnapshotNotFoundError

from .stores import make_store

quick = settings(max_examples=60, deadline=None, derandomize=True)
thousandths = st.integers(1, 288)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.07", [0.07]),
        ("0.05,0.10", [0.05, 0.1]),
        (" 0.05 , 0.10 ", [0.05, 0.1]),
        ("raw", [0.0]),
        ("0.1,raw,0.05", [0.1, 0.0, 0.05]),
        ("0.05,0.050,5e-2", [0.05]),
        ("0.1,0.15,...,0.25", [0.1, 0.15, 0.2, 0.25]),
        ("0.1,0.15,…,0.25", [0.1, 0.15, 0.2, 0.25]),
        ("0.1,0.2,...,0.2,0.25", None),
        ("raw,0.02,0.1,0.15,...,0.25,0.28", [0.0, 0.02, 0.1, 0.15, 0.2, 0.25, 0.28]),
        ("0.01,0.02,...,0.04,0.1,0.15,...,0.25", [0.01, 0.02, 0.03, 0.04, 0.1, 0.15, 0.2, 0.25]),
        (repr(SIGMA_REL_MAX), [SIGMA_REL_MAX]),
    ],
)
def test_list_means_what_it_says(text, values):
    if values is None:
        with pytest.raises(ConfigError, match="must rise"):
            parse_sigma_rels(text)
    else:
        assert parse_sigma_rels(text) == values


def test_list_of_the_issue_has_49_lengths_with_both_ends():
    values = parse_sigma_rels("0.010,0.015,...,0.250")
    assert values == [float(f"{k / 1000:.3f}") for k in range(10, 251, 5)]
    assert len(values) == 49


@quick
@given(first=thousandths, step=thousandths, count=st.integers(2, 50))
def test_a_range_gives_the_decimals_that_a_user_would_type(first, step, count):
    last = first + count * step
    if last > 288:
        return
    text = ",".join(str(Decimal(n) / 1000) for n in (first, first + step))
    expected = [float(Decimal(first + k * step) / 1000) for k in range(count + 1)]
    assert parse_sigma_rels(f"{text},...,{Decimal(last) / 1000}") == expected


@quick
@given(st.lists(st.floats(1e-6, SIGMA_REL_MAX), min_size=1, max_size=20))
def test_a_written_out_list_comes_back_without_its_duplicates(values):
    assert parse_sigma_rels(",".join(map(repr, values))) == list(dict.fromkeys(values))


@quick
@given(st.text("0123456789.,-+einfa…raw \n", max_size=20))
def test_any_text_is_parsed_or_refused_by_us(text):
    values = []
    with contextlib.suppress(PhemaError):  # any other exception fails the test
        values = parse_sigma_rels(text)
    assert all(0 <= value <= SIGMA_REL_MAX for value in values)


@pytest.mark.parametrize(
    "text",
    ["0", "0.0", "-0", "0.3", "-1", "nan", "NaN", "inf", "-inf", "1e400", "1e-400", "29/100"],
)
@pytest.mark.parametrize("around", ["{}", "0.1,{}", "0.1,0.15,...,{}", "{},0.15,...,0.2"])
def test_numbers_outside_the_family_are_refused_wherever_they_stand(text, around):
    with pytest.raises((InvalidProfileError, ConfigError), match=r"0\.2887|not a number"):
        parse_sigma_rels(around.format(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        (",", "a value is missing beside a comma"),
        ("0.1,", "a value is missing beside a comma"),
        ("0.1,,0.2", "a value is missing beside a comma"),
        ("x", "'x' is not a number"),
        ("sNaN", "'sNaN' is not a number"),
        ("0.1 0.2", "'0.1 0.2' is not a number"),
        ("Raw", "'Raw' is not a number"),
        ("0.1,...,0.2", "two numbers before the dots"),
        ("...,0.2", "two numbers before the dots"),
        ("...", "two numbers before the dots"),
        ("0.1,0.15,...", "one after"),
        ("0.1,0.15,...,...", "two numbers before the dots"),
        ("raw,0.1,...,0.2", "two numbers before the dots"),
        ("0.1,0.15,...,raw", "two numbers before the dots"),
        ("0.01,0.02,...,0.05,...,0.1", "two numbers before the dots"),
        ("0.1,0.2,...,0.25", r"steps of 0\.1 from 0\.2 do not meet 0\.25"),
        ("0.01,0.02,...,0.045", r"the nearest ends are 0\.04 and 0\.05"),
        ("0.2,0.1,...,0.05", "must rise"),
        ("0.1,0.1,...,0.2", "must rise"),
        ("0.2,0.25,...,0.1", "must rise"),
        ("0.001,0.0011,...,0.25", "more than 1000 values"),
        ("1e-30,2e-30,...,0.1", "more than 1000 values"),
    ],
)
def test_malformed_lists_say_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_sigma_rels(text)
    assert str(caught.value).startswith("--sigma-rel")


def test_a_range_may_have_up_to_1000_steps():
    assert len(parse_sigma_rels("0.0001,0.0002,...,0.1")) == 1000


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("3,5,10-12", [3, 5, 10, 11, 12]), ("7", [7]), (" 1 , 2-3", [1, 2, 3])],
)
def test_seeds_are_numbers_and_ranges_with_both_ends(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", ",", "a", "3-1", "-1", "1-", "1-2-3", "0-99999999999", "0-999999,0-999999", "1.5"]
)
def test_malformed_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds must be numbers"):
        parse_seeds(text)


def test_a_store_is_found_in_its_folder_and_in_the_run_around_it(tmp_path):
    make_store(tmp_path / "run" / "snapshots", times=(10,))
    for folder in (tmp_path / "run", tmp_path / "run" / "snapshots"):
        assert find_store(folder).folder == tmp_path / "run" / "snapshots"


def test_a_missing_file_is_named(tmp_path):
    assert need_file(tmp_path) == tmp_path
    with pytest.raises(SnapshotNotFoundError, match=r"there does not exist\. Check"):
        need_file(tmp_path / "there")


def test_a_missing_package_becomes_one_sentence_with_the_pip_line():
    with (
        pytest.raises(
            ConfigError, match=r"`phema x` needs torch.*pip install 'posthoc-ema\[trainer\]'"
        ),
        extra("x"),
    ):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_a_missing_module_of_our_own_is_a_bug_and_stays_one():
    with pytest.raises(ModuleNotFoundError), extra("x"):
        raise ModuleNotFoundError("No module named 'phema.nonsense'", name="phema.nonsense")
