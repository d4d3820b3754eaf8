"""`phema evaluate` of networks and folders, `phema reference`, and the same over two processes."""

from __future__ import annotations

import json
import math
import os
import pickle  # noqa: TID251  # writes a file of the published kind
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference_trainer.data import load_dataset
from reference_trainer.metrics import evaluate_images, read_references

from ..unit.metric_weights import torch_fidelity  # noqa: F401, TID252  # loads it without torchvision

QUICK = ("--num-images", 40, "--steps", 2)


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory):
    """A folder of 60 digits as PNG files."""
    folder = tmp_path_factory.mktemp("digit_files") / "digits"
    folder.mkdir()
    for i, image in enumerate(load_dataset("digits").images[:60, 0]):
        Image.fromarray(image).save(folder / f"img{i:08d}.png")
    return folder


def results(done):
    return json.loads(done.succeeded())["results"]


# ---- images in a folder or zip


def test_a_folder_of_images_is_measured_like_the_array(phema, digit_files):
    (row,) = results(phema("evaluate", digit_files, "--json"))
    expected = evaluate_images(load_dataset("digits").images[:60])["fd"]
    assert row == {"images": str(digit_files), "fd": pytest.approx(expected, rel=1e-9)}
    lines = phema("evaluate", digit_files).succeeded().splitlines()
    assert lines[0].split() == ["images", "fd"]
    assert lines[1].split() == [str(digit_files), f"{expected:.3f}"]
    assert lines[2] == "fd-digits num_images=60 of digits"


