"""Synthesis: plan which stored averages are combined how (`plan`), then stream them through once.

`reading` gives tiles of the inputs, `combine` adds them up, `outputs` makes dicts and files of the result.
"""

from posthoc_ema.synthesis.combine import Block, Group, combine
from posthoc_ema.synthesis.outputs import execute, synthesize, synthesize_to_files
from posthoc_ema.synthesis.plan import (
    DOUBTFUL,
    RAW,
    SynthesisPlan,
    out_of_reach,
    plan_synthesis,
)

__all__ = [
    "DOUBTFUL",
    "RAW",
    "Block",
    "Group",
    "SynthesisPlan",
    "combine",
    "execute",
    "out_of_reach",
    "plan_synthesis",
    "synthesize",
    "synthesize_to_files",
]
