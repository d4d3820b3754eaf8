"""Every tracker, every law, and the exceptions with their reasons."""

from __future__ import annotations

import pytest

from .laws import LAWS
from .outcomes import Task
from .trackers import BFLOAT16_TOLERANCE, Command, InProcess, Oracle, Workers

HERE = {
    "oracle": Oracle(),
    "eager": InProcess({"kernel": "eager"}),
    "hook": InProcess(hook=True),
    "foreground": InProcess({"background": False}),
    "compiled": InProcess({"kernel": "compiled"}),
    "offloaded": InProcess({"device": "cpu"}),
    "bfloat16": InProcess({"average_dtype": "bfloat16"}, tolerance=BFLOAT16_TOLERANCE),
}
"""Trackers in the process of the tests."""

ELSEWHERE = {
    "triton-interpreter": Workers("triton", variables={"TRITON_INTERPRET": "1"}),
    "ddp": Workers("ddp", group=True),
    "fsdp2": Workers("fsdp", group=True),
    "zero-code": Command(),
    "process-group-2": Workers("process-group", 2),
    "ddp-2": Workers("ddp", 2),
    "ddp-split-2": Workers("ddp-split", 2),
    "fsdp2-2": Workers("fsdp", 2),
    "fsdp2-4": Workers("fsdp", 4),
}
"""Trackers in processes of their own."""

TRACKERS = HERE | ELSEWHERE

SLOW = {"process-group-2", "ddp-2", "ddp-split-2", "fsdp2-2", "fsdp2-4"}
QUICK_COMMANDS = {
    Task("impulse"),
    Task("tied"),
    Task("buffers"),
    Task("mixed-dtypes"),
    Task("scalars-and-empty"),
    Task("impulse-fixed-samples"),
    Task("impulse", resume_at=(1, 13, 40)),
}
"""What is left for `make test` of the commands, each of which takes seconds; the others are slow."""

EXCEPTIONS = {
    ("oracle", "training_is_untouched"): "there is no training: the oracle reads the history",
}
FSDP_LAYOUT = "fully_shard refuses parameters that are not contiguous"
ZERO_CODE_SAMPLES = "a command does not say its batch sizes: --samples-per-step is one number"


def _reason(tracker, law, task):
    if tracker == "zero-code" and task.played.samples_per_step is None:
        return ZERO_CODE_SAMPLES
    if tracker.startswith("fsdp2") and task.history == "transposed":
        return FSDP_LAYOUT
    return EXCEPTIONS.get((tracker, law.__name__))


def table(trackers):
    """Parameters (tracker, law, task) of a test, for all laws."""
    for tracker in trackers:
        for law, tasks in LAWS.items():
            for task in tasks:
                reason = _reason(tracker, law, task)
                marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
                if tracker in SLOW or (tracker == "zero-code" and task not in QUICK_COMMANDS):
                    marks.append(pytest.mark.slow)
                parts = [task.history, f"every-{task.update_every}" * (task.update_every > 1)]
                parts += ["resumed"] * bool(task.resume_at)
                name = "-".join([tracker, law.__name__, *filter(None, parts)])
                yield pytest.param(tracker, law, task, id=name, marks=marks)
