"""`phema track`: averages of any training, without a change to its code.

This is the way of `--help` and of wrong options; `phema.track_options` says why there is another.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from phema.options import parse_sigma_rels
from phema.ranges import parse_range
from phema.track_options import OPTIONS, Option, values_of
from phema.track_run import run_tracked
from posthoc_ema import ConfigError

COMMAND = "command"
_METAVARS = {"count": "N", "budget": "N|all"}
_LONG = 30  # characters of choices that would fill the column of the options


def command(**given: Any) -> None:
    """Track the model that COMMAND trains with PyTorch, whatever it is: nothing in it changes.

    COMMAND is what you write without us: python train.py, torchrun ..., accelerate launch ... Its exit
    code, signals, stdin, stdout and stderr stay as they are; at the end one line on stderr says what was
    tracked, or why nothing was. Running it again continues, if the script itself does. SIGUSR1 stores a
    snapshot at once, SIGTERM before the process ends, unless the script handles them.

    For example:

      phema track --every 1000 -- torchrun --nproc-per-node 8 train.py
    """
    words = given.pop(COMMAND)
    if not words:
        raise ConfigError(
            "track needs the command that trains: phema track [OPTIONS] -- python train.py."
        )
    texts: dict[str, str] = {}
    for option in OPTIONS:
        value = given[option.name]
        if option.kind == "switch":
            texts |= {option.name: "yes"} if value else {}
        elif value is not None:
            texts[option.name] = _plain(option, value)
    try:
        values = values_of(texts)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    raise typer.Exit(run_tracked(values, words))


def _plain(option: Option, text: str) -> str:
    """Ranges of lengths as lists, and a good message for what is none."""
    if option.kind == "lengths":
        lengths = parse_sigma_rels(text)
        if 0.0 in lengths:
            raise ConfigError(
                f"{option.flag} {text}: raw weights are stored beside the tracked lengths (--raw)."
            )
        return ",".join(map(repr, lengths))
    if option.kind == "range":
        return ",".join(map(repr, parse_range(text)))
    return text


def _parameter(option: Option) -> inspect.Parameter:
    """What typer reads an option from."""
    kind: Any = bool if option.kind == "switch" else str | None
    help_ = option.help
    info = typer.Option(
        option.flag, help=help_, metavar=option.metavar or _METAVARS.get(option.kind)
    )
    choices = "|".join(option.choices)
    if choices and len(choices) < _LONG:
        info = typer.Option(option.flag, help=help_, metavar=choices)
    default = False if option.kind == "switch" else option.default
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _signature() -> inspect.Signature:
    words = inspect.Parameter(
        COMMAND,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Argument(metavar="COMMAND", help="What to run, with its arguments."),
        ],
    )
    return inspect.Signature([words, *map(_parameter, OPTIONS)])


command.__signature__ = _signature()  # type: ignore[attr-defined]
command.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
