"""The documentation is true: help texts, code, commands, messages and links."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = ("posthoc_ema", "reference_trainer", "cli")


def named(path):
    return str(path.relative_to(ROOT))


def blocks(page, language):
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def commands():
    """Every `phema ...` line of every shell block."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "phema":
                    yield pytest.param(
                        words[1:], id=f"{named(page)}: {line.partition('#')[0].strip()}"
                    )


def test_the_reference_of_the_command_line_is_what_help_prints():
    """The frozen help texts: a changed option shows up here, and `make docs` takes it over."""
    page = ROOT / "docs" / "reference" / "command-line.md"
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert generate.page() == page.read_text("utf-8"), "`make docs` writes it anew"
    from phema.app import app

    commands = typer.main.get_command(app).commands
    inner = {
        f"{name} {word}"
        for name, group in commands.items()
        for word in getattr(group, "commands", ())
    }
    assert set(generate.COMMANDS) == {*commands, *inner}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def pages_of_code():
    """Pages with Python; what a framework warns about itself is no fault of the page that uses it."""
    for page in PAGES:
        code = "".join(blocks(page, "python"))
        foreign = re.search(r"^(?:import|from) (?:lightning|transformers|peft)", code, re.M)
        marks = [pytest.mark.filterwarnings("ignore")] if foreign else []
        if code:
            yield pytest.param(page, id=named(page), marks=marks)


@pytest.mark.parametrize("page", list(pages_of_code()))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """The blocks of a page are one program: later ones see the names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("words", list(commands()))
def test_commands_of_the_pages_are_understood(words):
    from phema.app import app

    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], list(words[1:])).close()


def test_the_commands_of_the_readme_work_on_a_store(phema, snapshots, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Path("eval.py").write_text("import os; print(abs(float(os.environ['PHEMA_SIGMA_REL']) - 0.1))")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    (block,) = (b for b in blocks(ROOT / "README.md", "bash") if "phema plan" in b)
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    made = ["plan", "ls", "synth", "synth", "sweep", "plot", "prune", "verify"]
    assert [words[0] for words in lines] == made
    phema(
        "synth", snapshots, "--sigma-rel", "raw", "--out", "my-model/model.safetensors"
    ).succeeded()
    Path("my-model/config.json").write_text("{}")
    for words in lines:
        done = phema(*words, *(["--no-raw"] if words[0] == "sweep" else []))
        assert done.code == 0, done
    assert Path("curve.png").stat().st_size > 5000


def messages(page):
    """First column of the tables of a page of messages."""
    rows = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    return [row.split(" | ")[0].strip("| ")[1:-1] for row in rows if row.startswith("| `")]


def text_of(node):
    """A string of the code, with ... for what is filled in; None if the node is none."""
    if isinstance(node, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@functools.cache
def nodes():
    """The syntax of the packages, file by file."""
    return [
        node
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]


@functools.cache
def texts():
    """Every string of the packages."""
    return {text for node in nodes() if (text := text_of(node)) is not None}


def tracking_errors():
    """What the code says as TrackingError, where it stands there as a text."""
    for node in nodes():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TrackingError":
            text = text_of(node.args[0])
            if text is not None:
                yield text


@pytest.mark.parametrize("message", messages("reference/errors.md"))
def test_messages_of_the_table_of_errors_exist(message):
    filled = message.replace("0.2887", "...").replace("torch", "...")
    filled = filled.replace("No space left on device", "...").replace("manifest.json", "...")
    for part in filled.split(": "):
        assert any(part in text for text in texts()), part


@pytest.mark.parametrize("message", messages("how-to/troubleshooting.md"))
def test_messages_of_troubleshooting_are_said_by_the_code(message):
    assert any(message in text for text in texts()), message


def test_every_tracking_error_is_on_one_of_the_pages():
    known = [*messages("reference/errors.md"), *messages("how-to/troubleshooting.md")]
    unknown = [text for text in tracking_errors() if not any(row in text for row in known)]
    assert unknown == []


def test_the_tree_of_errors_is_the_one_of_the_code():
    import posthoc_ema.errors as errors

    page = (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8")
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert set(re.findall(r"\b\w+(?:Error|Warning)\b", page)) >= {c.__name__ for c in classes}


def test_the_changelog_names_the_version_of_the_package():
    from posthoc_ema import __version__

    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(.*?)\]", text, re.M)[0] == __version__
