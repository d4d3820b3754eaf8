"""What `phema train` says: the dry run, and how training goes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from phema.output import note, size
from posthoc_ema.storage_costs import disk_bytes

if TYPE_CHECKING:
    from reference_trainer.config import TrainConfig
    from reference_trainer.run_log import Report, Status

PATIENCE_SECONDS = 30.0
"""Where stderr is no terminal, status lines come at most this often."""


def dry_run(config: TrainConfig, processes: int) -> dict[str, Any]:
    """What a run would be and cost, as JSON; nothing is read, written or computed.

    Args:
        config: the configuration.
        processes: number of processes that would share the batch.
    """
    from reference_trainer.costs import run_cost

    cost = run_cost(config, num_processes=processes)
    track = config.track
    profiles = len(track.sigma_rels)
    stored = disk_bytes(track.dtype, cost.snapshot_times, profiles, cost.num_parameters)
    return {
        **asdict(cost),
        "snapshot_bytes": round(stored),
        "total_images": config.total_images,
        "processes": processes,
        "config": config.to_dict(),
    }


def show_dry_run(found: dict[str, Any]) -> None:
    """The same for people: the configuration, and the numbers below."""
    compute, config = found["config"]["compute"], found["config"]
    share = config["batch_size"] // found["processes"]
    micro = min(share, compute["microbatch"] or share)
    lines = {
        "parameters": f"{found['num_parameters'] / 1e6:.2f} million",
        "one evaluation": f"{found['gflops_per_evaluation']:.4g} Gflops",
        "training": f"{found['training_zflops']:.3g} Zflops for {found['total_images']:,} images",
        "weights, gradients, moments, averages": f"{size(found['state_bytes'])} per device",
        "activations": f"{size(found['activation_bytes'])} per device, {micro} images per pass",
        "snapshots": f"{found['snapshot_times']} times, {size(found['snapshot_bytes'])} in all",
    }
    width = max(len(name) for name in lines)
    typer.echo(json.dumps(config, indent=2))
    for name, value in lines.items():
        typer.echo(f"{name.ljust(width)}  {value}")


def status_line(status: Status) -> str:
    """One status for people.

    Example:
        status_line(status) == "64000 of 131072 images, loss 0.512, 812 images/s, 0.6 GB, 1 min left"
    """
    parts = [f"{status.nimg} of {status.total_images} images", *_numbers(status)]
    if status.seconds_left is not None:
        parts.append(f"{_duration(status.seconds_left)} left")
    return ", ".join(parts)


def _numbers(status: Status) -> list[str]:
    parts = []
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.images_per_second is not None:
        parts.append(f"{status.images_per_second:.0f} images/s")
    if status.memory_bytes is not None:
        parts.append(size(status.memory_bytes))
    return parts


def _duration(seconds: float) -> str:
    """Time for people, in one or two units.

    Example:
        _duration(3900.0) == "1 h 5 min"
    """
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def reporter(bar: Callable[..., None]) -> Report:
    """Show the trainer's records: a bar on a terminal, elsewhere a line now and then.

    Args:
        bar: takes images done, images in all and a text.
    """
    on_terminal = sys.stderr.isatty()
    last = time.monotonic()

    def report(status: Status) -> None:
        nonlocal last
        if status.message and status.event != "complete":  # that one is the result itself
            note(status.message)
        if status.event == "resume":
            note(f"continuing at {status.nimg} of {status.total_images} images")
        if on_terminal:
            bar(status.nimg, status.total_images, ", ".join(_numbers(status)))
        elif status.event == "status" and time.monotonic() - last >= PATIENCE_SECONDS:
            last = time.monotonic()
            note(status_line(status))

    return report
