"""`phema synth`: the average of any length, as a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phema.options import At, Json, Norm, SigmaRels, Snapshots, find_store, parse_sigma_rels
from phema.output import note, output_folder, print_json, progress, size, table
from posthoc_ema import ConfigError, plan_synthesis, synthesize_to_files
from posthoc_ema.sweep import label
from posthoc_ema.synthesis import SynthesisPlan, out_of_reach


def command(
    snapshots: Snapshots,
    sigma_rel: SigmaRels,
    at: At = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="File (one length, *.safetensors) or folder.  [default: the current folder]",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="model (the model's own), float32, float16 or bfloat16.")
    ] = "model",
    norm: Norm = "random-walk",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    json: Json = False,
) -> None:
    """Synthesize averages of any length.

    All lengths are made in one pass over the files, in bounded memory. The results load with
    model.load_state_dict(safetensors.torch.load_file(PATH)).
    """
    sigma_rels = parse_sigma_rels(sigma_rel)
    store = find_store(snapshots)
    plan = plan_synthesis(store, sigma_rels, at=at, norm=norm)  # type: ignore[arg-type]  # checked inside
    paths = _paths(out, plan)
    if not overwrite:
        existing = [path for path in paths if path.exists()]
        if existing:
            raise ConfigError(f"{existing[0]} exists already; choose another --out or --overwrite.")
    with output_folder(paths[0].parent), progress("synthesizing") as report:
        synthesize_to_files(store, plan, paths, dtype=dtype, progress=report)
    if json:
        print_json(_as_json(plan, paths, store.clock))
        return
    rows = [
        [label(s), f"{error:.1e}", f"{gain:.1f}", path]
        for s, error, gain, path in zip(
            plan.sigma_rels, plan.profile_error, plan.amplification, paths, strict=True
        )
    ]
    typer.echo(table(["sigma_rel", "profile error", "sum|x|", "file"], rows))
    typer.echo(
        f"at {plan.time} {store.clock}, from {len(plan.inputs)} files ({size(plan.bytes_read)}) of "
        f"{store.folder}"
    )
    message = out_of_reach(plan)
    if message:
        note(message)


def _paths(out: Path | None, plan: SynthesisPlan) -> list[Path]:
    if out is not None and out.suffix == ".safetensors":
        if len(plan.sigma_rels) != 1:
            raise ConfigError(
                f"--out {out} is one file, but {len(plan.sigma_rels)} lengths are asked for; give a folder."
            )
        paths = [out]
    else:
        folder = out or Path()
        names = ["raw" if s == 0 else f"sigma_rel-{s!r}" for s in plan.sigma_rels]
        paths = [folder / f"{name}-at-{plan.time}.safetensors" for name in names]
    return paths


def _as_json(plan: SynthesisPlan, paths: list[Path], clock: str) -> dict[str, object]:
    results = [
        {
            "sigma_rel": s or None,
            "raw": s == 0,
            "profile_error": plan.profile_error[i].item(),
            "amplification": plan.amplification[i].item(),
            "file": str(paths[i]),
        }
        for i, s in enumerate(plan.sigma_rels)
    ]
    return {
        "time": plan.time,
        "clock": clock,
        "norm": plan.norm,
        "inputs": len(plan.inputs),
        "bytes_read": plan.bytes_read,
        "results": results,
    }
