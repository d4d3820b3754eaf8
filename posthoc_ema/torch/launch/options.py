"""What the options of `phema track` mean for a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_EVERY = 1000


def tracker_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Tracker` from values of the options of `phema track`."""
    samples = options["samples_per_step"]
    names = (
        "update_every",
        "dtype",
        "keep",
        "raw",
        "tensors",
        "kernel",
        "average_dtype",
        "on_error",
    )
    chosen = {name: options[name] for name in names}
    if options["shard_averages"]:
        chosen["shard_averages"] = True
    return {
        **chosen,
        "sigma_rels": tuple(options["sigma_rels"]),
        "every": options["every"] or DEFAULT_EVERY * (samples or 1),
        "clock": "images" if samples else "steps",
        "samples_per_step": samples,
        "keep_range": tuple(options["keep_range"]),
        "device": None if options["device"] == "auto" else options["device"],
    }
