"""Must-show 7 of the issue: bad input ends with exit code 1 and one line that says what, where, what to do.

Each case starts with a sound store (and two others to mix in), breaks something, runs a command, and
compares every file of the working folder before and after: nothing is lost, nothing is left behind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SYNTH = ("synth", "snapshots", "--out", "out", "--sigma-rel")
ALL_COMMANDS = [
    ("synth", "--out", "out", "--sigma-rel", "0.07"),
    ("sweep", "--out", "out", "--sigma-rel", "0.07", "--metric", "echo 1 {weights}"),
    ("plot", "--out", "out/picture.png"),
    ("sample", "--out", "out/picture.png", "--sigma-rel", "0.07"),
    ("evaluate", "--sigma-rel", "0.07"),
    ("ls",),
    ("verify",),
]
FILE = "snapshots/000000000020-sigma_rel-0.05.safetensors"


def named(command):
    return command[0]


def on(command, folder):
    return (command[0], folder, *command[1:])


# ---- lengths


@pytest.mark.parametrize("command", ALL_COMMANDS[:5], ids=named)
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0", "sigma_rel must lie in (0, 0.2887], got 0."),
        ("0.3", "sigma_rel must lie in (0, 0.2887], got 0.3."),
        ("nan", "sigma_rel must lie in (0, 0.2887], got nan."),
        ("0.1,...,0.2", "--sigma-rel 0.1,...,0.2: a range needs two numbers before the dots"),
        ("", "--sigma-rel '': it is empty. Write 0.07"),
    ],
)
def test_lengths_that_do_not_exist(phema, unchanged, run_folder, command, text, what):
    words = [w for w in on(command, "run") if w not in ("--sigma-rel", "0.07")]
    with unchanged():
        phema(*words, "--sigma-rel", text).refused(what)


# ---- folders


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=named)
def test_an_empty_folder(phema, unchanged, tmp_path, command):
    (tmp_path / "empty").mkdir()
    with unchanged():
        phema(*on(command, "empty")).refused(
            "empty is not a folder of snapshots: it has no manifest.json.", "Give the folder"
        )


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=named)
def test_a_missing_folder(phema, unchanged, command):
    with unchanged():
        phema(*on(command, "missing")).refused("missing does not exist")


@pytest.mark.parametrize("command", ALL_COMMANDS[:3], ids=named)
def test_a_time_that_is_not_stored(phema, unchanged, snapshots, command):
    with unchanged():
        phema(*on(command, "snapshots"), "--at", "21").refused(
            "--at must be a stored time, got 21.",
            "snapshots holds 10 times from 4 to 40 steps; the nearest are 16, 20, 24.",
        )


# ---- damaged and foreign snapshot files


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_to_nothing(path):
    path.write_bytes(b"")


def append(path):
    path.write_bytes(path.read_bytes() + b"\0")


def make_foreign(path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, path)


def make_text(path):
    path.write_text("not a tensor in sight, but long enough to hold a header")


def flip_in_header(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)


def flip_in_data(path):
    data = bytearray(path.read_bytes())
    data[-300] ^= 4
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("command", [ALL_COMMANDS[0], ALL_COMMANDS[1]], ids=named)
@pytest.mark.parametrize(
    ("damage", "what", "to_do"),
    [
        (truncate, "not a readable safetensors file", "restore it"),
        (cut_to_nothing, "not a readable safetensors file", "restore it"),
        (append, "not a readable safetensors file", "restore it"),
        (make_text, "not a readable safetensors file", "restore it"),
        (make_foreign, "not a snapshot of this tool", "Restore the file"),
        (flip_in_header, "", "estore"),
        (flip_in_data, "is damaged (checksum)", "Restore the file"),
        (remove, "the file is missing", "Restore it"),
    ],
)
def test_a_damaged_or_foreign_file(
    phema, unchanged, snapshots, tmp_path, command, damage, what, to_do
):
    damage(tmp_path / FILE)
    with unchanged():
        phema(*on(command, "snapshots")).refused(FILE, what, to_do)


@pytest.mark.parametrize("damage", [truncate, make_foreign, flip_in_header, flip_in_data, remove])
def test_verify_lists_the_damaged_file_and_goes_on(phema, unchanged, snapshots, tmp_path, damage):
    damage(tmp_path / FILE)
    other = tmp_path / FILE.replace("20-", "24-")
    truncate(other)
    with unchanged():
        done = phema("verify", "snapshots")
    assert done.code == 1
    *lines, left = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [FILE, f"snapshots/{other.name}"]
    assert "can be combined: `phema verify --drop`" in left
    assert "2 problems" in done.out


def test_any_flipped_bit_in_an_input_is_found(phema, snapshots, tmp_path):
    data = (tmp_path / FILE).read_bytes()
    for position in [*range(8), *range(8, len(data), len(data) // 40)]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / FILE).write_bytes(changed)
        assert phema("verify", "snapshots").code == 1, position
    (tmp_path / FILE).write_bytes(data)
    assert phema("verify", "snapshots").code == 0


# ---- manifests


def edit_manifest(tmp_path, change):
    path = tmp_path / "snapshots" / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=named)
def test_a_manifest_of_a_newer_schema(phema, unchanged, snapshots, tmp_path, command):
    edit_manifest(tmp_path, lambda value: value.update(schema=99))
    with unchanged():
        phema(*on(command, "snapshots")).refused(
            "snapshots/manifest.json: has schema 99, this version reads up to 2.",
            "pip install --upgrade posthoc-ema",
        )


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=named)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "\x00\xff", pytest.param("[" * 99999, id="deep")]
)
def test_a_manifest_of_broken_json(phema, unchanged, snapshots, tmp_path, command, text):
    (tmp_path / "snapshots" / "manifest.json").write_text(text, encoding="latin-1")
    with unchanged():
        phema(*on(command, "snapshots")).refused(
            "snapshots/manifest.json: cannot be used", "phema verify --rebuild"
        )


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=named)
@pytest.mark.parametrize(
    "path",
    [
        "../other-run/000000000020-sigma_rel-0.05.safetensors",
        "/etc/passwd",
        "sub/000000000020-sigma_rel-0.05.safetensors",
        "..",
    ],
)
def test_a_manifest_with_a_path_that_leaves_the_folder(
    phema, unchanged, snapshots, tmp_path, command, path
):
    edit_manifest(tmp_path, lambda value: value["snapshots"][3].update(file=path))
    with unchanged():
        phema(*on(command, "snapshots")).refused(
            "snapshots/manifest.json", repr(path), "no folders"
        )


# ---- mixtures


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("other-run", "Snapshots of two runs cannot be combined"),
        ("other-model", "Snapshots of two runs cannot be combined"),
    ],
)
@pytest.mark.parametrize("command", [ALL_COMMANDS[0], ALL_COMMANDS[1]], ids=named)
def test_snapshots_of_two_runs_mixed(
    phema, unchanged, snapshots, trained, tmp_path, command, source, what
):
    shutil.copy(trained[0] / source / FILE.partition("/")[2], tmp_path / FILE)
    with unchanged():
        phema(*on(command, "snapshots")).refused(FILE, what, "restore the file")


@pytest.mark.parametrize("command", [ALL_COMMANDS[0], ALL_COMMANDS[1]], ids=named)
def test_snapshots_of_two_models_mixed(phema, unchanged, snapshots, trained, tmp_path, command):
    """A file of another model that claims to be of this run: only its tensors give it away."""
    own = json.loads((tmp_path / "snapshots/manifest.json").read_text())["run_id"].encode()
    other = json.loads((trained[0] / "other-model/manifest.json").read_text())["run_id"].encode()
    data = (trained[0] / "other-model" / FILE.partition("/")[2]).read_bytes()
    assert data.count(other) == 1
    (tmp_path / FILE).write_bytes(data.replace(other, own))
    with unchanged():
        phema(*on(command, "snapshots")).refused(FILE, "has shape (16", "must come from one model")


# ---- outputs


def test_a_full_disk_while_an_output_is_written(process, unchanged, snapshots):
    with unchanged():
        process(*SYNTH, "0.07", file_limit=3000).refused(
            "out/sigma_rel-0.07-at-40.safetensors: could not be written: File too large.",
            "Make room",
        )
        process(*SYNTH, "0.05,0.07,raw", file_limit=3000).refused("could not be written")


@pytest.mark.parametrize("command", ALL_COMMANDS[1:3], ids=named)
def test_a_full_disk_while_a_result_is_written(process, unchanged, snapshots, command):
    limit = {"sweep": 3000, "plot": 10_000}[command[0]]
    with unchanged():
        process(*on(command, "snapshots"), file_limit=limit).refused("out/", "could not be written")


def test_a_full_disk_never_harms_an_older_output(process, unchanged, snapshots, phema):
    phema(*SYNTH, "0.07").succeeded()
    with unchanged():
        process(*SYNTH, "0.07", "--overwrite", file_limit=3000).refused("Make room")


@pytest.mark.parametrize("command", ALL_COMMANDS[:4], ids=named)
def test_a_file_where_the_output_folder_should_be(
    phema, unchanged, snapshots, run_folder, tmp_path, command
):
    (tmp_path / "out").write_text("precious")
    with unchanged():
        phema(*on(command, "run")).refused("out: cannot be made or used as a folder", "--out")


def test_an_existing_output_without_overwrite(phema, unchanged, snapshots):
    phema(*SYNTH, "0.07").succeeded()
    with unchanged():
        phema(*SYNTH, "0.05,0.07").refused(
            "out/sigma_rel-0.07-at-40.safetensors exists already", "another --out or --overwrite"
        )


def test_a_full_stdout_is_one_line(process, snapshots):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "phema", "ls", str(snapshots)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
