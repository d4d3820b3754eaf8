"""`phema sweep`: a metric against the averaging length."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Annotated

import typer

from phema.measuring import ExtractorWeights, NetworkMetric, Reference, Setup, open_evaluation
from phema.networks import config_of
from phema.options import (
    At,
    Device,
    Json,
    Norm,
    NumImages,
    SigmaRels,
    Snapshots,
    Steps,
    extra,
    find_store,
    parse_sigma_rels,
)
from phema.output import note, output_folder, print_json, progress, table
from posthoc_ema import RAW, ConfigError, PointProfile, SnapshotStore
from posthoc_ema.sweep import (
    TABLE,
    Metric,
    ShellMetric,
    SweepResult,
    label,
    run_sweep,
    to_json,
)

_NAMES = re.compile(
    r"[a-z0-9]+(-[a-z0-9]+)*(,[a-z0-9-]+)*"
)  # metrics of ours; commands hold {weights}


def command(
    snapshots: Snapshots,
    sigma_rel: SigmaRels,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder of the results (JSON and CSV).")
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Shell command with {weights}; the last line it prints is a number or a JSON object "
            "of numbers. Or metrics of `phema evaluate`, for networks of `phema train`.  [default: "
            "fd-digits]",
        ),
    ] = None,
    ref: Reference = None,
    weights: ExtractorWeights = None,
    key: Annotated[
        str | None, typer.Option(help="Value that decides.  [default: the first one]")
    ] = None,
    higher_is_better: Annotated[
        bool, typer.Option("--higher-is-better", help="Look for the largest value.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw/--no-raw", help="Measure the raw weights as the baseline.")
    ] = True,
    at: At = None,
    norm: Norm = "random-walk",
    num_images: NumImages = 1000,
    steps: Steps = 32,
    seed: Annotated[int, typer.Option(min=0, help="First of the consecutive seeds.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Lengths that are synthesized in one pass and lie on disk.")
    ] = 8,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep the synthesized files in FOLDER.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure quality against averaging length.

    Running it again continues where it stopped.
    """
    store = find_store(snapshots)
    sigma_rels = parse_sigma_rels(sigma_rel)
    if RAW not in sigma_rels and raw and _has_raw(store, at):
        sigma_rels = [RAW, *sigma_rels]
    if not any(sigma_rels):
        raise ConfigError("a sweep needs at least one length besides raw.")
    chosen: Metric
    # Only the trainer's own metrics need the extra: a command of the user's runs without torch.
    if metric is not None and not _NAMES.fullmatch(metric):
        chosen = ShellMetric(metric)
        needs: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        ours = _trainer_metric(
            metric or "fd-digits", ref, weights, store, num_images, steps, seed, device
        )
        chosen, needs = ours, extra("sweep")
        higher_is_better = higher_is_better or ours.higher_is_better(key)
    with output_folder(out), needs, progress("measuring") as bar:
        result = run_sweep(
            store,
            sigma_rels,
            chosen,
            out,
            at=at,
            norm=norm,  # type: ignore[arg-type]  # checked inside
            key=key,
            higher_is_better=higher_is_better,
            batch=batch,
            keep_weights=keep_weights,
            report=lambda row, done, total: bar(done, total),
        )
    if json:
        print_json(to_json(result))
    else:
        _print(result, out)


def _has_raw(store: SnapshotStore, at: int | None) -> bool:
    time = at if at is not None else max(store.times, default=0)
    return time > 0 and store.find(time, PointProfile(time)) is not None


def _trainer_metric(
    metrics: str,
    ref: Path | None,
    weights: list[str] | None,
    store: SnapshotStore,
    num_images: int,
    steps: int,
    seed: int,
    device: str,
) -> NetworkMetric:
    with extra("sweep"):
        from reference_trainer.distributed import context

        config_of(store.metadata, store.folder)  # refuses stores of other models, by name
        ranks = context(device)
        if ranks.world_size > 1:
            raise ConfigError("a sweep is one process; `torchrun -m phema evaluate` takes several.")
        evaluator = open_evaluation(metrics, ref, weights, ranks)
        setup = Setup(evaluator=evaluator, num_images=num_images, steps=steps, seed=seed)
        return NetworkMetric(setup, ranks)


def _print(result: SweepResult, out: Path) -> None:
    names = list(result.rows[0].values)
    best = result.best.sigma_rel
    rows = [
        [
            label(row.sigma_rel),
            *[f"{row.values.get(name, float('nan')):.4g}" for name in names],
            f"{row.predicted_error:.1e}",
            "<- best" if row.sigma_rel == best else "",
        ]
        for row in result.rows
    ]
    typer.echo(table(["sigma_rel", *names, "error", ""], rows))
    typer.echo(f"{result.identity['metric']}; table in {out / TABLE}")
    ends = (result.averaged[0].sigma_rel, result.averaged[-1].sigma_rel)
    if len(result.averaged) > 1 and best in ends:
        note(f"the best length, {best:g}, is the end of the range; the optimum may lie beyond it.")
