"""The options of `phema track`: one table, for the quick parser and for the help text.

`phema track` is put before commands that may run for a moment only, so it starts without typer (which
alone takes longer to load than Python itself). The quick parser accepts what it is sure of; whatever else
was written, a wrong option for example, goes to typer, which says what is wrong.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

CODECS = ("delta", "delta-float16", "delta-int8", "float32", "float16", "bfloat16")
LONGEST = 12**-0.5
"""The largest sigma_rel; `posthoc_ema.SIGMA_REL_MAX` without loading NumPy."""


class Option:
    """One option; no dataclass, whose module takes longer to load than all else here together.

    Args:
        name: its name in the configuration.
        flag: how it is written.
        kind: what it takes: text, count (1, 2, ...), budget (a count or "all"), lengths, range, choice,
            or switch (nothing).
        help: the help text.
        default: value without the option, as it would be written.
        metavar: name of the value in the help text.
        choices: of kind "choice".
    """

    __slots__ = ("choices", "default", "flag", "help", "kind", "metavar", "name")

    def __init__(
        self,
        name: str,
        flag: str,
        kind: str,
        help: str,
        default: str | None = None,
        metavar: str | None = None,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.flag = flag
        self.kind = kind
        self.help = help
        self.default = default
        self.metavar = metavar
        self.choices = choices


OPTIONS = (
    Option(
        "out",
        "--out",
        "text",
        "Folder of the snapshots. {model} in it stands for the class of the model; then every model "
        "that is trained is tracked.",
        "snapshots",
        "DIR",
    ),
    Option(
        "sigma_rels",
        "--sigma-rel",
        "lengths",
        "Lengths to track, such as 0.04,0.15; others are synthesized from them later.",
        "0.04,0.15",
        "LIST",
    ),
    Option(
        "every",
        "--every",
        "count",
        "Store a snapshot every N steps (or images, with --samples-per-step).  [default: 1000 steps]",
    ),
    Option(
        "samples_per_step",
        "--samples-per-step",
        "count",
        "Count time in images, N per optimizer step, instead of steps.",
    ),
    Option("update_every", "--update-every", "count", "Update the averages every N steps.", "1"),
    Option(
        "dtype",
        "--dtype",
        "choice",
        "How averages are stored: " + ", ".join(CODECS) + ".",
        "delta",
        "CODEC",
        CODECS,
    ),
    Option(
        "keep",
        "--keep",
        "budget",
        "Stored averages to keep at most while training runs on; all for no limit.",
        "64",
    ),
    Option(
        "keep_range",
        "--keep-range",
        "range",
        "Lengths that will be asked for: those to keep are chosen for them.",
        "0.02,0.25",
        "LO,HI",
    ),
    Option(
        "raw",
        "--raw",
        "choice",
        "Raw weights to keep: of the last snapshot, of all, or none.",
        "last",
        choices=("last", "all", "none"),
    ),
    Option(
        "model",
        "--model",
        "text",
        "Track the model whose class matches REGEX.  [default: the first that is trained]",
        metavar="REGEX",
    ),
    Option(
        "tensors",
        "--tensors",
        "choice",
        "What is stored: all, trainable tensors only, or auto (adapters only, for a PEFT model).",
        "auto",
        choices=("auto", "all", "trainable"),
    ),
    Option(
        "device",
        "--device",
        "choice",
        "Where averages live: auto (beside the weights) or cpu.",
        "auto",
        choices=("auto", "cpu"),
    ),
    Option(
        "average_dtype",
        "--average-dtype",
        "choice",
        "Averages in memory: float32, or bfloat16 with stochastic rounding.",
        "float32",
        choices=("float32", "bfloat16"),
    ),
    Option(
        "kernel",
        "--kernel",
        "choice",
        "How averages are updated: auto, eager, compiled or triton.",
        "auto",
        choices=("auto", "eager", "compiled", "triton"),
    ),
    Option(
        "shard_averages",
        "--shard-averages",
        "switch",
        "Split the averages over the ranks of replicated training.",
    ),
    Option(
        "resume",
        "--resume",
        "choice",
        "exact continues from the state that belongs to the weights; nearest from the newest that is "
        "not later, and takes the gap as one update.",
        "exact",
        choices=("exact", "nearest"),
    ),
    Option(
        "restart",
        "--restart",
        "switch",
        "Discard what DIR holds of an earlier run, and start anew.",
    ),
    Option(
        "states",
        "--states",
        "choice",
        "Keep what resuming needs in DIR/state: on or off.",
        "on",
        choices=("on", "off"),
    ),
    Option(
        "on_error",
        "--on-error",
        "choice",
        "After an error of the tracker: warn lets training go on, raise stops it.",
        "warn",
        choices=("warn", "raise"),
    ),
    Option(
        "report",
        "--report",
        "text",
        "Write what was tracked to FILE as JSON when the command has ended.",
        metavar="FILE",
    ),
)


def quick_parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]] | None:
    """Parse `[options] [--] COMMAND...` if all of it is plainly right.

    Returns:
        (values by name, command), or None: then typer must look at it.
    """
    by_flag = {option.flag: option for option in OPTIONS}
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        flag, equals, text = rest.pop(0).partition("=")
        option = by_flag.get(flag)
        if option is None or (option.kind == "switch" and equals):
            return None
        if option.kind == "switch":
            text = "yes"
        elif not equals:
            if not rest:
                return None
            text = rest.pop(0)
        given[option.name] = text
    if rest[:1] == ["--"]:
        rest.pop(0)
    if not rest:
        return None
    try:
        return values_of(given), rest
    except ValueError:
        return None


def values_of(given: dict[str, str]) -> dict[str, Any]:
    """Values of all options, from the texts of those that were given.

    Raises:
        ValueError: a text is not plainly right.
    """
    values: dict[str, Any] = {}
    for option in OPTIONS:
        text = given.get(option.name, option.default)
        if option.kind == "switch":
            values[option.name] = text is not None
        else:
            values[option.name] = None if text is None else _VALUES[option.kind](option, text)
    return values


def _text(option: Option, text: str) -> str:
    if not text:
        raise ValueError(f"{option.flag} is empty")
    if option.name == "model":
        import re

        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{option.flag} {text!r} is no regular expression: {error}") from None
    return text


def _count(option: Option, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 19 and int(text)):
        raise ValueError(f"{option.flag} must be a positive whole number, got {text!r}")
    return int(text)


def _budget(option: Option, text: str) -> int | None:
    return None if text == "all" else _count(option, text)


def _lengths(option: Option, text: str) -> list[float]:
    lengths = [float(item) for item in text.split(",")]
    if len(set(lengths)) != len(lengths) or not all(0 < x <= LONGEST for x in lengths):
        raise ValueError(f"{option.flag} must be different numbers in (0, {LONGEST:.4f}]")
    return lengths


def _range(option: Option, text: str) -> list[float]:
    low, high = _lengths(option, text)
    if low > high:
        raise ValueError(f"{option.flag} must rise")
    return [low, high]


def _choice(option: Option, text: str) -> str:
    if text not in option.choices:
        raise ValueError(f"{option.flag} must be one of {', '.join(option.choices)}, got {text!r}")
    return text


_VALUES: dict[str, Any] = {
    "text": _text,
    "count": _count,
    "budget": _budget,
    "lengths": _lengths,
    "range": _range,
    "choice": _choice,
}
