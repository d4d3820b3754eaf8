"""`phema demo`: the main job, end to end, on two CPU cores."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from phema.options import Device, extra, find_store
from phema.output import table
from posthoc_ema import RAW, ConfigError, SnapshotStore, synthesize
from posthoc_ema.sweep import SweepResult, label, read_results
from posthoc_ema.tensor_files import atomic_write

LENGTHS = "0.010,0.015,0.025,0.040,0.060,0.080,0.100,0.130,0.180,0.250"
DIRECT = 0.075
NUM_IMAGES = 1000
SAMPLER_STEPS = 12


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of results.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    device: Device = "auto",
) -> None:
    """The whole story on handwritten digits.

    Trains, tracks, synthesizes, sweeps and plots, in about 5 minutes on 2 cores. Every step is
    a command of its own and is shown as you would type it. Running the demo again continues where
    it stopped.
    """
    start = time.monotonic()
    run, sweep, weights = out / "run", out / "sweep", out / "weights"
    commands: list[list[str]] = []

    def phema(*arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        commands.append(words)
        typer.echo(f"\n$ phema {shlex.join(words)}")
        _call(context, words)

    on_device = () if device == "auto" else ("--device", device)
    with extra("demo"):
        import sklearn  # noqa: F401  # said at once, not after the imports of torch
        import torch  # noqa: F401
    phema(
        "train",
        "--preset",
        "digits-xs",
        "--seed",
        seed,
        "--direct",
        DIRECT,
        "--out",
        run,
        *on_device,
    )
    phema(
        *("sweep", run, "--sigma-rel", LENGTHS, "--num-images", NUM_IMAGES),
        *("--steps", SAMPLER_STEPS, "--out", sweep, *on_device),
    )
    phema(
        "plot", sweep, "--ylabel", "Frechet distance (lower is better)", "--out", out / "curve.png"
    )
    phema("plot", run, "--sigma-rel", "0.02,0.075,0.2", "--out", out / "profiles.png")
    result = read_results(sweep)
    shown = _shown(result)
    phema(
        *("sample", run, "--sigma-rel", ",".join(label(s) for s in shown)),
        *("--classes", "--seeds", "0-39", "--out", out / "samples.png", *on_device),
    )
    phema(
        *("synth", run, "--sigma-rel", label(result.best.sigma_rel)),
        *("--out", weights / "best.safetensors", "--overwrite"),
    )
    phema("verify", run)
    report = _report(result, run, commands, out, time.monotonic() - start)
    with atomic_write(out / "README.md") as descriptor:
        _write(descriptor, report)
    typer.echo(f"\n{_summary(result, run)}")
    typer.echo(f"results in {out}: curve.png, samples.png, profiles.png, README.md (all commands)")


def _call(context: typer.Context, words: list[str]) -> None:
    """Run a command in this process: the same code as from a shell, without loading torch again."""
    try:
        context.find_root().command.main(args=words, prog_name="phema")
    except SystemExit as exit_:
        if exit_.code not in (0, None):
            raise


def _shown(result: SweepResult) -> list[float]:
    """Raw weights, the shortest, the best and the longest length, each once."""
    lengths = [row.sigma_rel for row in result.averaged]
    return list(dict.fromkeys([RAW, lengths[0], result.best.sigma_rel, lengths[-1]]))


def agreement(run: Path, sigma_rel: float) -> float:
    """Relative distance of the synthesized average from the one that was tracked directly.

    Args:
        run: a run folder that was trained with `--direct`.
        sigma_rel: the length.

    Returns:
        |synthesized - direct| / |direct| over all averaged weights.

    Raises:
        ConfigError: that length was not tracked directly.
    """
    direct_store = SnapshotStore.open(run / "direct")
    if sigma_rel not in direct_store.sigma_rels:
        raise ConfigError(f"{run / 'direct'} holds no average of sigma_rel {sigma_rel}.")
    store = find_store(run)
    made = synthesize(store, sigma_rel, at=direct_store.times[-1])
    direct = synthesize(direct_store, sigma_rel)
    names = [entry.name for entry in store.table.entries.values() if entry.averaged]
    difference = sum(float(np.sum((made[n] - direct[n]).astype(np.float64) ** 2)) for n in names)
    norm = sum(float(np.sum(direct[n].astype(np.float64) ** 2)) for n in names)
    return (difference / norm) ** 0.5


def _summary(result: SweepResult, run: Path) -> str:
    best, raw = result.best, result.raw
    assert raw is not None
    return (
        f"best length sigma_rel {best.sigma_rel:g}: Frechet distance {best.values['fd']:.3f}, raw "
        f"weights {raw.values['fd']:.3f}\n"
        f"synthesized sigma_rel {DIRECT} agrees with the directly tracked one to "
        f"{agreement(run, DIRECT):.1e} (relative)"
    )


def _report(
    result: SweepResult, run: Path, commands: list[list[str]], out: Path, seconds: float
) -> str:
    rows = [
        [label(row.sigma_rel), f"{row.values['fd']:.3f}", f"{row.values['accuracy']:.1%}"]
        for row in result.rows
    ]
    del out
    return "\n".join(
        [
            "# What `phema demo` made",
            "",
            "![Frechet distance against averaging length](curve.png)",
            "",
            "![Samples of the raw weights and at short, best and long averages](samples.png)",
            "",
            "```",
            table(["sigma_rel", "Frechet distance", "accuracy"], rows),
            "```",
            "",
            _summary(result, run),
            "",
            "`accuracy` is how often the digit classifier sees the class that was asked for.",
            "",
            f"The commands that were run ({seconds / 60:.1f} minutes in all):",
            "",
            "```bash",
            *(f"phema {shlex.join(words)}" for words in commands),
            "```",
            "",
        ]
    )


def _write(descriptor: int, text: str) -> None:
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:  # a descriptor
        file.write(text)
