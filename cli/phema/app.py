"""The app: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, TextIO

import typer

from phema.commands import (
    convert,
    dataset,
    demo,
    evaluate,
    ls,
    plan,
    plot,
    prune,
    reference,
    sample,
    study,
    sweep,
    synth,
    track,
    train,
    verify,
)
from phema.output import note
from posthoc_ema import PhemaError, PhemaWarning, __version__

app = typer.Typer(
    name="phema",
    help="Post-hoc EMA: choose the averaging length of a network's weights after training.",
    epilog="Exit codes: 0 done, 1 input or files are wrong (one line on stderr says what), 2 usage.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.command,
    "track": track.command,
    "train": train.command,
    "sample": sample.command,
    "evaluate": evaluate.command,
    "synth": synth.command,
    "sweep": sweep.command,
    "study": study.command,
    "plan": plan.command,
    "prune": prune.command,
    "plot": plot.command,
    "ls": ls.command,
    "verify": verify.command,
    "convert": convert.command,
}

_GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "dataset": (dataset.HELP, dataset.COMMANDS),
    "reference": (reference.HELP, reference.COMMANDS),
}
"""Commands with commands of their own: name -> help, and the commands."""


class _Interrupted(Exception):
    """Ctrl-C, under a name that typer does not swallow."""


class _ReaderGone(Exception):
    """The reader of our output went away, as `head` does."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            raise _Interrupted from None
        except BrokenPipeError:
            raise _ReaderGone from None

    return guarded


for _name, _command in _COMMANDS.items():
    # Without arguments most commands have nothing to do: show how to use them.
    # The words behind `track` are another command's: its options are not ours.
    settings = {"allow_interspersed_args": False} if _name == "track" else None
    app.command(_name, no_args_is_help=_name != "demo", context_settings=settings)(
        _guarded(_command)
    )

for _name, (_help, _commands) in _GROUPS.items():
    _group = typer.Typer(help=_help, no_args_is_help=True, rich_markup_mode=None)
    for _word, _command in _commands.items():
        _group.command(_word, no_args_is_help=True)(_guarded(_command))
    app.add_typer(_group, name=_name)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phema {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


def run(arguments: Sequence[str]) -> int:
    """Run `phema` with `arguments`; returns the exit code. Bugs keep their traceback."""
    logging.basicConfig(format="phema: %(message)s", level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("always", PhemaWarning)
        warnings.showwarning = _show_warning
        return _run(arguments)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are one line like every other message; those of others stay as they are."""
    if issubclass(category, PhemaWarning):
        note(str(message))
    else:
        (file or sys.stderr).write(
            warnings.formatwarning(message, category, filename, lineno, line)
        )


def _run(arguments: Sequence[str]) -> int:
    try:
        app(args=list(arguments), prog_name="phema")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except PhemaError as error:
        return _failed(str(error))
    except _Interrupted:
        typer.echo("phema: interrupted; run the same command again to continue.", err=True)
        return 130
    except _ReaderGone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename if error.filename is not None else "a file or stdout"
        return _failed(
            f"{where}: {error.strerror}. Check the path, its permissions and the room on the disk."
        )
    return 0


def _failed(message: str) -> int:
    typer.echo("phema: " + " ".join(message.split()), err=True)
    return 1
