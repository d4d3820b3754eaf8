"""The library against 120-digit reference numbers, and a few of those against their formulas."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import mpmath
import numpy as np
import pytest

from posthoc_ema import PowerProfile, fit, gamma_from_sigma_rel, sigma_rel_from_gamma
from posthoc_ema.inner_products import density_products, random_walk_products

from . import formulas

FOLDER = Path(__file__).parent
FILE = json.loads((FOLDER / "profiles.json").read_text())
VALUES, RTOL = FILE["values"], FILE["rtol"]
FITS = [(row, key) for row in VALUES["fits"] for key in row if key not in ("inputs", "target")]


@pytest.fixture(autouse=True)
def reference_digits():
    with mpmath.workdps(formulas.DIGITS):
        yield


@pytest.mark.parametrize("key", ["what", "source", "how", "rtol", "rtol_of", "date"])
def test_golden_file_states_its_provenance(key):
    assert FILE[key]


@pytest.mark.parametrize("row", VALUES["conversion"], ids=lambda row: str(row["sigma_rel"]))
def test_gamma_matches_the_reference(row):
    assert float(gamma_from_sigma_rel(row["sigma_rel"])) == pytest.approx(row["gamma"], rel=1e-14)
    assert float(sigma_rel_from_gamma(row["gamma"])) == pytest.approx(row["sigma_rel"], rel=1e-14)


@pytest.mark.parametrize("row", VALUES["inner_products"])
def test_inner_products_match_the_reference(row):
    a = PowerProfile(row["t_a"], row["sigma_rel_a"])
    b = PowerProfile(row["t_b"], row["sigma_rel_b"])
    assert density_products([a], [b])[0, 0] == pytest.approx(row["density"], rel=RTOL, abs=0)
    assert random_walk_products([a], [b])[0, 0] == pytest.approx(row["random_walk"], rel=RTOL)


@pytest.mark.parametrize(
    ("row", "key"),
    FITS,
    ids=[f"{i // 5}-{len(row['inputs'])}-{key}" for i, (row, key) in enumerate(FITS)],
)
def test_fit_matches_the_reference(row, key):
    inputs = [PowerProfile(t, s) for t, s in row["inputs"]]
    target = PowerProfile(*row["target"])
    published = key == "published"
    norm = "published" if published else key.split(":")[0].replace("_", "-")
    expected = np.array(row[key] if published else row[key]["x"])
    result = fit(inputs, [target], norm, 0.0 if published else row[key]["noise"])
    assert np.abs(result.coefficients[:, 0] - expected).sum() <= RTOL * np.abs(expected).sum()
    if not published:
        assert result.residual[0] == pytest.approx(row[key]["residual"], rel=RTOL)


def test_fits_of_the_reference_are_told_apart_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in VALUES["fits"]:
            fit([PowerProfile(t, s) for t, s in row["inputs"]], [PowerProfile(*row["target"])])


@pytest.mark.parametrize("index", [0, 5, 11])
def test_reference_inner_products_are_the_integrals(index):
    """The antiderivatives behind the reference, against quadrature of the profiles themselves."""
    row = VALUES["inner_products"][index]
    ends = (
        row["t_a"],
        formulas.exponent(row["sigma_rel_a"]),
        row["t_b"],
        formulas.exponent(row["sigma_rel_b"]),
    )
    with mpmath.workdps(30):
        density = formulas.density_by_quadrature(*ends)
        random_walk = formulas.random_walk_by_quadrature(*ends)
    assert float(density) == pytest.approx(row["density"], rel=1e-12, abs=0)
    assert float(random_walk) == pytest.approx(row["random_walk"], rel=1e-12)


@pytest.mark.parametrize("index", [3, 5])
def test_reference_fit_is_recomputed_from_its_formulas(index):
    row = VALUES["fits"][index]
    key = "random_walk:1e-07"
    noise = row[key]["noise"]
    fresh = formulas.solve_fit(row["inputs"], row["target"], "random_walk", noise, constrained=True)
    assert [float(v) for v in fresh["x"]] == pytest.approx(row[key]["x"], rel=1e-13)
    assert float(fresh["residual"]) == pytest.approx(row[key]["residual"], rel=1e-13)


def test_regenerate_writes_nothing_without_a_reason():
    before = (FOLDER / "profiles.json").read_bytes()
    run = subprocess.run(
        [sys.executable, str(FOLDER / "regenerate.py")], capture_output=True, text=True, check=True
    )
    assert "give --reason to overwrite" in run.stdout
    difference = float(run.stdout.splitlines()[0].split(": ")[1])
    assert difference < 1e-13
    assert (FOLDER / "profiles.json").read_bytes() == before
