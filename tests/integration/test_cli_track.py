"""`phema track -- COMMAND` with real processes: what the user, the command and the shell see."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from phema.track_options import quick_parse
from posthoc_ema import SnapshotStore, synthesize

PYTHON = sys.executable
PHEMA = (PYTHON, "-m", "phema")
TRAIN = """
import os, sys, time
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))

def main(steps, pause=0.0, path="checkpoint.pt", code=0):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    done = 0
    if os.path.exists(path):
        held = torch.load(path)
        net.load_state_dict(held["net"])
        optimizer.load_state_dict(held["optimizer"])
        done = held["done"]
    for step in range(done, steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(pause)
        print(step + 1, repr(loss.item()), flush=True)
        if (step + 1) % 10 == 0:
            held = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            torch.save(held, path + ".new")
            os.replace(path + ".new", path)
    torch.save(net.state_dict(), "final.pt")
    sys.exit(code)
"""
END = "phema track: 25 steps, 3 snapshots in ./snapshots (sigma_rel 0.04, 0.15)\n"


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def work(tmp_path):
    """A folder with the module `training`."""
    (tmp_path / "training.py").write_text(TRAIN, "utf-8")
    return tmp_path


def run(folder, *command, **options):
    """Run a command to its end."""
    return subprocess.run(
        [str(word) for word in command],
        **{
            "cwd": folder,
            "capture_output": True,
            "text": True,
            "timeout": 120,
            "env": environment(),
            **options,
        },
    )


def track(folder, *words, **options):
    return run(folder, *PHEMA, "track", *words, **options)


def script(folder, name, text):
    (folder / name).write_text(textwrap.dedent(text), "utf-8")
    return name


def start(folder, *words):
    """`phema track` in a session of its own, its stdout read line by line."""
    return subprocess.Popen(
        [*PHEMA, "track", *words],
        cwd=folder,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process, step):
    """Wait for a step of `training.main`."""
    for line in process.stdout:
        if line.startswith(f"{step} "):
            return
    raise AssertionError(process.stderr.read())


# ---- the command is not changed


def test_a_script_runs_as_without_and_its_averages_load(work):
    script(work, "train.py", "import training; training.main(25, code=3)")
    plain = run(work, PYTHON, "train.py")
    (work / "checkpoint.pt").unlink()
    final = torch.load(work / "final.pt")
    tracked = track(work, "--every", "10", "--", PYTHON, "train.py")
    assert (plain.returncode, plain.stderr) == (3, "")
    assert (tracked.returncode, tracked.stdout) == (3, plain.stdout)
    assert tracked.stderr == END
    for name, value in torch.load(work / "final.pt").items():
        assert torch.equal(value, final[name])
    assert SnapshotStore.open(work / "snapshots").times == [10, 20, 25]
    made = run(work, *PHEMA, "synth", "--sigma-rel", "0.1", "--out", "a.safetensors", "snapshots")
    assert made.returncode == 0, made.stderr
    from safetensors.torch import load_file

    assert load_file(work / "a.safetensors").keys() == final.keys()


def test_children_of_every_kind_are_followed_and_idle_ones_write_nothing(work):
    """`-m`; workers that are forked, and one that is spawned and trains."""
    script(
        work,
        "launcher.py",
        """
        import multiprocessing, sys
        import torch
        import training

        def idle():
            sys.exit(0)

        if __name__ == "__main__":
            data = torch.utils.data.TensorDataset(torch.randn(8, 3))
            assert len(list(torch.utils.data.DataLoader(data, num_workers=2))) == 8
            for method, target, arguments in (
                ("fork", idle, ()), ("spawn", training.main, (25,)),
            ):
                child = multiprocessing.get_context(method).Process(target=target, args=arguments)
                child.start()
                child.join()
                assert child.exitcode == 0
        """,
    )
    done = track(work, "--every=10", "--report=report.json", PYTHON, "-m", "launcher")
    assert (done.returncode, done.stderr) == (0, END)
    (report,) = json.loads((work / "report.json").read_text("utf-8"))["tracked"]
    assert (report["model"], report["steps"], report["ended"]) == ("Net", 25, True)
    made = {path.name for path in work.iterdir() if path.is_dir()}
    assert made - {"__pycache__"} == {"snapshots"}


def test_stdin_and_a_terminal_reach_the_command(tmp_path):
    done = track(tmp_path, "--", "cat", input="words")
    assert (done.returncode, done.stdout) == (0, "words")
    ours, theirs = pty.openpty()
    done = track(tmp_path, "--", PYTHON, "-c", "print(open(0).isatty())", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert done.stdout == "True\n"


def test_the_environment_of_the_command_is_the_users(tmp_path):
    """But for three variables of ours, and a PYTHONPATH that begins with our folder."""
    code = "import json, os, sys; print(json.dumps([dict(os.environ), sys.path]))"
    one, two = (
        json.loads(
            run(tmp_path, *words, PYTHON, "-c", code, env=environment(PYTHONPATH="x")).stdout
        )
        for words in ((), (*PHEMA, "track", "--"))
    )
    assert one[1] == two[1]
    assert {key for key in two[0] if two[0][key] != one[0].get(key)} == {
        "PYTHONPATH",
        "PHEMA_TRACK",
        "PHEMA_TRACK_EVENTS",
    }
    assert two[0]["PYTHONPATH"].endswith(f"{os.pathsep}x")


def test_a_sitecustomize_of_the_users_runs_as_before(tmp_path):
    script(tmp_path, "sitecustomize.py", "import sys; sys.theirs = __file__")
    code = "import sitecustomize, sys; print(sys.theirs, sitecustomize.__file__)"
    done = track(tmp_path, "--", PYTHON, "-c", code, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.stdout == f"{tmp_path / 'sitecustomize.py'} {tmp_path / 'sitecustomize.py'}\n"


def test_a_closed_stderr_does_not_change_the_exit_code(tmp_path):
    command = f"{PYTHON} -m phema track -- sh -c 'exit 5' 2>&-; echo $?"
    assert run(tmp_path, "sh", "-c", command).stdout == "5\n"


def test_no_temporary_folder_is_left(tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    for command in (("true",), ("sh", "-c", "kill -9 $$"), ("nonsense",)):
        track(tmp_path, "--", *command, env=environment(TMPDIR=str(folder)))
    assert not list(folder.iterdir())


# ---- the end of the command


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("true",), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -15 $$"), -15),
        (("sh", "-c", "kill -9 $$"), -9),
        (("sh", "-c", "kill -6 $$"), -6),
        ((PYTHON, "-c", "raise SystemExit(255)"), 255),
    ],
)
def test_the_end_of_the_command_is_ours(tmp_path, command, code):
    assert track(tmp_path, "--", *command).returncode == code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT"])
def test_signals_are_passed_on_once(tmp_path, name):
    """The command counts what it gets, and ends when it is told to."""
    number = getattr(signal, name).value
    script(
        tmp_path,
        "count.py",
        f"""
        import signal, time
        seen = []
        signal.signal({number}, lambda *_: seen.append(1))
        print("ready", flush=True)
        while not seen:
            time.sleep(0.01)
        time.sleep(0.2)
        print(len(seen))
        """,
    )
    process = start(tmp_path, "--", PYTHON, "count.py")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "1\n"), err


def test_ctrl_c_on_a_terminal_reaches_the_command_once(tmp_path):
    """The terminal sends it to both of us: it is not passed on as well."""
    script(
        tmp_path,
        "count.py",
        """
        import signal, time
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        print("ready", flush=True)
        while not seen:
            time.sleep(0.01)
        time.sleep(0.3)
        print("seen", len(seen), flush=True)
        """,
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(PYTHON, [*PHEMA, "track", "--", PYTHON, "count.py"], environment())
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        shown += piece
        if b"ready" in shown and b"^C" not in shown:
            os.write(terminal, b"\x03")
            shown += b"^C"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"seen 1\r\n" in shown


def test_usr1_stores_a_snapshot_and_term_another_before_the_end(work):
    script(work, "train.py", "import training; training.main(100_000, pause=0.01)")
    process = start(work, "--every", "100000", "--", PYTHON, "train.py")
    until(process, 5)
    process.send_signal(signal.SIGUSR1)
    until(process, 40)
    first = SnapshotStore.open(work / "snapshots").times
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    times = SnapshotStore.open(work / "snapshots").times
    assert len(first) == 1
    assert times[:1] == first
    assert len(times) == 2
    assert err == (
        f"phema track: {times[-1]} steps, 2 snapshots in ./snapshots (sigma_rel 0.04, 0.15)\n"
    )


def test_a_killed_run_is_continued_by_running_it_again(work):
    script(work, "train.py", "import training; training.main(25)")
    script(work, "slow.py", "import training; training.main(25, pause=0.02)")
    assert track(work, "--every=5", "--out=whole", "--", PYTHON, "train.py").returncode == 0
    (work / "checkpoint.pt").unlink()
    process = start(work, "--every", "5", "--", PYTHON, "slow.py")
    until(process, 14)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    again = track(work, "--every", "5", "--", PYTHON, "train.py")
    assert again.returncode == 0
    assert "phema track: 25 steps, continued at 10, 3 snapshots in ./snapshots" in again.stderr
    stores = [SnapshotStore.open(work / name) for name in ("whole", "snapshots")]
    assert stores[0].times == stores[1].times == [5, 10, 15, 20, 25]
    whole, continued = (synthesize(store, sigma_rel=0.1) for store in stores)
    for name in whole:
        assert (whole[name] == continued[name]).all()
    fresh = track(
        work, "--every", "5", "--", PYTHON, "-c", "import training as t; t.main(25, path='no')"
    )
    assert fresh.returncode == 0
    assert fresh.stderr.count("\n") == 2
    assert (
        "with states to continue from at 10, 20, 25; this one starts at its beginning"
        in fresh.stderr
    )


def test_a_run_that_was_killed_before_its_first_snapshot_is_started_anew(work):
    script(work, "slow.py", "import training; training.main(25, pause=0.02)")
    process = start(work, "--every", "50", "--", PYTHON, "slow.py")
    until(process, 4)  # before the script's first checkpoint, too
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert SnapshotStore.open(work / "snapshots").times == []
    again = track(work, "--every", "50", "--", PYTHON, "slow.py")
    assert "phema track: 25 steps, 1 snapshot" in again.stderr


def test_a_run_that_is_tracked_from_its_middle_on_is_told_so(work):
    script(work, "train.py", "import training; training.main(10)")
    script(work, "more.py", "import training; training.main(20)")
    assert run(work, PYTHON, "train.py").returncode == 0
    late = track(work, "--every", "5", "--", PYTHON, "more.py")
    assert "the optimizer has made 10 steps before: time" in late.stderr
    assert "phema track: 10 steps, 2 snapshots in ./snapshots" in late.stderr


# ---- what is said when nothing is tracked


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("true",), "no Python process of the command took up the hook"),
        ((PYTHON, "-I", "-c", "pass"), "no Python process of the command took up the hook"),
        ((PYTHON, "-S", "-c", "pass"), "no Python process of the command took up the hook"),
        ((PYTHON, "-c", "pass"), "torch.optim was not imported in the Python process"),
        (
            ("sh", "-c", f"{PYTHON} -c pass; {PYTHON} -c pass"),
            "torch.optim was not imported in any of 2 Python processes",
        ),
        (
            (PYTHON, "-c", "import torch; torch.optim.SGD([torch.ones(1)])"),
            "no optimizer took a step in the Python process",
        ),
    ],
)
def test_the_reason_why_nothing_was_tracked_is_said(tmp_path, command, why):
    done = track(tmp_path, "--", *command)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"phema track: nothing was tracked: {why}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "snapshots").exists()


def test_a_python_without_the_library_is_named(work):
    (work / "other").mkdir()
    script(work, "other/posthoc_ema.py", "raise ImportError('not here')")
    (work / "training.py").rename(work / "other/training.py")
    script(work, "other/train.py", "import training; training.main(2)")
    done = track(work, "--", PYTHON, "other/train.py")
    assert done.returncode == 0
    assert done.stderr == (
        f"phema track: nothing was tracked: {PYTHON} could not load posthoc_ema (ImportError: not "
        "here). Install it there: pip install 'posthoc-ema[torch]'.\n"
    )


def test_a_command_that_cannot_be_started_is_exit_code_1_and_one_line(tmp_path):
    script(tmp_path, "train.py", "")
    for command, message in (
        ("nonsense", "nonsense: No such file or directory. Check the name of the command"),
        (
            "./train.py",
            "./train.py: Permission denied. Write `phema track ... -- python ./train.py`.",
        ),
    ):
        done = track(tmp_path, "--", command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"phema track: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--every", "10"), "track needs the command that trains: phema track [OPTIONS] --"),
        (("--every", "0", "true"), "--every must be a positive whole number, got '0'"),
        (("--keep", "some", "true"), "--keep must be a positive whole number, got 'some'"),
        (("--sigma-rel", "0.3", "true"), "sigma_rel must lie in (0, 0.2887], got 0.3"),
        (("--sigma-rel", "0.1,raw", "true"), "raw weights are stored beside the tracked lengths"),
        (("--keep-range", "0.2,0.1", "true"), "--range must be two rising lengths"),
        (("--kernel", "fast", "true"), "--kernel must be one of auto, eager, compiled, triton"),
        (("--model", "(", "true"), "--model '(' is no regular expression"),
        (("--out", "", "true"), "--out is empty"),
    ],
)
def test_wrong_words_are_exit_code_1_and_one_line(phema, words, message):
    assert quick_parse(words) is None  # so that it comes to the parser that explains
    phema("track", *words).refused(message)


@pytest.mark.parametrize("words", [("--fly", "true"), ("--every",), ("--restart=1", "true")])
def test_wrong_usage_is_exit_code_2(phema, words):
    assert quick_parse(words) is None
    done = phema("track", *words)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err


def test_ranges_of_lengths_are_understood(tmp_path):
    code = "import ast, os; print(ast.literal_eval(os.environ['PHEMA_TRACK'])['sigma_rels'])"
    done = track(tmp_path, "--sigma-rel", "0.02,0.04,...,0.08", "--", PYTHON, "-c", code)
    assert done.stdout == "[0.02, 0.04, 0.06, 0.08]\n"


def test_options_of_the_command_are_its_own(tmp_path):
    code = "import sys; print(sys.argv[1:])"
    for dashes in (("--",), ()):
        done = track(tmp_path, *dashes, PYTHON, "-c", code, "--every", "x", "--", "--out")
        assert done.stdout == "['--every', 'x', '--', '--out']\n"


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    done = track(tmp_path, "--report", "no/report.json", "--", "true")
    assert done.returncode == 0
    assert "phema track: --report no/report.json: No such file or directory." in done.stderr