def test_a_zip_gives_the_same_as_the_folder(phema, digit_files, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(digit_files.iterdir()):
            archive.write(path, path.name)
    (folder,) = results(phema("evaluate", digit_files, "--json"))
    (packed,) = results(phema("evaluate", "images.zip", "--json"))
    assert packed["fd"] == pytest.approx(folder["fd"], rel=1e-12)


def test_repeats_measure_other_images_and_say_how_they_vary(phema, digit_files):
    words = ("evaluate", digit_files, "--repeats", 3)
    (row,) = results(phema(*words, "--json"))
    values = [numbers["fd"] for numbers in row["repeats"]]
    assert len(set(values)) == 3
    assert row["fd"] == pytest.approx(np.mean(values))
    assert (row["fd_min"], row["fd_max"]) == (min(values), max(values))
    assert row["fd_standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    header, line, description = phema(*words).succeeded().splitlines()
    assert header.split() == ["images", "fd", "min", "+-"]
    assert line.split()[2] == f"{min(values):.3f}"
    assert description == "fd-digits num_images=20 of digits repeats=3"


def test_several_metrics_share_one_reference(phema, digit_files):
    metrics = "fd-digits,kid-digits,precision-recall-digits"
    made = phema("reference", "make", "digits", "--metric", metrics, "--out", "ref.safetensors")
    header, line, file = made.succeeded().splitlines()
    assert header.split()[:2] == ["extractor", "images"]
    assert line.split()[:3] == ["digits", "1797", "1797"]
    assert file == "ref.safetensors"
    words = ("evaluate", digit_files, "--metric", metrics, "--json")
    (own,) = results(phema(*words))
    (given,) = results(phema(*words, "--ref", "ref.safetensors"))
    for key in ("fd", "kid_digits", "precision_digits", "recall_digits"):
        assert given[key] == pytest.approx(own[key], rel=1e-5, abs=1e-7)
    assert own["precision_digits"] == 1.0


# ---- networks


def test_repeats_of_a_network_take_the_next_seeds(phema, run_folder):
    words = ("evaluate", "run", "--sigma-rel", "0.1", *QUICK, "--json")
    (row,) = results(phema(*words, "--repeats", 2))
    (first,) = results(phema(*words))
    (second,) = results(phema(*words, "--seed", 40))
    assert [numbers["fd"] for numbers in row["repeats"]] == [first["fd"], second["fd"]]
    assert first["fd"] != second["fd"]
    assert row["accuracy"] == pytest.approx((first["accuracy"] + second["accuracy"]) / 2)


def test_classes_are_in_turn_or_drawn(phema, run_folder):
    words = ("evaluate", "run", "--sigma-rel", "0.1", *QUICK, "--json")
    (default,), (turn,), (drawn,) = (
        results(phema(*words, *more))
        for more in ((), ("--classes", "in-turn"), ("--classes", "drawn"))
    )
    assert default == turn
    assert drawn["fd"] != turn["fd"]


def test_guidance_changes_what_is_measured_and_is_described(phema, run_folder):
    words = ("evaluate", "run", "--sigma-rel", "0.1", *QUICK)
    guide = ("--guide", "run", "--guide-sigma-rel", "0.2", "--guide-at", 160)
    (plain,) = results(phema(*words, "--json"))
    (off,) = results(phema(*words, *guide, "--guidance", 1, "--json"))
    assert off["fd"] == pytest.approx(plain["fd"], rel=1e-9)
    done = phema(*words, *guide, "--guidance", 2.5, "--json").succeeded()
    value = json.loads(done)
    assert value["results"][0]["fd"] != pytest.approx(plain["fd"], rel=1e-3)
    assert value["metric"].endswith("guidance=2.5")


def test_a_sweep_takes_metrics_by_name(phema, run_folder):
    words = ("sweep", "run", "--sigma-rel", "0.05,0.1", "--no-raw", "--out", "sweep", *QUICK)
    done = phema(*words, "--metric", "precision-recall-digits", "--json")
    value = json.loads(done.out)
    assert done.code == 0
    assert list(value["rows"][0]["values"]) == ["precision_digits", "recall_digits", "accuracy"]
    assert value["higher_is_better"] is True
    (row, *_) = results(
        phema(
            *("evaluate", "run", "--sigma-rel", "0.05,0.1", *QUICK, "--json"),
            *("--metric", "precision-recall-digits"),
        )
    )
    assert value["rows"][0]["values"]["precision_digits"] == row["precision_digits"]


def torchrun(folder, *words):
    """`torchrun --nproc-per-node 2 -m phema WORDS` in `folder`."""
    program = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "phema",
    )
    return subprocess.run(
        [sys.executable, *program, *map(str, words), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_measure_what_one_measures(phema, run_folder, digit_files, tmp_path):
    """Two averages, and batches that do not come out even."""
    words = (
        *("evaluate", "run", "--sigma-rel", "raw,0.1", "--num-images", 41, "--steps", 2),
        *("--batch-size", 8, "--json"),
    )
    alone = json.loads(phema(*words).succeeded())
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert shared["metric"] == alone["metric"]
    for one, two in zip(alone["results"], shared["results"], strict=True):
        assert two == {
            key: value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            for key, value in one.items()
        }


def test_two_processes_make_the_reference_that_one_makes(phema, digit_files, tmp_path):
    words = ("reference", "make", digit_files, "--metric", "fd-digits", "--features", 30)
    words += ("--batch-size", 7)
    phema(*words, "--out", "one.safetensors").succeeded()
    done = torchrun(tmp_path, *words, "--out", "two.safetensors")
    assert done.returncode == 0, done.stderr
    one, two = (read_references(tmp_path / f"{n}.safetensors")["digits"] for n in ("one", "two"))
    assert np.array_equal(one.features, two.features)
    assert two.moments.count == 60
    assert two.moments.mean == pytest.approx(one.moments.mean, rel=1e-12)
    assert two.moments.covariance == pytest.approx(one.moments.covariance, rel=1e-9, abs=1e-12)
    assert (one.fingerprint, one.weights_hash) == (two.fingerprint, two.weights_hash)


# ---- published statistics


def write_published(path, dim=4):
    x = np.random.default_rng(0).normal(size=(50, dim))
    entry = {"mu": x.mean(axis=0), "sigma": np.cov(x.T)}
    path.write_bytes(pickle.dumps({"num_images": 50, "fid": entry, "fd_dinov2": entry}))
    return entry


def test_published_statistics_are_imported(phema, tmp_path):
    entry = write_published(tmp_path / "img512.pkl")
    value = json.loads(phema("reference", "import", "img512.pkl", "--json").succeeded())
    assert value["out"] == "img512.safetensors"
    assert [row["extractor"] for row in value["references"]] == ["inception", "dinov2"]
    read = read_references("img512.safetensors")
    assert np.array_equal(read["inception"].moments.covariance, entry["sigma"])
    phema("reference", "import", "img512.pkl").refused("img512.safetensors exists", "--overwrite")
    lines = phema("reference", "import", "img512.pkl", "--overwrite").succeeded().splitlines()
    assert lines[1].split() == ["inception", "50", "0", "unknown", "img512.pkl"]


# ---- what is refused


def prepare_bad_input(folder):
    write_published(folder / "img512.pkl")
    (folder / "hostile.pkl").write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
    (folder / "cut.safetensors").write_bytes(b"\x00\x01")
    (folder / "empty").mkdir()
    rgb = folder / "rgb"
    rgb.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(rgb / f"img{i:08d}.png")
    (folder / "one").mkdir()
    Image.new("L", (8, 8)).save(folder / "one" / "img00000000.png")
    np.savez(folder / "stats.npz", mu=np.zeros(2048))


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("evaluate", "digits", "--metric", "fdi"), ("got 'fdi'. Did you mean 'fid'?",)),
        (("evaluate", "digits", "--metric", "fid"), ("metric fid needs", "phema reference make")),
        (("evaluate", "digits", "--ref", "cut.safetensors"), ("cut.safetensors", "not a readable")),
        (("evaluate", "digits", "--ref", "gone.safetensors"), ("gone.safetensors", "missing")),
        (("evaluate", "digits", "--sigma-rel", "0.1"), ("--sigma-rel goes with networks",)),
        (
            ("evaluate", "digits", "--guide", "rgb", "--guidance", "2"),
            ("--guide goes with networks",),
        ),
        (("evaluate", "digits", "--num-images", "50", "--repeats", "2"), ("60 images; 2 x 50",)),
        (("evaluate", "digits", "--weights", "x"), ("comes with the package",)),
        (("evaluate", "digits", "--classes", "all"), ("--classes must be in-turn or drawn",)),
        (("evaluate", "one"), ("at least 2 images, got 1",)),
        (("evaluate", "rgb"), ("[n, 1, 8, 8], got uint8 [3, 3, 8, 8]",)),
        (("evaluate", "empty"), ("empty",)),
        (("evaluate", "digits", "--metric", "fid,fd-dinov2", "--weights", "x"), ("inception=x",)),
        (("reference", "import", "hostile.pkl"), ("posix.system, which is not done",)),
        (("reference", "import", "stats.npz"), ("stats.npz", "sigma")),
        (("reference", "import", "gone.pkl"), ("gone.pkl does not exist",)),
        (("reference", "import", "img512.pkl", "--out", "a.txt"), ("must end in .safetensors",)),
        (("reference", "make", "digits", "--metric", "fid", "--out", "a.pkl"), ("--out must end",)),
        (
            ("reference", "make", "gone", "--metric", "fd-digits", "--out", "a.safetensors"),
            ("gone",),
        ),
    ],
)
def test_bad_input_is_one_sentence(phema, tmp_path, digit_files, unchanged, words, fragments):
    prepare_bad_input(tmp_path)
    Path("digits").symlink_to(digit_files)
    with unchanged():
        phema(*words).refused(*fragments)


def test_a_reference_of_another_extractor_says_both(phema, tmp_path, digit_files):
    write_published(tmp_path / "img512.pkl")
    phema("reference", "import", "img512.pkl").succeeded()
    words = ("evaluate", digit_files, "--metric", "kid", "--ref", "img512.safetensors")
    phema(*words).refused("metric kid compares single features", "img512.safetensors")


def test_without_its_package_a_metric_says_what_to_install(process, tmp_path, digit_files):
    """A process in which torch-fidelity cannot be found."""
    write_published(tmp_path / "img512.pkl", 2048)
    program = (
        "import sys; sys.modules['torch_fidelity'] = None; from phema.__main__ import main; main()"
    )
    made = process("reference", "import", "img512.pkl")
    assert made.code == 0, made
    words = ("evaluate", digit_files, "--metric", "fid", "--ref", "img512.safetensors")
    done = process(*words, program=("-c", program))
    done.refused("need torch_fidelity", "pip install 'posthoc-ema[metrics]'")
