"""The table of the options of `phema track`: what the two parsers make of it, and what the library says."""

from __future__ import annotations

import inspect

import pytest

from phema.track_options import CODECS as TABLE_CODECS
from phema.track_options import LONGEST, OPTIONS, quick_parse, values_of
from posthoc_ema import DEFAULT_CODEC, DEFAULT_SIGMA_RELS, SIGMA_REL_MAX
from posthoc_ema.codecs import CODECS, check_codec
from posthoc_ema.torch import Tracker
from posthoc_ema.torch.launch.options import tracker_options

BY_NAME = {option.name: option for option in OPTIONS}
DEFAULTS = values_of({})


def parameter(name):
    return inspect.signature(Tracker).parameters[name]


def test_defaults_are_those_of_the_library():
    assert tuple(DEFAULTS["sigma_rels"]) == DEFAULT_SIGMA_RELS
    assert DEFAULTS["dtype"] == DEFAULT_CODEC
    for name in ("update_every", "raw", "tensors", "average_dtype", "kernel", "on_error"):
        assert DEFAULTS[name] == parameter(name).default, name
    assert tuple(DEFAULTS["keep_range"]) == parameter("keep_range").default


def test_choices_are_those_of_the_library():
    assert pytest.approx(SIGMA_REL_MAX, rel=1e-15) == LONGEST
    for codec in TABLE_CODECS:
        check_codec(codec)
    assert set(CODECS) <= set(TABLE_CODECS)
    for name in ("raw", "tensors", "average_dtype", "kernel", "on_error"):
        for choice in BY_NAME[name].choices:
            assert f"'{choice}'" in str(parameter(name).annotation).replace('"', "'"), name


def test_a_tracker_takes_what_the_options_make(tmp_path):
    import torch

    given = {"samples_per_step": "8", "device": "cpu", "keep": "all", "raw": "none"}
    options = tracker_options(values_of(given))
    assert options["every"] == 8000
    assert options["keep"] is None
    Tracker(torch.nn.Linear(1, 1), tmp_path / "s", **options).close()


@pytest.mark.parametrize(
    ("words", "changed", "command"),
    [
        ("python t.py", {}, "python t.py"),
        ("-- python t.py --every 3", {}, "python t.py --every 3"),
        ("--every 3 -- a -- b", {"every": 3}, "a -- b"),
        ("--every=3 --restart a", {"every": 3, "restart": True}, "a"),
        ("--sigma-rel 0.05,0.1 a", {"sigma_rels": [0.05, 0.1]}, "a"),
        ("--keep-range 0.05,0.1 --keep 8 a", {"keep_range": [0.05, 0.1], "keep": 8}, "a"),
        ("--model G.* --out x/{model} a", {"model": "G.*", "out": "x/{model}"}, "a"),
        ("--out --every a", {"out": "--every"}, "a"),
    ],
)
def test_plain_words_need_no_typer(words, changed, command):
    assert quick_parse(words.split()) == ({**DEFAULTS, **changed}, command.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--",
        "--every",
        "--every 3",
        "--every 3 --",
        "--every -1 a",
        "--every 1e3 a",
        "--every ² a",
        "--every 99999999999999999999 a",
        "--sigma-rel 0.05,0.05 a",
        "--sigma-rel 0.05,nan a",
        "--sigma-rel 0 a",
        "--sigma-rel 0.1,0.15,...,0.25 a",
        "--keep-range 0.1 a",
        "--dtype float a",
        "--restart=yes a",
        "--help a",
        "-h",
        "--ever 3 a",
    ],
)
def test_whatever_is_not_plain_goes_to_the_parser_that_explains(words):
    assert quick_parse(words.split()) is None
