"""The configuration that the options of `phema train` stand for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phema.options import parse_sigma_rels
from posthoc_ema import RAW, ConfigError

if TYPE_CHECKING:
    from reference_trainer.config import TrainConfig
    from reference_trainer.data import Dataset

LETTERS = tuple("ABCDEFG")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What was asked for, as words of the command line.

    Attributes:
        preset: name of a preset.
        config: a letter A to G (with a preset), or a file.
        seed: seed of the run.
        data: name or path of a data set.
        direct: LIST of lengths to track directly.
        microbatch: images per forward pass and process.
        compile: compile the step.
        parallel: "ddp" or "fsdp2".
        changes: KEY=VALUE, later ones win.
    """

    preset: str | None = None
    config: str | None = None
    seed: int | None = None
    data: str | None = None
    direct: str | None = None
    microbatch: int | None = None
    compile: bool = False
    parallel: str | None = None
    changes: Sequence[str] = ()


def resolve(options: TrainOptions) -> TrainConfig:
    """The configuration of a run.

    Raises:
        ConfigError: an option is wrong, or they do not go together.
    """
    from reference_trainer.config import TrainConfig
    from reference_trainer.data import load_dataset
    from reference_trainer.data.batches import check_fits

    value = _base(options).to_dict()
    if options.seed is not None:
        value["seed"] = options.seed
    dataset = None if options.data is None else load_dataset(options.data)
    if dataset is not None and options.data is not None:
        _fit_to_data(value, dataset, options.data)
    if options.direct is not None:
        value["track"]["direct_sigma_rels"] = parse_sigma_rels(options.direct)
        if RAW in value["track"]["direct_sigma_rels"]:
            raise ConfigError("--direct takes lengths; the raw weights are stored anyway.")
    asked = {
        "microbatch": options.microbatch,
        "compile": options.compile or None,
        "parallel": options.parallel,
    }
    value["compute"] |= {name: choice for name, choice in asked.items() if choice is not None}
    for change in options.changes:
        _apply(value, change)
    config = TrainConfig.from_dict(value)
    if dataset is not None:
        check_fits(dataset, config)
    return config


def _base(options: TrainOptions) -> TrainConfig:
    """The preset, as the config that the letter names, or the file."""
    from reference_trainer.presets import PRESETS, preset, with_config

    letter = options.config if options.config in LETTERS else None
    if options.preset is None and options.config is not None and letter is None:
        return _read(Path(options.config))
    if options.preset is None or (options.config is not None and letter is None):
        known = ", ".join(name for name in PRESETS if not name.startswith("edm2-"))
        raise ConfigError(
            f"give --preset ({known}, edm2-img512-s ...), with --config A to G for a config of the paper, "
            "or --config FILE.json alone (as a run saves it)."
        )
    base = preset(options.preset)
    return base if letter is None else with_config(base, letter)


def _fit_to_data(value: dict[str, Any], dataset: Dataset, source: str) -> None:
    """Put a data set into a configuration: its mapping to network units, its channels and classes.

    The published mapping of an edm2-* preset stays where it is of the same kind of data. A network
    without classes stays without; data without labels does not fit one with classes, which training says.
    """
    from reference_trainer.data.loading import is_path
    from reference_trainer.data.statistics import standardised

    network, data = value["network"], value["data"]
    same = (dataset.kind, dataset.channels) == (data["kind"], network["img_channels"])
    if not (same and value["name"].startswith("edm2-")):
        data["mean"], data["scale"] = standardised(dataset, data["sigma_data"])
    data["name"], data["kind"] = dataset.name, dataset.kind
    data["path"] = source if is_path(source) else None
    network["img_channels"] = dataset.channels
    if network["label_dim"] and dataset.label_dim:
        network["label_dim"] = dataset.label_dim


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
        value[last] = json.loads(text)
    except ValueError:
        value[last] = text  # a word without quotes
