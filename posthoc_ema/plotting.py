"""Pictures: quality against averaging length, and profiles with their reconstructions."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.profiles import PointProfile, PowerProfile
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.synthesis import DOUBTFUL, RAW, SynthesisPlan
from posthoc_ema.tensor_files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by people who do not see all colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write the picture; it appears complete or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=dpi)
    with atomic_write(path) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(buffer.getvalue())


def plot_sweep(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float], float | None]],
    path: Path,
    *,
    ylabel: str,
    higher_is_better: bool = False,
    title: str = "",
) -> None:
    """Quality against sigma_rel, the optimum marked, the raw weights as a dashed line.

    Args:
        curves: (label, sigma_rels rising, values, value of the raw weights or None) of each sweep.
        path: picture to write; its ending decides the format (.png, .pdf, .svg).
        ylabel: what is measured.
        higher_is_better: where the optimum is.
        title: title of the picture.

    Raises:
        SnapshotWriteError: the picture cannot be written; an older one is untouched.
    """
    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    for i, (name, sigma_rels, values, raw) in enumerate(curves):
        colour = _COLOURS[i % len(_COLOURS)]
        best = int(np.argmax(values) if higher_is_better else np.argmin(values))
        found = f"best {values[best]:.3g} at {sigma_rels[best]:g}"
        axes.plot(sigma_rels, values, "o-", color=colour, markersize=4, label=f"{name}: {found}")
        axes.plot(
            sigma_rels[best], values[best], "o", ms=12, mfc="none", mec=colour, mew=1.8, zorder=3
        )
        if raw is not None:
            axes.axhline(raw, color=colour, linestyle="--", linewidth=1.2)
            _label_raw(axes, raw, colour)
        if len(curves) == 1:  # labels of several curves would lie on each other: see the legend
            _label_best(axes, found, sigma_rels[best], values[best], colour, higher_is_better)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    _length_ticks(axes, sorted({s for _, lengths, _, _ in curves for s in lengths}))
    axes.set_ylim(*_y_range([v for _, _, vs, raw in curves for v in (*vs, raw) if v is not None]))
    axes.set_xlabel("averaging length sigma_rel")
    axes.set_ylabel(ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left")
    _tidy(axes)
    _save(figure, path)


def _label_best(
    axes: Axes, text: str, sigma_rel: float, value: float, colour: str, high: bool
) -> None:
    axes.annotate(
        text,
        (sigma_rel, value),
        textcoords="offset points",
        xytext=(0, 12 if high else -12),  # outside the valley or the hill, where no curve is
        ha="center",
        va="bottom" if high else "top",
        color=colour,
    )


def _label_raw(axes: Axes, raw: float, colour: str) -> None:
    axes.annotate(
        f"raw weights {raw:.3g}",
        (0, raw),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(4, 4),
        color=colour,
    )


def _length_ticks(axes: Axes, lengths: Sequence[float]) -> None:
    """Round numbers inside the range; the lengths themselves where there are fewer than two."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    ticks = [t for t in _TICKS if lengths[0] * 0.99 <= t <= lengths[-1] * 1.01]
    axes.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) > 1 else lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _plain_ticks(axis: Axis) -> None:
    """Round numbers on a logarithmic axis that spans less than a power of ten or little more."""
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high < 20 * low:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _y_range(values: Sequence[float]) -> tuple[float, float]:
    """From zero where that does not flatten the curve, with room for the labels."""
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        return 0.0, 1.12 * high
    margin = 0.16 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def plot_profiles(
    plan: SynthesisPlan,
    path: Path,
    *,
    clock: str,
    title: str = "",
    over: SynthesisPlan | None = None,
) -> None:
    """Target profiles with their reconstructions, what is left over, the coefficients, the error.

    Args:
        plan: a synthesis plan; targets that are the raw weights are left out.
        path: picture to write; its ending decides the format.
        clock: unit of time, for the axis.
        title: title of the picture.
        over: plan of the same store for many lengths, rising: adds their predicted error.

    Raises:
        SnapshotWriteError: the picture cannot be written; an older one is untouched.
    """
    figure = _figure(7.2, 7.6 if over is None else 10.2)
    heights = (3, 2, 2) if over is None else (3, 2, 2, 3)
    top, middle, bottom, *last = figure.subplots(len(heights), 1, height_ratios=heights)
    if over is not None:
        _predicted_errors(last[0], over)
    # A density jumps to 0 at the end of every input; the grid ends just inside the last one.
    tau = np.linspace(0, plan.time, 4001)[1:-1]
    inputs = [record.profile for record in plan.inputs]
    powers = [i for i, p in enumerate(inputs) if not isinstance(p, PointProfile)]
    densities = np.stack([inputs[i].density(tau) for i in powers], axis=1)
    shown = [i for i, s in enumerate(plan.sigma_rels) if s != RAW]
    for colour, i in zip(_COLOURS * len(shown), shown, strict=False):
        name = f"sigma_rel {plan.sigma_rels[i]:g}"
        target = PowerProfile(plan.time, plan.sigma_rels[i]).density(tau) * plan.time
        made = densities @ plan.coefficients[powers, i] * plan.time
        top.plot(tau, made, color=colour, linewidth=2.4, alpha=0.45, label=name)
        top.plot(tau, target, color=colour, linewidth=1, linestyle="--")
        middle.plot(tau, made - target, color=colour, linewidth=1)
        _stems(bottom, plan.inputs, plan.coefficients[:, i], colour)
    top.set_ylabel("density x end time")
    top.set_title(title or "profiles: wanted (dashed) and reconstructed", loc="left")
    top.legend(frameon=False)
    middle.set_ylabel("difference")
    bottom.set_ylabel("coefficient")
    bottom.set_xlabel(f"training time ({clock})")
    for axes in (top, middle, bottom):
        axes.set_xlim(0, plan.time * 1.01)
        _tidy(axes)
    _save(figure, path)


