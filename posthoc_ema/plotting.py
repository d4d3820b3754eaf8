"""Pictures: quality against averaging length, and profiles with their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posthoc_ema.profiles import PowerProfile
from posthoc_ema.snapshot import SnapshotRecord
from posthoc_ema.synthesis import RAW, SynthesisPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by people who do not see all colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


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
    """
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    for i, (name, sigma_rels, values, raw) in enumerate(curves):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(sigma_rels, values, "o-", color=colour, markersize=4, label=name or "synthesized")
        best = int(np.argmax(values) if higher_is_better else np.argmin(values))
        axes.plot(
            sigma_rels[best], values[best], "o", ms=12, mfc="none", mec=colour, mew=1.8, zorder=3
        )
        axes.annotate(
            f"best {values[best]:.3g}\nat {sigma_rels[best]:g}",
            (sigma_rels[best], values[best]),
            textcoords="offset points",
            xytext=(0, -18 if higher_is_better else 14),
            ha="center",
            va="top" if higher_is_better else "bottom",
            color=colour,
        )
        if raw is not None:
            axes.axhline(raw, color=colour, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"raw weights {raw:.3g}",
                (1, raw),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(-4, 4),
                ha="right",
                color=colour,
            )
    axes.set_xscale("log")
    shortest = min(min(s) for _, s, _, _ in curves)
    longest = max(max(s) for _, s, _, _ in curves)
    ticks = [
        t for t in (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25) if t >= shortest * 0.99
    ]
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if t <= longest * 1.01]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("averaging length sigma_rel")
    axes.set_ylabel(ylabel)
    if not higher_is_better:
        axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    if len(curves) > 1:
        axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left")
    _tidy(axes)
    figure.savefig(path, dpi=160)


def plot_profiles(plan: SynthesisPlan, path: Path, *, clock: str) -> None:
    """Target profiles with their reconstructions, what is left over, and the coefficients.

    Args:
        plan: a synthesis plan; targets that are the raw weights are left out.
        path: picture to write; its ending decides the format.
        clock: unit of time, for the axis.
    """
    figure = _figure(7.2, 7.6)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(3, 2, 2))
    # A density jumps to 0 at the end of every input; the grid ends just inside the last one.
    tau = np.linspace(0, plan.time, 4001)[1:-1]
    inputs = [record.profile for record in plan.inputs]
    powers = [i for i, p in enumerate(inputs) if isinstance(p, PowerProfile)]
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
    top.set_title("profiles: wanted (dashed) and reconstructed", loc="left")
    top.legend(frameon=False)
    middle.set_ylabel("difference")
    bottom.set_ylabel("coefficient")
    bottom.set_xlabel(f"training time ({clock})")
    for axes in (top, middle, bottom):
        axes.set_xlim(0, plan.time * 1.01)
        _tidy(axes)
    figure.savefig(path, dpi=160)


def _stems(axes: Any, records: Sequence[SnapshotRecord], values: Any, colour: str) -> None:
    times = [record.time for record in records]
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.vlines(times, 0, values, color=colour, linewidth=1, alpha=0.6)
    axes.plot(times, values, "o", color=colour, markersize=2.5)


def plot_images(panels: Sequence[tuple[str, npt.NDArray[np.uint8]]], path: Path) -> None:
    """Pictures side by side, each under its title.

    Args:
        panels: (title, image) of each; images are uint8, (height, width) or (height, width, 3).
        path: picture to write; its ending decides the format.
    """
    aspect = sum(image.shape[1] / image.shape[0] for _, image in panels)
    figure = _figure(3.6 * aspect, 3.9)
    for axes, (title, image) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(path, dpi=160)
