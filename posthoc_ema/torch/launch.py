"""What `phema track -- COMMAND` does in a process of the command, from its first optimizer step on.

The hooks are registered by `site/sitecustomize.py`. The first iteration shows which optimizers belong
together and which module they train; when the next one is about to step, with the weights still as they
were, the tracker is made and the first iteration counted. From then on each iteration is one event.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from posthoc_ema.errors import PhemaError, TrackingError
from posthoc_ema.torch.launch_models import Scan, class_name
from posthoc_ema.torch.launch_resume import Mark, mark_of
from posthoc_ema.torch.launch_run import TrackedRun
from posthoc_ema.torch.launch_signals import Ending
from posthoc_ema.torch.stepping import Iterations, outer_step, parameters_of

_log = logging.getLogger("posthoc_ema")
ENVIRONMENT = "PHEMA_TRACK"
Note = Callable[[str, str], None]


class _OneLine(logging.Formatter):
    """Our own errors are one line; a traceback is for bugs."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PhemaError):
            record = logging.makeLogRecord({**vars(record), "exc_info": None, "exc_text": None})
        return super().format(record)


def start(note: Note) -> Launch:
    """Begin with the options that `phema track` has put into the environment.

    Args:
        note: appends a line to the events of this run of `phema track`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("phema track: %(message)s"))
    _log.addHandler(handler)
    _log.propagate = False  # the script's own logging stays what it is
    return Launch(ast.literal_eval(os.environ[ENVIRONMENT]), note)


class _Pool:
    """Optimizers that have stepped, and whose model is not known yet."""

    def __init__(self, decide: Callable[[], None]) -> None:
        self.iterations = Iterations(decide)
        self.optimizers: dict[int, Optimizer] = {}
        self._scan: Scan | None = None

    def add(self, optimizer: Optimizer) -> None:
        """Remember an optimizer that has stepped, and watch the modules that it may train."""
        if id(optimizer) in self.optimizers:
            return
        self.optimizers[id(optimizer)] = optimizer
        parameters = parameters_of(optimizer)
        if self._scan is None:
            self._scan = Scan(parameters)
        else:
            self._scan.watch(parameters)

    def models(self, pattern: str | None) -> dict[int, nn.Module]:
        """Which module each optimizer trains, by the optimizer's id; the first trained come first."""
        assert self._scan is not None  # a pool is asked after a step only
        found: dict[int, nn.Module] = {}
        owned: dict[int, nn.Module] = {}
        for key, optimizer in self.optimizers.items():
            left = parameters_of(optimizer)
            while rest := [p for p in left if id(p) not in owned]:
                module = self._scan.find(rest, pattern)
                if module is None:
                    break
                owned |= {id(p): module for p in module.parameters()}
                found.setdefault(key, module)
                left = rest
            known = [owned[id(p)] for p in parameters_of(optimizer) if id(p) in owned]
            if known:
                found[key] = known[0]
        self._scan.close()
        return found


