"""What `phema track -- COMMAND` does in a process of the command, from its first optimizer step on.

The hooks are registered by `site/sitecustomize.py`. The first iteration shows which optimizers belong
together and which module they train; when the next one is about to step, with the weights still as they
were, the tracker is made and the first iteration counted. From then on each iteration is one event.
"""

from __future__ import annotations

import ast
import gc
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from posthoc_ema.errors import PhemaError, TrackingError
from posthoc_ema.torch.launch.models import Scan, class_name
from posthoc_ema.torch.launch.resume import Mark, mark_of
from posthoc_ema.torch.launch.run import TrackedRun
from posthoc_ema.torch.launch.signals import Ending
from posthoc_ema.torch.stepping import Iterations, outer_step, parameters_of

_log = logging.getLogger("posthoc_ema")
ENVIRONMENT = "PHEMA_TRACK"
Note = Callable[[str, str], None]
_CHOICE = "--model REGEX chooses, and {model} in --out tracks each."


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

    def models(self, pattern: str | None) -> dict[int, list[nn.Module]]:
        """Which modules each optimizer trains, by the optimizer's id; the first trained come first."""
        assert self._scan is not None  # a pool is asked after a step only
        found: dict[int, list[nn.Module]] = {}
        owner: dict[int, nn.Module] = {}
        for key, optimizer in self.optimizers.items():
            found[key] = self._scan.find_all(parameters_of(optimizer), pattern, owner)
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
        self._several = "{model}" in options["out"]
        self._off = False  # nothing that is not tracked yet will be
        self._told: Exception | None = None
        self._runs: list[TrackedRun] = []
        self._failed: list[TrackedRun] = []
        self._names: list[str] = []  # of all that have been tracked in this process
        self._mentioned: set[str] = set()  # what is trained too, as it was said
        self._passed_over: list[str] = []  # classes that --model does not match
        self._marks: dict[int, Mark] = {}
        # The references tell whether an id is still the same optimizer; no runs: trained, but not tracked.
        self._owners: dict[int, tuple[weakref.ref[Optimizer], tuple[TrackedRun, ...]]] = {}
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
        if (self._off and not self._runs) or os.getpid() != self._process:
            return
        try:
            hook(optimizer)
        except Exception as error:
            if error is not self._told:
                self._off = True
                self._tell(error)
            if self._options["on_error"] == "raise":
                raise
        finally:
            self._told = None  # its traceback holds models

    def _tell(self, error: Exception, name: str = "") -> None:
        """Say what went wrong, and with which of several models."""
        self._told = error
        text = " ".join(str(error).split()) or type(error).__name__
        if name and self._several:
            text = f"{name}: {text}"
        self._note("problem", text)
        _log.error("%s. Training goes on, untracked.", text.rstrip("."), exc_info=error)

    def _each(self, runs: Iterable[TrackedRun], action: Callable[[TrackedRun], None]) -> None:
        """Do something for each run; an error of one ends that one, and leaves the others going."""
        first: Exception | None = None
        for run in runs:
            if run in self._failed:
                continue
            try:
                action(run)
            except Exception as error:
                self._failed.append(run)
                self._tell(error, run.name)
                run.finish(store=False)
                first = first or error
        self._raise_if_asked(first)

    def _raise_if_asked(self, error: Exception | None) -> None:
        if error is not None and self._options["on_error"] == "raise":
            self._told = error
            raise error

    def _before(self, optimizer: Optimizer) -> None:
        if outer_step(optimizer) is not None:
            return
        runs = self._runs_of(optimizer)
        if runs is not None:
            self._each(runs, lambda run: run.iterations.before(optimizer))
        elif not self._off:
            if id(optimizer) not in self._marks:
                self._marks[id(optimizer)] = mark_of(optimizer)
            self._pool.iterations.before(optimizer)

    def _after(self, optimizer: Optimizer) -> None:
        if outer_step(optimizer) is not None:
            return
        runs = self._runs_of(optimizer)
        if runs is not None:
            self._each(runs, lambda run: run.iterations.after(optimizer))
        elif not self._off:
            if id(optimizer) not in self._pool.optimizers:
                optimizer.register_state_dict_pre_hook(self._before_checkpoint)
            self._pool.add(optimizer)
            self._pool.iterations.after(optimizer)

    def _before_checkpoint(self, optimizer: Optimizer) -> None:
        """The script makes a checkpoint right after its first step: it is decided now what is tracked."""
        if id(optimizer) in self._pool.optimizers:
            self._guarded(lambda _: self._pool.iterations.settle(), optimizer)

    def _runs_of(self, optimizer: Optimizer) -> tuple[TrackedRun, ...] | None:
        """The runs that this optimizer's steps count for; None if it is not decided yet."""
        entry = self._owners.get(id(optimizer))
        if entry is not None and entry[0]() is optimizer:
            return entry[1]
        if id(optimizer) in self._pool.optimizers:
            return None
        # A further optimizer of what is tracked.
        runs = tuple(run for run in self._runs if run.trains(optimizer))
        if not runs:
            return None
        self._own(optimizer, runs)
        self._mention_the_rest(optimizer)
        return runs

    def _mention_the_rest(self, optimizer: Optimizer) -> None:
        """Say what else a further optimizer of a tracked model trains."""
        tracked = {id(p) for run in self._runs for p in run._module.parameters()}
        rest = [p for p in parameters_of(optimizer) if id(p) not in tracked]
        if not rest:
            return
        scan, pattern = Scan(rest), self._options["model"]
        others = scan.find_all(rest, pattern, {})
        scan.close()
        self._mention(
            self._names,
            [class_name(m) for m in others if pattern is None or _matches(pattern, m)],
            "one optimizer trains both, and it came after tracking had begun."
            if self._several
            else _CHOICE,
        )

    def _own(self, optimizer: Optimizer, runs: Iterable[TrackedRun]) -> None:
        self._owners[id(optimizer)] = (weakref.ref(optimizer), tuple(runs))
        self._each(runs, lambda run: run.add(optimizer))

    # ---- the first iteration is over

    def _decide(self) -> None:
        """Make the trackers of what the optimizers of the pool train, and count their first iteration."""
        pool, self._pool = self._pool, _Pool(self._decide)
        marks, self._marks = self._marks, {}
        replica = _other_rank(pool.optimizers.values())
        if replica and not self._options["shard_averages"]:
            self._off = True
            self._note("replica", replica)
            return
        self._end_dropped()
        models = pool.models(self._options["model"])
        modules = {id(m): m for found in models.values() for m in found}
        first: Exception | None = None
        begun: dict[int, TrackedRun] = {}
        for module in self._choose(list(modules.values())):
            trained_by = [
                optimizer
                for key, optimizer in pool.optimizers.items()
                if any(m is module for m in models[key])
            ]
            name = self._new_name(module)
            try:
                begun[id(module)] = self._begin(name, module, trained_by, marks)
            except Exception as error:
                self._off |= not self._several
                self._tell(error, name)
                first = first or error
        for key, optimizer in pool.optimizers.items():
            self._own(optimizer, [begun[id(m)] for m in models[key] if id(m) in begun])
        self._each(begun.values(), _count_first)
        self._raise_if_asked(first)

    def _end_dropped(self) -> None:
        """Finish the runs whose optimizers the script has dropped, and free their memory."""
        self._owners = {key: e for key, e in self._owners.items() if e[0]() is not None}
        trained = [run for _, runs in self._owners.values() for run in runs]
        over = [run for run in self._runs if run not in trained]
        if not over:
            return
        self._each(over, lambda run: run.finish(store=True))
        self._runs[:] = [run for run in self._runs if run not in over]
        self._failed = [run for run in self._failed if run not in over]
        over.clear()
        trained.clear()
        gc.collect()  # a tracker's parts refer to each other

    def _choose(self, modules: list[nn.Module]) -> list[nn.Module]:
        if not modules:
            if self._names:
                return []
            raise TrackingError(
                "the optimizer's parameters belong to no module that could be found. Call "
                "posthoc_ema.torch.track(optimizer, model, folder) in the script."
            )
        pattern = self._options["model"]
        fitting = [m for m in modules if pattern is None or _matches(pattern, m)]
        if not fitting and not self._names:
            new = [class_name(m) for m in modules if class_name(m) not in self._passed_over]
            if new:
                self._passed_over += new
                _log.warning("%s", self._nothing_fits("trained so far"))
        chosen = fitting if self._several else [] if self._names else fitting[:1]
        others = [class_name(m) for m in fitting if not any(m is c for c in chosen)]
        self._mention([*self._names, *map(class_name, chosen)], others, _CHOICE)
        return chosen

    def _mention(self, tracked: list[str], others: list[str], remark: str) -> None:
        """Say once what is trained and not tracked."""
        words = {name: f"a second {name}" if name in tracked else name for name in others}
        new = [words[name] for name in words if words[name] not in self._mentioned]
        if not new:
            return
        self._mentioned.update(new)
        _log.warning(
            "tracking %s; %s %s trained too and not tracked: %s",
            ", ".join(tracked),
            ", ".join(new),
            "is" if len(new) == 1 else "are",
            remark,
        )

    def _nothing_fits(self, trained: str) -> str:
        names = ", ".join(dict.fromkeys(self._passed_over))
        return f"--model {self._options['model']} matches no class of what is {trained}: {names}."

    def _new_name(self, module: nn.Module) -> str:
        """Name of the class, numbered if there has been one: Net, Net-2, Net-3."""
        name = own = class_name(module)
        number = 1
        while name in self._names:
            number += 1
            name = f"{own}-{number}"
        self._names.append(name)
        return name

    def _begin(
        self,
        name: str,
        module: nn.Module,
        optimizers: list[Optimizer],
        marks: Mapping[int, Mark],
    ) -> TrackedRun:
        folder = Path(self._options["out"].replace("{model}", name))
        mark = marks[id(optimizers[0])]
        run = TrackedRun(module, optimizers, folder, mark, self._options, self._note)
        run.name = name
        self._runs.append(run)
        self._ending.install()
        return run

    def _finish(self) -> None:
        """The process ends: count what is open, store the last averages."""
        try:
            if not self._off and (self._several or not self._names):
                self._pool.iterations.settle()  # a single step
        except Exception as error:
            if error is not self._told:
                self._tell(error)
        if self._passed_over and not self._names:
            self._note("problem", self._nothing_fits("trained"))
        for run in self._runs:
            run.finish(store=run not in self._failed)


def _count_first(run: TrackedRun) -> None:
    run.count()
    run.report()


def _matches(pattern: str, module: nn.Module) -> bool:
    import re

    return re.search(pattern, class_name(module)) is not None


def _other_rank(optimizers: Iterable[Optimizer]) -> str:
    """Which replica this process is, if another one has the same weights and tracks them; else empty."""
    if any(hasattr(p, "device_mesh") for o in optimizers for p in parameters_of(o)):
        return ""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:  # RANK alone says nothing: job arrays number independent trainings by it
        rank, ranks = _whole("RANK"), _whole("WORLD_SIZE")
    return f"rank {rank} of {ranks}: rank 0 tracks" if rank > 0 and ranks > 1 else ""


def _whole(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
