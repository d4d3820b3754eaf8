"""`phema study`: scripted experiments about averaging length and magnitudes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phema.options import Device, Json, extra
from phema.output import output_folder, print_json, progress, table
from posthoc_ema import ConfigError

if TYPE_CHECKING:
    from reference_trainer.studies import Scale, Study, StudyResult


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which study.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of runs, numbers and results; studies share what they have in common.",
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="LIST", help="One run of each kind per seed.")
    ] = "0,1,2",
    scale: Annotated[str, typer.Option(help="How large: tiny, digits or gpu.")] = "digits",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at the same time.")] = 1,
    device: Device = "auto",
    list_: Annotated[bool, typer.Option("--list", help="List the studies and scales.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be trained and measured.")
    ] = False,
    json: Json = False,
) -> None:
    """Run an experiment: train, measure, report.

    Ends in a table, a figure and what was found, in DIR/NAME. Running it again continues where it
    stopped; a finished study does nothing.
    """
    with extra("study"):
        from reference_trainer.studies import run_study, scale_named, study_named

        if list_:
            _list(json)
            return
        if name is None:
            raise ConfigError("say which study: phema study NAME; `phema study --list` shows them.")
        study, size, numbers = study_named(name), scale_named(scale), parse_seeds(seeds)
        if dry_run:
            _dry_run(study, size, numbers, json)
            return
        if out is None:
            raise ConfigError("say where the results go: --out DIR.")
        with output_folder(out), progress(study.name) as bar:
            result = run_study(
                study,
                size,
                out,
                seeds=numbers,
                jobs=jobs,
                device=device,
                progress=lambda text, done, total: bar(done, total),
            )
    _print(result, json)


def parse_seeds(text: str) -> list[int]:
    """Parse the seeds of the runs: numbers separated by commas.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--seeds must be numbers separated by commas, as in 0,1,2, got {text!r}."
        ) from None


def _list(json: bool) -> None:
    from reference_trainer.studies import SCALES, STUDIES

    scales = [make() for make in SCALES.values()]
    if json:
        print_json(
            {
                "studies": [
                    {"name": s.name, "question": s.question, "claim": s.claim}
                    for s in STUDIES.values()
                ],
                "scales": [{"name": s.name, "cost": s.cost} for s in scales],
            }
        )
        return
    typer.echo(table(["study", "asks"], [[s.name, s.question] for s in STUDIES.values()]))
    typer.echo()
    typer.echo(table(["scale", "cost"], [[s.name, s.cost] for s in scales]))


def _dry_run(study: Study, scale: Scale, seeds: list[int], json: bool) -> None:
    from reference_trainer.studies import first_plan

    plan = first_plan(study, scale, seeds)
    images = sum(run.config.total_images for run in plan.runs)
    if json:
        print_json(
            {
                "study": study.name,
                "scale": scale.name,
                "seeds": seeds,
                "runs": [{"name": r.name, "config": r.config.to_dict()} for r in plan.runs],
                "training_images": images,
                "measurements": len(plan.measurements),
                "settings": scale.settings,
            }
        )
        return
    rows = [[r.name, r.config.total_images, r.config.batch_size] for r in plan.runs]
    typer.echo(table(["run", "images", "batch size"], rows))
    typer.echo(
        f"{len(plan.runs)} runs of {images} images in all, {len(plan.measurements)} measurements "
        "(later ones may build on these)"
    )


def _print(result: StudyResult, json: bool) -> None:
    from reference_trainer.studies import to_json

    if json:
        print_json(to_json(result))
        return
    for shown in result.report.tables:
        typer.echo(f"{shown.caption}:")
        typer.echo(table(shown.header, shown.rows))
        typer.echo()
    typer.echo(result.report.finding)
    typer.echo(f"results in {result.folder}: results.md, results.json, figure.png")
