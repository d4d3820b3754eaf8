"""Synthesis: plan which stored averages are combined how (`plan`), then stream them through once.

`reading` gives tiles of the inputs, `combine` adds them up, `recipes` says what is to be made of which
inputs, `layouts` and `like` which files hold it, `writing` and `outputs` make dicts, files and model
folders of it. `checkpoints` does the same for raw checkpoints of other trainers.
"""

from posthoc_ema.synthesis.checkpoint_names import (
    TimedCheckpoint,
    choose_times,
    find_checkpoints,
)
from posthoc_ema.synthesis.checkpoints import (
    CheckpointPlan,
    checkpoint_recipe,
    gap_message,
    plan_checkpoints,
)
from posthoc_ema.synthesis.combine import Block, Group, combine
from posthoc_ema.synthesis.layouts import Layout, sharded, single_file, table_tensors
from posthoc_ema.synthesis.like import like_layout
from posthoc_ema.synthesis.measuring import SAMPLE, Measurement, measure
from posthoc_ema.synthesis.outputs import (
    Synthesized,
    execute,
    synthesize,
    synthesize_to_files,
    synthesize_to_folders,
)
from posthoc_ema.synthesis.plan import (
    DOUBTFUL,
    RAW,
    Override,
    SynthesisPlan,
    TargetReport,
    out_of_reach,
    plan_synthesis,
)
from posthoc_ema.synthesis.recipes import Recipe, store_recipe
from posthoc_ema.synthesis.writing import Output, check_free, write_outputs

__all__ = [
    "DOUBTFUL",
    "RAW",
    "SAMPLE",
    "Block",
    "CheckpointPlan",
    "Group",
    "Layout",
    "Measurement",
    "Output",
    "Override",
    "Recipe",
    "SynthesisPlan",
    "Synthesized",
    "TargetReport",
    "TimedCheckpoint",
    "check_free",
    "checkpoint_recipe",
    "choose_times",
    "combine",
    "execute",
    "find_checkpoints",
    "gap_message",
    "like_layout",
    "measure",
    "out_of_reach",
    "plan_checkpoints",
    "plan_synthesis",
    "sharded",
    "single_file",
    "store_recipe",
    "synthesize",
    "synthesize_to_files",
    "synthesize_to_folders",
    "table_tensors",
    "write_outputs",
]
