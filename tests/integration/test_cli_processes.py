"""`phema` as a process: exit codes, signals, pipes, terminals, and what it imports."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from posthoc_ema import __version__

HEAVY = ("torch", "matplotlib", "sklearn", "rich", "scipy.stats", "PIL")
MODULES = f"""
import sys
from phema.app import run
code = run(sys.argv[1:])
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from phema.app import run
sys.exit(run(sys.argv[2:]))
"""


# ---- usage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fly",), "No such command 'fly'"),
        (("synth", "snapshots", "--fly"), "No such option: --fly"),
        (("synth", "snapshots"), "Missing option '--sigma-rel'"),
        (("synth", "--sigma-rel", "0.1"), "Missing argument 'SNAPSHOTS'"),
        (("ls", "a", "b"), "Got unexpected extra argument(s) (b)"),
        (
            ("sample", "run", "--out", "a.png", "--steps", "1"),
            "'--steps': Input should be greater than or equal to 2",
        ),
        (
            ("synth", "snapshots", "--sigma-rel", "0.1", "--at", "x"),
            "'--at': Input should be a valid integer",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2_with_the_usage_line(phema, words, message):
    done = phema(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: phema ")
    assert message in done.err


def test_without_arguments_the_help_is_shown(phema):
    for words in ((), ("synth",), ("ls",)):
        done = phema(*words)
        assert done.code == 2
        assert "Usage: phema" in done.out + done.err


def test_version_and_help_are_exit_code_0(process):
    assert process("--version").succeeded() == f"phema {__version__}\n"
    assert "Commands:" in process("--help").succeeded()
    assert "Exit codes: 0 done, 1 input" in process("-h").succeeded()


def test_the_installed_command_is_the_same(tmp_path):
    command = [os.path.join(os.path.dirname(sys.executable), "phema"), "--version"]  # noqa: PTH118, PTH120
    assert subprocess.check_output(command, text=True) == f"phema {__version__}\n"


def test_a_bug_keeps_its_traceback(phema, snapshots, monkeypatch):
    def broken(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr("posthoc_ema.SnapshotStore.verify", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        phema("verify", "snapshots")


# ---- imports


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("train", "--help"),
        ("ls", "snapshots"),
        ("verify", "snapshots"),
        ("synth", "snapshots", "--sigma-rel", "0.07,raw"),
        (
            "sweep",
            "snapshots",
            "--sigma-rel",
            "0.05,0.1",
            "--metric",
            "echo 1 # {weights}",
            "--out",
            "o",
        ),
    ],
    ids=lambda words: words[0],
)
def test_no_heavy_package_is_loaded_without_need(process, snapshots, words):
    done = process(*words, program=("-c", MODULES))
    assert done.code == 0
    assert done.err.splitlines()[-1] == "loaded:"


def test_importing_the_library_loads_no_torch_and_no_command_line(process):
    code = "import posthoc_ema, sys; print({'torch', 'typer', 'rich', 'matplotlib'} & set(sys.modules))"
    assert process(program=("-c", code)).succeeded() == "set()\n"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("torch,sklearn", ("train", "--preset", "digits-xs", "--out", "run")),
        ("torch,sklearn", ("demo", "--out", "demo")),
        ("torch,sklearn", ("sample", "snapshots", "--sigma-rel", "0.1", "--out", "a.png")),
        ("torch,sklearn", ("evaluate", "snapshots", "--sigma-rel", "0.1")),
        ("sklearn", ("demo", "--out", "demo")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_that_needs_an_extra_says_so_in_one_sentence(
    process, snapshots, unchanged, missing, words
):
    with unchanged():
        process(missing, *words, program=("-c", WITHOUT)).refused(
            f"`phema {words[0]}` needs {missing.split(',')[0]}",
            "which is not installed: pip install 'posthoc-ema[trainer]'.",
        )


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "snapshots"),
        ("verify", "snapshots"),
        ("synth", "snapshots", "--sigma-rel", "0.07"),
        ("plot", "snapshots", "--out", "a.png"),
        (
            "sweep",
            "snapshots",
            "--sigma-rel",
            "0.05",
            "--metric",
            "echo 1 # {weights}",
            "--out",
            "o",
        ),
    ],
    ids=lambda words: words[0],
)
def test_a_base_install_is_enough_for_the_core(process, snapshots, words):
    process("torch,sklearn", *words, program=("-c", WITHOUT)).succeeded()


# ---- pipes, signals, terminals


def test_a_reader_that_goes_away_is_no_error(start, snapshots):
    process = start("ls", "snapshots")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_head_reads_the_first_line(tmp_path, snapshots):
    command = f"set -o pipefail; {sys.executable} -m phema ls snapshots | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("snapshots: run ")
    assert done.stderr == ""


def test_ctrl_c_ends_with_130_and_one_line(start, snapshots, tmp_path):
    metric = "touch begun; sleep 60; echo {weights} 1"
    words = ("sweep", "snapshots", "--sigma-rel", "0.1", "--metric", metric, "--out", "out")
    process = start(*words)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "phema: interrupted; run the same command again to continue.\n"
    assert not (tmp_path / "out").exists()


def on_terminal(start, *words):
    """Run with stderr on a terminal; returns exit code, stdout, what the terminal got."""
    ours, theirs = pty.openpty()
    process = start(*words, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    finally:
        os.close(ours)
    out = process.stdout.read()
    return process.wait(timeout=60), out, shown.decode()


def test_progress_goes_to_a_terminal_on_stderr_and_leaves_stdout_clean(start, snapshots):
    words = ("synth", "snapshots", "--sigma-rel", "0.05,0.07", "--json")
    code, out, shown = on_terminal(start, *words)
    assert code == 0
    assert len(json.loads(out)["results"]) == 2
    assert "synthesizing" in shown
    assert "100%" in shown


def test_a_sweep_shows_its_progress_on_a_terminal(start, snapshots):
    words = ("sweep", "snapshots", "--sigma-rel", "0.05,0.1", "--metric", "echo 1 # {weights}")
    code, out, shown = on_terminal(start, *words, "--out", "o")
    assert code == 0
    assert "table in o/sweep.csv" in out
    assert "measuring" in shown


def test_an_error_on_a_terminal_is_still_one_line(start, snapshots):
    (snapshots / "000000000020-sigma_rel-0.05.safetensors").write_bytes(b"")
    code, out, shown = on_terminal(start, "synth", "snapshots", "--sigma-rel", "0.07")
    assert (code, out) == (1, "")
    assert "phema: snapshots/000000000020-sigma_rel-0.05.safetensors: not a readable" in shown