class Launch:
    """Follows all optimizers of this process, and tracks what they train.

    Args:
        options: values of the options of `phema track`.
        note: appends a line to the events of this run of `phema track`.
    """

    def __init__(self, options: Mapping[str, Any], note: Note) -> None:
        self._options = options
        self._note = note
        self._process = os.getpid()
        self._off = False
        self._runs: list[TrackedRun] = []
        self._passed_over: list[str] = []  # classes that --model does not match
        self._marks: dict[int, Mark] = {}
        # None: trained, but not tracked. The references tell whether an id is still the same optimizer.
        self._owners: dict[int, tuple[weakref.ref[Optimizer], TrackedRun | None]] = {}
        self._pool = _Pool(self._decide)
        self._ending = Ending(self._runs, self._finish)

    # ---- hooks

    def before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Called by every optimizer before it steps."""
        self._guarded(self._before, optimizer)

    def after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Called by every optimizer after it has stepped."""
        self._guarded(self._after, optimizer)
        if self._ending.asked and outer_step(optimizer) is None:
            self._ending.act_if_asked()

    def _guarded(self, hook: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        # A forked child has the parent's tracker in its memory, and must not write to its store.
        if self._off or os.getpid() != self._process:
            return
        try:
            hook(optimizer)
        except Exception as error:
            self._fail(error)
            if self._options["on_error"] == "raise":
                raise

    def _fail(self, error: Exception) -> None:
        self._off = True
        self._note("problem", " ".join(str(error).split()) or type(error).__name__)
        _log.error("%s. Training goes on, untracked.", str(error).rstrip("."), exc_info=error)

    def _before(self, optimizer: Optimizer) -> None:
        if outer_step(optimizer) is not None:
            return
        known, run = self._owner(optimizer)
        if run is not None:
            run.iterations.before(optimizer)
        elif not known:
            if id(optimizer) not in self._marks:
                self._marks[id(optimizer)] = mark_of(optimizer)
            self._pool.iterations.before(optimizer)

    def _after(self, optimizer: Optimizer) -> None:
        if outer_step(optimizer) is not None:
            return
        known, run = self._owner(optimizer)
        if run is not None:
            run.iterations.after(optimizer)
        elif not known:
            if id(optimizer) not in self._pool.optimizers:
                optimizer.register_state_dict_pre_hook(self._before_checkpoint)
            self._pool.add(optimizer)
            self._pool.iterations.after(optimizer)

    def _before_checkpoint(self, optimizer: Optimizer) -> None:
        """The script makes a checkpoint right after its first step: it is decided now what is tracked."""
        if id(optimizer) in self._pool.optimizers:
            self._guarded(lambda _: self._pool.iterations.settle(), optimizer)

    def _owner(self, optimizer: Optimizer) -> tuple[bool, TrackedRun | None]:
        """(whether it is decided what becomes of this optimizer's steps, the run that they count for)."""
        entry = self._owners.get(id(optimizer))
        if entry is not None and entry[0]() is optimizer:
            return True, entry[1]
        if id(optimizer) in self._pool.optimizers:
            return False, None
        for run in self._runs:  # a further optimizer of a model that is tracked
            if run.trains(optimizer):
                self._own(optimizer, run)
                return True, run
        return False, None

    def _own(self, optimizer: Optimizer, run: TrackedRun | None) -> None:
        self._owners[id(optimizer)] = (weakref.ref(optimizer), run)
        if run is not None:
            run.add(optimizer)

    # ---- the first iteration is over

    def _decide(self) -> None:
        """Make the trackers of what the optimizers of the pool train, and count their first iteration."""
        pool, self._pool = self._pool, _Pool(self._decide)
        if _is_replica(pool.optimizers.values()) and not self._options["shard_averages"]:
            self._off = True
            return
        models = pool.models(self._options["model"])
        chosen = self._choose(list({id(m): m for m in models.values()}.values()))
        for module in chosen:
            optimizers = [pool.optimizers[key] for key, m in models.items() if m is module]
            run = self._begin(module, optimizers)
            for optimizer in optimizers:
                self._own(optimizer, run)
            run.count()
            run.report()
        for optimizer in pool.optimizers.values():
            if id(optimizer) not in self._owners:
                self._own(optimizer, None)
        for optimizer in pool.optimizers.values():
            self._marks.pop(id(optimizer), None)

    def _choose(self, modules: list[nn.Module]) -> list[nn.Module]:
        if not modules:
            if self._runs:
                return []
            raise TrackingError(
                "the optimizer's parameters belong to no module that could be found. Call "
                "posthoc_ema.torch.track(optimizer, model, folder) in the script."
            )
        pattern, several = self._options["model"], "{model}" in self._options["out"]
        fitting = [m for m in modules if pattern is None or _matches(pattern, m)]
        if not fitting and not self._runs:
            self._passed_over += [class_name(m) for m in modules]
            _log.warning("%s", self._nothing_fits("trained so far"))
        chosen = fitting if several else [] if self._runs else fitting[:1]
        others = [class_name(m) for m in fitting if not any(m is c for c in chosen)]
        if others:
            tracked = ", ".join([*(r.name for r in self._runs), *map(class_name, chosen)])
            _log.warning(
                "tracking %s; %s is trained too and not tracked: --model REGEX chooses, and {model} in "
                "--out tracks each.",
                tracked,
                ", ".join(others),
            )
        return chosen

    def _nothing_fits(self, trained: str) -> str:
        names = ", ".join(dict.fromkeys(self._passed_over))
        return f"--model {self._options['model']} matches no class of what is {trained}: {names}."

    def _begin(self, module: nn.Module, optimizers: list[Optimizer]) -> TrackedRun:
        name = class_name(module)
        folder = Path(self._options["out"].replace("{model}", name))
        mark = self._marks[id(optimizers[0])]
        run = TrackedRun(module, optimizers, folder, mark, self._options, self._note)
        self._runs.append(run)
        self._ending.install()
        return run

    def _finish(self) -> None:
        """The process ends: count what is open, store the last averages."""
        try:
            if not self._runs and not self._off:
                self._pool.iterations.settle()  # a single step
        except Exception as error:
            self._fail(error)
        if self._passed_over and not self._runs:
            self._note("problem", self._nothing_fits("trained"))
        for run in self._runs:
            run.finish(store=not self._off)


def _matches(pattern: str, module: nn.Module) -> bool:
    import re

    return re.search(pattern, class_name(module)) is not None


def _is_replica(optimizers: Any) -> bool:
    """Whether another process has the same weights, and tracks them."""
    if any(hasattr(p, "device_mesh") for o in optimizers for p in parameters_of(o)):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() > 0
    return os.environ.get("RANK", "0") not in ("", "0")
