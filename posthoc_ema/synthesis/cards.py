"""The model card of a synthesized folder: what it is, for people; phema.json says it to programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posthoc_ema.synthesis.layouts import Layout

_TAG = "- post-hoc-ema"
_SHOWN = 12  # inputs that the card lists; phema.json has them all


def record_name(variant: str | None) -> str:
    """Name of the file with the provenance."""
    return "phema.json" if variant is None else f"phema.{variant}.json"


def card_name(variant: str | None) -> str:
    """Name of the card. A variant lies beside other weights, whose card stays as it is."""
    return "README.md" if variant is None else f"README.{variant}.md"


def is_card(content: bytes) -> bool:
    """Whether a README was written by `card`, and may be by a later one."""
    return _TAG.encode() in content


def card(record: Mapping[str, Any], layout: Layout) -> str:
    """Text of the card, Markdown with the front matter that the hub reads.

    Args:
        record: what phema.json holds.
        layout: the files.
    """
    front = ["---", *([f"library_name: {layout.library}"] if layout.library else [])]
    front += ["tags:", _TAG, "---"]
    profile = record.get("profile") or _length(record["sigma_rel"])
    lines = [
        *front,
        "",
        f"# Averaged weights, {profile}",
        "",
        f"{_what(record)} Made by {record['tool']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(record)),
        "",
        *_loading(layout),
        f"The {len(record['inputs'])} inputs, with their coefficients, are in "
        f"`{record_name(layout.variant)}`; the largest:",
        "",
        "| input | time | coefficient |",
        "|---|---|---|",
    ]
    largest = sorted(record["inputs"], key=lambda row: -abs(row["coefficient"]))[:_SHOWN]
    lines += [f"| {r['file']} | {r['time']} | {r['coefficient']:.6g} |" for r in largest]
    return "\n".join(lines) + "\n"


def _length(sigma_rel: float) -> str:
    return f"sigma_rel {sigma_rel:g}" if sigma_rel else "raw weights (no averaging)"


def _what(record: Mapping[str, Any]) -> str:
    if not record["sigma_rel"] and not record.get("profile"):
        return f"The weights at the end of training ({record['time']} {record['clock']})."
    return (
        f"An average of the weights over training up to {record['time']} {record['clock']}, "
        "combined after training from what was stored during it (post-hoc EMA, arXiv 2312.02696)."
    )


def _facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = {
        "sigma_rel": "sigma_rel",
        "time": "training time",
        "clock": "unit of time",
        "run_id": "run",
        "predicted_error": "predicted relative error of the weights",
        "profile_error": "relative error of the averaging profile",
        "amplification": "sum of abs(coefficients)",
        "overrides": "other lengths of some tensors",
    }
    rows = [(text, record[key]) for key, text in names.items() if record.get(key)]
    return [(name, f"{value:.3g}" if isinstance(value, float) else value) for name, value in rows]


def _loading(layout: Layout) -> list[str]:
    variant = f', variant="{layout.variant}"' if layout.variant else ""
    calls = {
        "transformers": f"AutoModel.from_pretrained(FOLDER{variant})",
        "diffusers": f"DiffusionPipeline.from_pretrained(...); Model.from_pretrained(FOLDER{variant})",
        "peft": "PeftModel.from_pretrained(base_model, FOLDER)",
    }
    call = calls.get(layout.library)
    return ["```python", call, "```", ""] if call else []
