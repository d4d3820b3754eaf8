"""`phema train`: the reference trainer."""

from __future__ import annotations

import difflib
import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phema.options import Device, Json, extra, parse_sigma_rels
from phema.output import note, print_json, progress
from posthoc_ema import RAW, ConfigError

if TYPE_CHECKING:
    from reference_trainer.config import TrainConfig


def command(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="RUN", help="Run folder; continued if it holds the run."),
    ],
    preset: Annotated[
        str | None, typer.Option(help="Configuration by name: digits-xs or digits-s.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration as JSON, for example of a run."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and noise.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value, for example total_images=64000 or track.dtype=float32.",
        ),
    ] = None,
    direct: Annotated[
        str | None,
        typer.Option(
            "--direct",
            metavar="LIST",
            help="Also track these lengths directly into RUN/direct, to check syntheses against.",
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train an EDM2 network, tracking averages.

    Running the same command again continues after a crash, bit for bit (on a CPU).
    """
    with extra("train"):
        from reference_trainer.loop import train

        resolved = _configuration(preset, config, seed, set_ or [], direct)
        with progress("training") as bar:
            result = train(resolved, out, device=device, report=_reporter(bar))
    summary = {
        "folder": str(result.folder),
        "images": result.nimg,
        "started_at": result.started_at,
        "snapshots": str(out / "snapshots"),
    }
    if json:
        print_json(summary)
    elif result.already_complete:
        typer.echo(f"{out}: complete at {result.nimg} images, nothing to do")
    else:
        typer.echo(f"{out}: trained to {result.nimg} images; snapshots in {out / 'snapshots'}")


def _configuration(
    preset: str | None,
    file: Path | None,
    seed: int | None,
    changes: list[str],
    direct: str | None,
) -> TrainConfig:
    from reference_trainer.config import TrainConfig
    from reference_trainer.presets import PRESETS

    if (preset is None) == (file is None):
        raise ConfigError(
            f"give one of --preset ({', '.join(PRESETS)}) and --config FILE.json (as a run saves it)."
        )
    if file is not None:
        base = _read(file)
    elif preset in PRESETS:
        base = PRESETS[preset]()
    else:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    value = base.to_dict()
    if seed is not None:
        value["seed"] = seed
    if direct is not None:
        value["track"]["direct_sigma_rels"] = parse_sigma_rels(direct)
        if RAW in value["track"]["direct_sigma_rels"]:
            raise ConfigError("--direct takes lengths; the raw weights are stored anyway.")
    for change in changes:
        _apply(value, change)
    return TrainConfig.from_dict(value)


def _read(file: Path) -> TrainConfig:
    from reference_trainer.config import TrainConfig

    try:
        return TrainConfig.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}. Check the path.") from None
    except (ConfigError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else "it is no JSON text."
        raise ConfigError(f"{file}: cannot be used as a configuration: {reason}") from None


def _apply(value: dict[str, Any], change: str) -> None:
    """Put KEY=VALUE into a nested configuration; from_dict judges key and value."""
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set must be KEY=VALUE, got {change!r}.")
    *path, last = key.split(".")
    for part in path:
        if not isinstance(value.get(part), dict):
            sections = [name for name, inner in value.items() if isinstance(inner, dict)]
            near = difflib.get_close_matches(part, sections, n=1)
            known = f"Sections here: {', '.join(sections) or 'none'}."
            raise ConfigError(
                f"--set {change}: the configuration has no section {part!r}. "
                f"{f'Did you mean {near[0]!r}?' if near else known}"
            )
        value = value[part]
    try:
        value[last] = json_module.loads(text)
    except ValueError:
        value[last] = text  # a word without quotes


def _reporter(bar: Any) -> Any:
    """Show the trainer's reports: a bar on a terminal, a line for what is out of the ordinary."""
    on_terminal = sys.stderr.isatty()

    def report(status: Any) -> None:
        if status.message and status.event != "complete":  # that one is the result itself
            note(status.message)
        if status.event == "resume":
            note(f"continuing at {status.nimg} of {status.total_images} images")
        if on_terminal:
            loss = "" if status.loss is None else f"loss {status.loss:.3f}"
            bar(status.nimg, status.total_images, loss)

    return report
