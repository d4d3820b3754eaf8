"""Options of guided sampling, shared by the commands that sample, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from phema.networks import open_averages
from phema.options import need_file
from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from reference_trainer.precond import Precond

_PANEL = "Guidance"
T = TypeVar("T")

GuideSources = Annotated[
    list[Path] | None,
    typer.Option(
        "--guide",
        metavar="SOURCE",
        help="Network to move away from: smaller and less trained (autoguidance), or without classes "
        "(classifier-free guidance). May be given twice, to mix; then the options below are given once "
        "for all or once for each.",
        rich_help_panel=_PANEL,
    ),
]
GuideLengths = Annotated[
    list[str] | None,
    typer.Option(
        "--guide-sigma-rel",
        metavar="LENGTH",
        help="Length of the guide's average, for snapshots.",
        rich_help_panel=_PANEL,
    ),
]
GuideTimes = Annotated[
    list[int] | None,
    typer.Option(
        "--guide-at",
        metavar="TIME",
        help="Training time of the guide's average.  [default: the last]",
        rich_help_panel=_PANEL,
    ),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--guidance",
        metavar="W",
        help="Weight of guidance; 1 is none.",
        rich_help_panel=_PANEL,
    ),
]
Intervals = Annotated[
    list[str] | None,
    typer.Option(
        "--guidance-interval",
        metavar="LO,HI",
        help="Guide only at noise levels above LO, up to HI, as in 0.28,2.90.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True, slots=True)
class GuideOptions:
    """The options of one guide, checked.

    Attributes:
        source: a weights file, a run folder or a folder of snapshots.
        sigma_rel: length for snapshots; None for a weights file.
        at: training time for snapshots.
        weight: w.
        interval: (sigma_lo, sigma_hi].
    """

    source: Path
    sigma_rel: str | None
    at: int | None
    weight: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Opened guides: `of(network)` puts them to a network.

    Attributes:
        guides: `reference_trainer.guidance.Guide` records.
        identity: what tells this guidance from others, empty without guides.
    """

    guides: tuple[Any, ...]
    identity: list[dict[str, Any]]

    def of(self, network: Precond) -> Any:
        """The guided network; `network` itself without guides.

        Raises:
            ConfigError: a guide does not fit the network.
        """
        from reference_trainer.guidance import GuidedNetwork

        return GuidedNetwork(network, self.guides) if self.guides else network

    @property
    def description(self) -> str:
        """For a line of text, such as `guidance=2.1 in 0.28,2.9`; empty without guides."""
        parts = []
        for entry in self.identity:
            low, high = entry["interval"]
            inside = "" if (low, high) == ("0", "inf") else f" in {low},{high}"
            parts.append(f"guidance={entry['weight']:g}{inside}")
        return " ".join(parts)


def parse_guides(
    sources: list[Path] | None,
    lengths: list[str] | None,
    times: list[int] | None,
    weights: list[float] | None,
    intervals: list[str] | None,
) -> tuple[GuideOptions, ...]:
    """Check the options of guidance, before anything is loaded.

    Raises:
        ConfigError: they do not belong together, or a value is out of range.
    """
    given = {
        "--guide-sigma-rel": lengths,
        "--guide-at": times,
        "--guidance": weights,
        "--guidance-interval": intervals,
    }
    if not sources:
        for option, values in given.items():
            if values:
                raise ConfigError(
                    f"{option} needs --guide SOURCE, the network to move away from. For classifier-free "
                    "guidance that is a small network trained without classes."
                )
        return ()
    if not weights:
        raise ConfigError("--guide needs --guidance W, its weight (1 is no guidance), such as 2.")
    for option, values in given.items():
        if values and len(values) not in (1, len(sources)):
            raise ConfigError(
                f"{option} must be given once for all guides or once for each of the {len(sources)}, "
                f"got {len(values)}."
            )
    options = []
    for i, source in enumerate(sources):
        weight = _chosen(weights, i, 1.0)
        text = _chosen(intervals, i, None)
        length = _chosen(lengths, i, None)
        if length is not None and "," in length:
            raise ConfigError(f"--guide-sigma-rel must be one length, as 0.12, got {length}.")
        interval = (0.0, float("inf")) if text is None else parse_interval(text)
        options.append(
            GuideOptions(need_file(source), length, _chosen(times, i, None), weight, interval)
        )
    return tuple(options)


def _chosen(values: Sequence[T] | None, i: int, default: T) -> T:
    """The value for guide `i`: its own, or the only one."""
    if not values:
        return default
    return values[i] if len(values) > 1 else values[0]


def parse_interval(text: str, option: str = "--guidance-interval") -> tuple[float, float]:
    """Parse LO,HI: two noise levels that rise.

    Raises:
        ConfigError: it is malformed or falls.
    """
    try:
        low, high = (float(item) for item in text.split(","))
        rising = 0 <= low < high
    except ValueError:
        rising = False
    if not rising:
        raise ConfigError(
            f"{option} must be two rising noise levels, as in 0.28,2.90, got {text!r}."
        )
    return low, high


def open_guides(options: Sequence[GuideOptions], device: str, command: str) -> Guidance:
    """Load or synthesize the guides.

    Args:
        options: see `parse_guides`.
        device: where the guides go.
        command: name of the command, for messages.

    Raises:
        ConfigError: a weight is not finite, or a guide cannot be opened.
    """
    if not options:
        return Guidance((), [])
    from reference_trainer.guidance import Guide

    guides, identity = [], []
    for chosen in options:
        (average,) = open_averages(
            chosen.source, chosen.sigma_rel, chosen.at, device, command, option="guide-"
        )
        guides.append(Guide(average.network, chosen.weight, chosen.interval))
        bounds = [f"{bound:g}" for bound in chosen.interval]
        identity.append({"weights": average.identity, "weight": chosen.weight, "interval": bounds})
    return Guidance(tuple(guides), identity)
