"""`phema prune`: remove the averages that are missed least."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phema.options import Json, Snapshots, find_store
from phema.output import note, output_folder, print_json, size, table
from phema.ranges import check_picture, parse_range, parse_size, shown_lengths
from posthoc_ema import ConfigError, SnapshotStore
from posthoc_ema.pruning import PruningPlan, plan_pruning, prune
from posthoc_ema.snapshot import SnapshotRecord, label_of


def command(
    snapshots: Snapshots,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, metavar="N", help="Averages (files) to keep.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Size of what stays, such as 20GB."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option("--error", help="Keep as few as give this predicted relative error."),
    ] = None,
    range_: Annotated[
        str, typer.Option("--range", metavar="LO,HI", help="Lengths that will be asked for.")
    ] = "0.02,0.25",
    criterion: Annotated[
        str, typer.Option(help="worst (error over the range) or mean-log (all lengths alike).")
    ] = "worst",
    raw: Annotated[
        str, typer.Option("--raw", help="Raw weights that stay: of the last time, all or none.")
    ] = "last",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PICTURE", help="Draw the errors: .png, .pdf or .svg."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove; else only show.")] = False,
    json: Json = False,
) -> None:
    """Remove the averages that are missed least.

    Keeps those whose predicted error over the range of lengths, at the last time, grows least. Nothing
    is removed without --apply. One average of the last time always stays.
    """
    wanted = parse_range(range_)
    if sum(limit is not None for limit in (keep, max_size, error)) != 1:
        raise ConfigError("give exactly one of --keep N, --max-size SIZE and --error E.")
    check_picture(out)
    store = find_store(snapshots)
    plan = plan_pruning(
        store,
        wanted,
        keep=keep,
        max_bytes=None if max_size is None else parse_size(max_size),
        max_error=error,
        criterion=criterion,  # type: ignore[arg-type]  # checked inside
        keep_raw=raw,  # type: ignore[arg-type]  # checked inside
        lengths=shown_lengths(*wanted),
    )
    if apply and plan.removed:
        with SnapshotStore.edit(store.folder) as editable:
            prune(editable, plan)
    if out is not None:
        _draw(plan, out)
    if json:
        print_json({"folder": str(store.folder), "applied": apply, **_as_json(plan)})
        return
    _show(store, plan, wanted)
    if not plan.removed:
        note("nothing is to be removed.")
    elif not apply:
        note(
            f"{len(plan.removed)} files would go; nothing was removed. Add --apply to remove them."
        )
    else:
        note(f"removed {len(plan.removed)} files, {len(plan.kept)} are left.")


def _show(store: SnapshotStore, plan: PruningPlan, wanted: tuple[float, float]) -> None:
    total = len(plan.kept) + len(plan.removed)
    rows: list[list[object]] = [
        ["files", total, len(plan.kept)],
        ["size", size(plan.bytes_before), size(plan.bytes_after)],
    ]
    for s in shown_lengths(*wanted):
        i = plan.sigma_rels.tolist().index(s)
        before, after = plan.errors_before[i], plan.errors[i]
        rows.append([f"error at {s:g}", f"{before:.1e}", f"{after:.1e}"])
    rows.append(["worst error", f"{plan.errors_before.max():.1e}", f"{plan.errors.max():.1e}"])
    typer.echo(table(["", "before", "after"], rows))
    typer.echo(
        f"errors are predicted, over the norm of the weights, at the last time; {store.folder} keeps"
    )
    times = sorted({record.time for record in plan.kept})
    of_time = {t: [r for r in plan.kept if r.time == t] for t in times}
    typer.echo(table(["time", "averages"], [[t, _names(of_time[t])] for t in times]))


def _names(records: list[SnapshotRecord]) -> str:
    return ", ".join(label_of(r.profile).removeprefix("sigma_rel-") for r in records)


def _draw(plan: PruningPlan, out: Path) -> None:
    from posthoc_ema.plotting import plot_errors

    lengths = plan.sigma_rels.tolist()
    total = len(plan.kept) + len(plan.removed)
    curves = [
        (f"{total} files, {size(plan.bytes_before)}", lengths, plan.errors_before.tolist()),
        (f"{len(plan.kept)} files, {size(plan.bytes_after)}", lengths, plan.errors.tolist()),
    ]
    with output_folder(out.parent):
        plot_errors(curves, out, title="before and after pruning")


def _as_json(plan: PruningPlan) -> dict[str, object]:
    return {
        "kept": [record.file for record in plan.kept],
        "removed": [record.file for record in plan.removed],
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "errors": [
            {"sigma_rel": s, "before": before, "after": after}
            for s, before, after in zip(
                plan.sigma_rels.tolist(),
                plan.errors_before.tolist(),
                plan.errors.tolist(),
                strict=True,
            )
        ],
    }
