"""`phema plan`: disk, memory and error of snapshots, before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from phema.options import Json, find_store, parse_sigma_rels
from phema.output import note, output_folder, print_json, size, table
from phema.ranges import check_picture, parse_range, shown_lengths
from posthoc_ema import DEFAULT_CODEC, DEFAULT_SIGMA_RELS, ConfigError
from posthoc_ema.planning import (
    DEFAULT_DRIFT,
    DEFAULT_TIMES,
    Plan,
    cheapest_plan,
    make_plan,
)
from posthoc_ema.pruning import Pace, pace_of
from posthoc_ema.retention import targets_of


def command(
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Length of the run, in steps or images.")
    ],
    parameters: Annotated[
        float | None, typer.Option("--parameters", help="Averaged weights of the model: 1.2e9.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option("--every", min=1, help="Interval of snapshots.  [default: a 64th of the run]"),
    ] = None,
    sigma_rels: Annotated[
        str | None,
        typer.Option("--sigma-rels", metavar="LIST", help="Tracked lengths.  [default: 0.04,0.15]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16, bfloat16, delta, delta-float16 or delta-int8.  [default: delta]"
        ),
    ] = None,
    range_: Annotated[
        str, typer.Option("--range", metavar="LO,HI", help="Lengths that will be asked for.")
    ] = "0.02,0.25",
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            help="Find the cheapest plan with this predicted error over the range; --sigma-rels and "
            "--dtype, where given, are kept.",
        ),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option(
            help="How far the weights walk during the run, over their norm.  [default: 0.4]"
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="SNAPSHOTS", help="Take drift and parameters from an earlier run."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PICTURE", help="Draw the error: .png, .pdf or .svg."),
    ] = None,
    json: Json = False,
) -> None:
    """Plan snapshots before training: disk, memory, predicted error.

    Errors are relative to the norm of the weights. They depend on how far the weights walk during the
    run (as a random walk), which only training knows: give --drift, or an earlier run with --like.
    """
    check_picture(out)
    if error is not None and every is not None:
        raise ConfigError("--error finds the interval itself; leave out --every.")
    if drift is not None and like is not None:
        raise ConfigError("--like measures the drift itself; leave out --drift.")
    wanted = parse_range(range_)
    pace = pace_of(find_store(like), steps) if like is not None else None
    weights = parameters if parameters is not None else (pace.parameters if pace else None)
    if weights is None:
        raise ConfigError("give --parameters, the number of averaged weights, or --like SNAPSHOTS.")
    walk = pace.drift if pace else (DEFAULT_DRIFT if drift is None else drift)
    tracked: Sequence[float] | None = None if sigma_rels is None else _tracked(sigma_rels)
    if error is not None:
        plan = cheapest_plan(
            steps,
            weights,
            error,
            wanted,
            tracked=tracked,
            codec=dtype,
            drift=walk,
            density=pace,
        )
        every, tracked, dtype = plan.every, plan.tracked, plan.codec
    plan = _plan(
        steps,
        every or max(1, steps // DEFAULT_TIMES),
        tracked or DEFAULT_SIGMA_RELS,
        weights,
        dtype or DEFAULT_CODEC,
        wanted,
        walk,
        pace,
    )
    if out is not None:
        _draw(plan, wanted, pace, out)
    if json:
        print_json(_as_json(plan))
        return
    _show(plan, wanted)
    if pace is None and drift is None:
        note(
            f"errors assume a drift of {DEFAULT_DRIFT:g} and are proportional to it; --like SNAPSHOTS "
            "takes it from an earlier run."
        )


def _tracked(text: str) -> list[float]:
    lengths = parse_sigma_rels(text)
    if 0.0 in lengths:
        raise ConfigError("--sigma-rels are tracked lengths; raw weights are stored beside them.")
    return sorted(lengths)


def _plan(
    steps: int,
    every: int,
    tracked: Sequence[float],
    parameters: float,
    codec: str,
    wanted: tuple[float, float],
    drift: float,
    pace: Pace | None,
) -> Plan:
    return make_plan(
        steps,
        every,
        tracked,
        parameters,
        codec=codec,
        sigma_rels=sorted({*targets_of(wanted).tolist(), *shown_lengths(*wanted)}),
        drift=drift,
        density=pace,
    )


def _show(plan: Plan, wanted: tuple[float, float]) -> None:
    lengths = ", ".join(f"{s:g}" for s in plan.tracked)
    typer.echo(
        f"a snapshot every {plan.every} of {plan.steps}: {plan.num_times} times x ({lengths}) = "
        f"{plan.num_files} files, stored as {plan.codec}"
    )
    typer.echo(f"disk {size(plan.disk)}, memory of the tracker {size(plan.memory)}")
    by_length = dict(zip(plan.sigma_rels.tolist(), plan.errors.tolist(), strict=True))
    rows = [[f"{s:g}", f"{by_length[s]:.1e}"] for s in shown_lengths(*wanted)]
    typer.echo(table(["sigma_rel", "predicted error"], rows))
    worst = plan.sigma_rels[plan.errors.argmax()]
    typer.echo(
        f"worst {plan.worst:.1e} at {worst:.3g}; errors are over the norm of the weights, "
        f"drift {plan.drift:.2g}"
    )


def _draw(plan: Plan, wanted: tuple[float, float], pace: Pace | None, out: Path) -> None:
    """The plan, and beside it twice and half as many snapshots."""
    from posthoc_ema.plotting import plot_errors

    curves: list[tuple[str, list[float], list[float]]] = []
    for every in (plan.every, max(1, plan.every // 2), plan.every * 2):
        if every > plan.steps or (every == plan.every and curves):
            continue
        other = _plan(
            plan.steps, every, plan.tracked, plan.parameters, plan.codec, wanted, plan.drift, pace
        )
        name = f"every {every}: {other.num_times} times, {size(other.disk)}"
        curves.append((name, other.sigma_rels.tolist(), other.errors.tolist()))
    lengths = ", ".join(f"{s:g}" for s in plan.tracked)
    with output_folder(out.parent):
        plot_errors(curves, out, title=f"tracking {lengths}, stored as {plan.codec}")


def _as_json(plan: Plan) -> dict[str, object]:
    return {
        "steps": plan.steps,
        "every": plan.every,
        "times": plan.num_times,
        "sigma_rels": list(plan.tracked),
        "files": plan.num_files,
        "dtype": plan.codec,
        "parameters": plan.parameters,
        "disk_bytes": math.ceil(plan.disk),
        "tracker_bytes": math.ceil(plan.memory),
        "drift": plan.drift,
        "worst_error": plan.worst,
        "errors": [
            {"sigma_rel": s, "error": e}
            for s, e in zip(plan.sigma_rels.tolist(), plan.errors.tolist(), strict=True)
        ],
    }
