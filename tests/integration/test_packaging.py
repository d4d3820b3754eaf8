"""What is shipped: the wheel, the source distribution, their metadata."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from posthoc_ema import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "posthoc_ema": "posthoc_ema",
    "reference_trainer": "reference_trainer",
    "phema": "cli/phema",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def sources(folder):
    paths = [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {str(path.relative_to(folder)) for path in paths}


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    expected = {
        f"{package}/{name}"
        for package, folder in PACKAGES.items()
        for name in sources(ROOT / folder)
    }
    assert set(names) == expected
    assert len(names) == len(expected)
    for needed in (
        "posthoc_ema/py.typed",
        "reference_trainer/py.typed",
        "phema/py.typed",
        "reference_trainer/metrics/digit_classifier.safetensors",
        "phema/commands/synth.py",
    ):
        assert needed in names


def test_the_wheel_is_small_and_for_every_platform(built):
    (path,) = built.glob("*.whl")
    assert path.name == f"posthoc_ema-{__version__}-py3-none-any.whl"
    assert path.stat().st_size < 1_000_000


def test_the_metadata_says_what_it_is(metadata, wheel):
    assert (metadata["Name"], metadata["Version"]) == ("posthoc-ema", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == {"torch", "trainer", "metrics", "data", "dev"}
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in wheel.read(licence)
    (scripts,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "phema = phema.__main__:main" in wheel.read(scripts).decode()


def test_the_base_install_needs_no_torch(metadata):
    needed = metadata.get_all("Requires-Dist")
    base = {text.partition(">")[0] for text in needed if "extra ==" not in text}
    assert base == {
        *("filelock", "huggingface-hub", "matplotlib", "numpy", "rich"),
        *("safetensors", "scipy", "typer", "xxhash"),
    }
    for extra in ("torch", "trainer"):
        assert any(text.startswith("torch") and f"extra == '{extra}'" in text for text in needed)


def test_every_requirement_is_pinned_for_continuous_integration(metadata):
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for text in metadata.get_all("Requires-Dist"):
        name = text.partition(";")[0].partition(">")[0].strip()
        assert name.lower() in pinned, name


def test_the_source_distribution_holds_what_its_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in (
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "tests/conftest.py",
    ):
        assert needed in names
    assert "docs/reference/store-format.md" in names
    assert not [name for name in names if ".venv" in name or name.startswith(("shared", "demo"))]