def _predicted_errors(axes: Axes, plan: SynthesisPlan) -> None:
    """Predicted error over the lengths of a plan, the part of it that is storage, and what is tracked."""
    lengths = np.array(plan.sigma_rels)
    storage = plan.predicted_error * np.sqrt(plan.storage_share)
    axes.plot(
        lengths, plan.predicted_error, color=_COLOURS[0], linewidth=1.8, label="predicted error"
    )
    axes.plot(
        lengths, storage, color=_COLOURS[1], linewidth=1.2, linestyle="--", label="from storage"
    )
    lost = plan.reach > DOUBTFUL
    if lost.any():
        axes.fill_between(
            lengths,
            0,
            1,
            where=list(lost),
            transform=axes.get_xaxis_transform(),
            color=_GREY,
            alpha=0.15,
            linewidth=0,
            label="out of reach",
        )
    for sigma_rel in sorted({r.sigma_rel for r in plan.inputs if r.sigma_rel is not None}):
        axes.axvline(sigma_rel, color=_GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"tracked {sigma_rel:g}",
            (sigma_rel, 0.97),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(3, 0),
            va="top",
            fontsize="small",
            color=_GREY,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _length_ticks(axes, plan.sigma_rels)
    axes.set_xlabel("averaging length sigma_rel")
    axes.set_ylabel("error / norm of the weights")
    axes.legend(frameon=False, loc="lower left")
    _tidy(axes)


def _stems(axes: Any, records: Sequence[SnapshotRecord], values: Any, colour: str) -> None:
    times = [record.time for record in records]
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.vlines(times, 0, values, color=colour, linewidth=1, alpha=0.6)
    axes.plot(times, values, "o", color=colour, markersize=2.5)


def plot_images(panels: Sequence[tuple[str, npt.NDArray[np.uint8]]], path: Path) -> None:
    """Pictures under their titles, side by side in as many rows as they need.

    Args:
        panels: (title, image) of each; images are uint8, (height, width) or (height, width, 3).
        path: picture to write; its ending decides the format.

    Raises:
        SnapshotWriteError: the picture cannot be written; an older one is untouched.
    """
    aspect = max(image.shape[1] / image.shape[0] for _, image in panels)
    width = min(7.2, 3.6 * aspect)
    columns = min(len(panels), max(1, int(15 / width)))  # two wide ones, four square ones
    rows = -(-len(panels) // columns)
    figure = _figure(width * columns, (width / aspect + 0.35) * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.set_axis_off()
    for axes, (title, image) in zip(places, panels, strict=False):  # the last row may have gaps
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title)
    _save(figure, path)


def plot_errors(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], path: Path, *, title: str = ""
) -> None:
    """Predicted error against sigma_rel, of plans or of stores.

    Args:
        curves: (label, sigma_rels rising, predicted errors over the norm of the weights) of each.
        path: picture to write; its ending decides the format (.png, .pdf, .svg).
        title: title of the picture.

    Raises:
        SnapshotWriteError: the picture cannot be written; an older one is untouched.
    """
    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    for colour, (name, sigma_rels, errors) in zip(_COLOURS * len(curves), curves, strict=False):
        axes.plot(sigma_rels, errors, color=colour, linewidth=1.8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _length_ticks(axes, sorted({s for _, lengths, _ in curves for s in lengths}))
    axes.set_xlabel("averaging length sigma_rel")
    axes.set_ylabel("predicted error / norm of the weights")
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left")
    _tidy(axes)
    _save(figure, path)


@dataclass(frozen=True, kw_only=True)
class BandCurve:
    """A line with a band around it, for `plot_panels`.

    Attributes:
        label: name in the legend.
        x: where it was measured, rising.
        low: lower end of the band, one value for each x.
        middle: the line.
        high: upper end of the band.
        mark: (x, y) to circle, for example the best point; None for none.
    """

    label: str
    x: tuple[float, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    mark: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes of `plot_panels`.

    Attributes:
        title: what it shows.
        xlabel: quantity along x; the ticks of "sigma_rel" are those of lengths.
        ylabel: quantity along y.
        curves: what is drawn.
        log_x: logarithmic x.
        log_y: logarithmic y.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: tuple[BandCurve, ...]
    log_x: bool = True
    log_y: bool = False


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Lines with bands, for example of several seeds, in panels side by side.

    Args:
        panels: what to draw, at least one.
        path: picture to write; its ending decides the format (.png, .pdf, .svg).

    Raises:
        SnapshotWriteError: the picture cannot be written; an older one is untouched.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(6.0 * columns, 3.9 * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    _save(figure, path, dpi=100)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    colours = (*_COLOURS, "#000000")
    for i, curve in enumerate(panel.curves):
        colour, style = colours[i % len(colours)], ("-", "--")[i // len(colours) % 2]
        axes.plot(curve.x, curve.middle, style, marker="o", color=colour, ms=3.5, label=curve.label)
        if curve.low != curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        if curve.mark is not None:
            axes.plot(*curve.mark, "o", ms=10, mfc="none", mec=colour, mew=1.6, zorder=3)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    for logarithmic, axis in ((panel.log_x, axes.xaxis), (panel.log_y, axes.yaxis)):
        if logarithmic:
            _plain_ticks(axis)
    if panel.xlabel.endswith("sigma_rel"):
        _length_ticks(axes, sorted({x for curve in panel.curves for x in curve.x}))
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    _tidy(axes)
