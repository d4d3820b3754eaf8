"""`phema plot`: pictures of sweeps and of profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from phema.options import At, Norm, find_store, need_file, parse_sigma_rels
from phema.output import output_folder
from posthoc_ema import SIGMA_REL_MAX, ConfigError, plan_synthesis
from posthoc_ema.sweep import RESULTS, read_results


def command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="Folders of `phema sweep` (one curve each), or one folder of snapshots.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="PICTURE", help="Picture: .png, .pdf or .svg.")
    ],
    sigma_rel: Annotated[
        str,
        typer.Option("--sigma-rel", metavar="LIST", help="Lengths to draw, for snapshots."),
    ] = "0.02,0.075,0.2",
    at: At = None,
    norm: Norm = "random-walk",
    ylabel: Annotated[str, typer.Option(help="Name of what a sweep measured.")] = "",
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
) -> None:
    """Draw sweeps or profiles.

    Quality against length for sweeps. For snapshots: profiles and their reconstructions, the
    coefficients, and the predicted error over all lengths.
    """
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out must end in .png, .pdf or .svg, got {out}.")
    for source in sources:
        need_file(source)
    strange = [s for s in sources if s.suffix != ".json" and not (s / RESULTS).exists()]
    if strange and len(sources) > 1:
        raise ConfigError(f"{strange[0]} holds no {RESULTS}; several sources must all be sweeps.")
    with output_folder(out.parent):
        if strange:
            _profiles(sources[0], out, sigma_rel, at, norm, title)
        else:
            _sweeps(sources, out, ylabel, title)
    typer.echo(out)


def _profiles(
    source: Path, out: Path, sigma_rel: str, at: int | None, norm: str, title: str
) -> None:
    from posthoc_ema.plotting import plot_profiles

    store = find_store(source)
    sigma_rels = [s for s in parse_sigma_rels(sigma_rel) if s]
    if not sigma_rels:
        raise ConfigError("a picture of profiles needs at least one length besides raw.")
    plan = plan_synthesis(store, sigma_rels, at=at, norm=norm)  # type: ignore[arg-type]  # checked inside
    shortest = min([*sigma_rels, *store.sigma_rels])
    lengths = np.geomspace(shortest / 3, SIGMA_REL_MAX, 80)[:-1].tolist()
    over = plan_synthesis(store, lengths, at=at, norm=norm)  # type: ignore[arg-type]  # as above
    plot_profiles(plan, out, clock=store.clock, title=title, over=over)


def _sweeps(sources: list[Path], out: Path, ylabel: str, title: str) -> None:
    from posthoc_ema.plotting import plot_sweep

    results = [read_results(source) for source in sources]
    curves = []
    for source, result in zip(sources, results, strict=True):
        if not result.averaged:
            raise ConfigError(
                f"{source} holds no measured length yet; run its `phema sweep` again."
            )
        values = [row.values[result.key] for row in result.averaged]
        raw = result.raw.values[result.key] if result.raw else None
        named = source.parent if source.name == RESULTS else source
        name = named.stem if named.suffix == ".json" else named.name
        curves.append((name, [row.sigma_rel for row in result.averaged], values, raw))
    directions = {result.higher_is_better for result in results}
    keys = {result.key for result in results}
    if len(directions) > 1 or len(keys) > 1:
        raise ConfigError(
            f"the sweeps measured different things ({', '.join(sorted(keys))}); one picture holds "
            "curves of one value. Draw them apart."
        )
    plot_sweep(
        curves,
        out,
        ylabel=ylabel or results[0].key,
        higher_is_better=results[0].higher_is_better,
        title=title,
    )
