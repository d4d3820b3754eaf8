"""From the hooks of optimizers to one event for each training iteration.

An optimizer's hooks fire more often than training advances: twice where `step` calls `super().step()`,
once more for a wrapper that is an optimizer itself, once for each of several optimizers of one model, and
also when a GradScaler has made the step do nothing. `Iterations` counts what the weights have gone through.

How a nested step is told from an outermost one: PyTorch puts one and the same wrapper (made by
`Optimizer.profile_hook_step`) around the `step` of every class, and calls the hooks inside it. So the hook
looks for frames of that wrapper on its own stack. Unlike a counter of steps that were begun, a stack cannot
go wrong: an exception in `step` takes the frame with it. Tested on plain, compiled and wrapped optimizers.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from posthoc_ema.torch.step_outcome import Outcome
from posthoc_ema.torch.wrapped_steps import (
    has_hooks,
    refuse_hidden_step,
    stepping_parts,
    wrap_step,
)

PATIENCE = 100
"""Iterations after which an optimizer that does not step any more is not waited for."""


def _wrapper_code() -> CodeType:
    def step(self: Optimizer) -> None:
        """Never called: only what PyTorch wraps around it matters."""

    return Optimizer.profile_hook_step(step).__code__


_CODE = _wrapper_code()
_REHEARSAL = "_init_optim_state"
"""Function of torch.distributed.checkpoint that steps an optimizer without gradients and at rate zero, to
make the state that a checkpoint is loaded into (at each checkpoint, for optimizers without one, as SGD)."""


def _is_step(frame: FrameType) -> bool:
    """Whether this is the frame of PyTorch's wrapper, also as torch.compile rewrites it."""
    code = frame.f_code
    return code is _CODE or (
        code.co_firstlineno == _CODE.co_firstlineno and code.co_filename == _CODE.co_filename
    )


def running_steps(frame: FrameType | None) -> list[Optimizer | None]:
    """Optimizers whose `step` is running on the stack of `frame`, the innermost first.

    An entry is None where a rewritten frame does not tell its optimizer.
    """
    found: list[Optimizer | None] = []
    while frame is not None:
        if _is_step(frame):
            optimizer = frame.f_locals.get("self")
            found.append(optimizer if isinstance(optimizer, Optimizer) else None)
        frame = frame.f_back
    return found


def outer_step(optimizer: Optimizer) -> Optimizer | None:
    """The outermost optimizer in whose `step` this one's runs; None if this step is an outermost one.

    To be called in a hook of `optimizer`. A step inside that of an optimizer of other parameters (in its
    closure, say) is an outermost one too: what it trains is done when it is done. A step that only makes
    the optimizer's state is the optimizer's own affair: it counts as a nested one.
    """
    frame: FrameType | None = sys._getframe(1)
    depth = 0
    while frame is not None:
        if frame.f_code.co_name == _REHEARSAL:
            return optimizer
        depth += _is_step(frame)
        frame = frame.f_back
    if depth < 2:
        return None
    for outer in running_steps(sys._getframe(1))[:0:-1]:
        if outer is None or outer is optimizer or _share(outer, optimizer):
            return outer or optimizer
    return None


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _share(first: Optimizer, second: Optimizer) -> bool:
    if first.param_groups is second.param_groups:
        return True
    return not {id(p) for p in parameters_of(first)}.isdisjoint(map(id, parameters_of(second)))


class Iterations:
    """One call for each training iteration, however many optimizers take part in it.

    An iteration is over when every optimizer that is expected has stepped. Which ones are is seen in the
    iterations before; where one is left out (its step was skipped, or it steps more rarely), the iteration
    is over when the first of them, or any one that has stepped already, is about to step again: the weights
    are still those of its end.

    Args:
        count: called at the end of each iteration in which the weights have moved.
        optimizers: those that are expected from the start; without any, the first iteration tells.
        first: the one that steps first in an iteration, if that is known; otherwise it is that of the first
            iteration in which all have stepped.
    """

    def __init__(
        self,
        count: Callable[[], None],
        optimizers: Iterable[Optimizer] = (),
        first: Optimizer | None = None,
    ) -> None:
        self._count = count
        self._first = None if first is None else id(first)
        # Weak references, so that an optimizer that training has dropped is not waited for.
        self._expected: dict[int, weakref.ref[Optimizer]] = {
            id(o): weakref.ref(o) for o in optimizers
        }
        self._learning = not self._expected
        self._missed: dict[int, int] = {}
        self._stepped: dict[int, Sequence[Outcome]] = {}
        self._seen: dict[int, weakref.ref[Optimizer]] = {}
        self._joined = False

    @property
    def open(self) -> bool:
        """Whether something has stepped that is not counted yet."""
        return bool(self._stepped)

    def replace(self, optimizer: Optimizer, outer: Optimizer) -> None:
        """Expect `outer` from now on instead of `optimizer`, whose steps run inside those of `outer`."""
        if id(optimizer) not in self._expected:
            return
        if self._first == id(optimizer):
            self._first = id(outer)
        self._expected = {
            (id(outer) if key == id(optimizer) else key): (
                weakref.ref(outer) if key == id(optimizer) else reference
            )
            for key, reference in self._expected.items()
        }

    def before(self, optimizer: Optimizer) -> None:
        """To be called when an outermost step of `optimizer` is about to begin."""
        if not self._stepped:
            return
        if self._joined and id(optimizer) not in self._stepped:
            self.discard()
        elif id(optimizer) in self._stepped or id(optimizer) == self._first:
            self._end()

    def after(self, optimizer: Optimizer, outcomes: Sequence[Outcome] | None = None) -> None:
        """To be called when an outermost step of `optimizer` has ended.

        Args:
            optimizer: the one that has stepped.
            outcomes: those of the optimizers inside it, if it is they that move the weights.
        """
        new = not self._learning and id(optimizer) not in self._expected
        # One that steps for the first time when all others have: most likely it ends the iteration that
        # was counted a moment ago. If it is the next one to step again, it makes iterations of its own.
        self._joined = new and not self._stepped
        self._stepped[id(optimizer)] = [Outcome(optimizer)] if outcomes is None else outcomes
        self._seen[id(optimizer)] = weakref.ref(optimizer)
        if new:
            self._expected[id(optimizer)] = self._seen[id(optimizer)]
        if self._learning or self._joined or not self._expected.keys() <= self._stepped.keys():
            return
        every = [each for several in self._stepped.values() for each in several]
        if all(o.known for o in every) or any(o.known and o.moved() for o in every):
            self._end()

    def settle(self) -> None:
        """End the iteration now, if one is open: nothing will step before its weights are looked at."""
        if self._joined:
            self.discard()
        elif self._stepped:
            self._end()

    def discard(self) -> None:
        """Forget the iteration that is open, if one is: its weights are replaced by others."""
        self._stepped.clear()
        self._joined = False

    def _end(self) -> None:
        stepped, self._stepped = self._stepped, {}
        self._joined = False
        moved = any(each.moved() for several in stepped.values() for each in several)
        self._learn(stepped.keys())
        if moved:
            self._count()

    def _learn(self, stepped: Iterable[int]) -> None:
        self._learning = False
        stepped = list(stepped)
        for key in stepped:
            self._expected.setdefault(key, self._seen[key])
            self._missed[key] = 0
        if self._first not in self._expected and self._expected.keys() <= set(stepped):
            self._first = stepped[0]
        for key in self._expected.keys() - set(stepped):
            self._missed[key] = self._missed.get(key, 0) + 1
        for key, reference in list(self._expected.items()):
            if reference() is None or self._missed.get(key, 0) >= PATIENCE:
                del self._expected[key]
        self._seen.clear()


class _Guard:
    """Keeps errors of the bookkeeping away from training, and lets those of `count` through.

    `count` has its own rule for which of its errors training is to see.
    """

    def __init__(
        self, count: Callable[[], None], report: Callable[[Exception], None] | None
    ) -> None:
        self._count, self._report = count, report
        self._counted: Exception | None = None
        self._reported = False

    def count(self) -> None:
        try:
            self._count()
        except Exception as error:
            self._counted = error
            raise

    def __call__(self, body: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                body(*args)
            except Exception as error:
                of_count, self._counted = error is self._counted, None
                if of_count or self._report is None:
                    raise
                if not self._reported:
                    self._reported = True
                    self._report(error)

        # A compiled step calls it as it is: it looks at the stack, which is not to be traced.
        return torch.compiler.disable(guarded)


def follow(
    optimizers: Sequence[Optimizer],
    count: Callable[[], None],
    report: Callable[[Exception], None] | None = None,
) -> tuple[Iterations, Callable[[], None]]:
    """Call `count` after each iteration of these optimizers, by hooks on them.

    Args:
        optimizers: those that train; where PyTorch puts no hooks around the `step` of one (a wrapper around
            others), its `step` is wrapped on the object.
        count: called at the end of each iteration; what it raises goes to the training loop.
        report: called, once, with an unexpected error of the bookkeeping, which then does not go to the
            training loop; None: it does.

    Returns:
        (the iterations, a function that takes the hooks off again).

    Raises:
        ConfigError: something else than an optimizer.
        TrackingError: an optimizer without hooks, and without one inside that has them.
    """
    optimizers = list({id(each): each for each in optimizers}.values())
    parts = [stepping_parts(each) for each in optimizers]
    guard = _Guard(count, report)
    iterations = Iterations(guard.count, optimizers)
    undo: list[Callable[[], None]] = []
    followed = {id(each) for each in optimizers}
    for optimizer, inside in zip(optimizers, parts, strict=True):
        if has_hooks(optimizer):
            _follow_hooked(optimizer, followed, iterations, guard, undo)
        else:
            _follow_wrapper(optimizer, inside, iterations, guard, undo)

    def detach() -> None:
        for each in reversed(undo):
            each()

    return iterations, detach


def _hook(
    optimizer: Optimizer,
    before: Callable[..., None],
    after: Callable[..., None],
    undo: list[Callable[[], None]],
) -> None:
    undo.append(optimizer.register_step_pre_hook(before).remove)
    undo.append(optimizer.register_step_post_hook(after).remove)


def _follow_hooked(
    optimizer: Optimizer,
    followed: set[int],
    iterations: Iterations,
    guard: _Guard,
    undo: list[Callable[[], None]],
) -> None:
    def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
        outer = outer_step(optimizer)
        if outer is None:
            iterations.before(optimizer)
        elif outer is not optimizer:
            # A wrapper that is an optimizer itself: its step ends when the weights are final.
            iterations.replace(optimizer, outer)
            if id(outer) not in followed:
                followed.add(id(outer))
                _hook(outer, before_step, after_step, undo)

    def after(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if outer_step(optimizer) is None:
            iterations.after(optimizer)

    before_step, after_step = guard(before), guard(after)
    _hook(optimizer, before_step, after_step, undo)


def _follow_wrapper(
    wrapper: Optimizer,
    inside: Sequence[Optimizer],
    iterations: Iterations,
    guard: _Guard,
    undo: list[Callable[[], None]],
) -> None:
    running = False
    outcomes: list[Outcome] = []

    def begin() -> None:
        nonlocal running
        running = True
        outcomes.clear()
        iterations.before(wrapper)

    def end(done: bool) -> None:
        nonlocal running
        running = False
        if done and outcomes:
            iterations.after(wrapper, list(outcomes))

    def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not running and outer_step(optimizer) is None:
            iterations.before(wrapper)

    def after(optimizer: Optimizer, args: object, kwargs: object) -> None:
        outer = outer_step(optimizer)
        if outer is optimizer:  # nested in its own step, or only makes its state
            return
        if running:
            # A GradScaler takes found_inf off the optimizer again before the wrapper's step is done.
            outcomes.append(Outcome(optimizer))
        elif outer is None:
            refuse_hidden_step(wrapper)
            iterations.after(wrapper, [Outcome(optimizer)])

    before_step, after_step = guard(before), guard(after)
    for optimizer in inside:
        _hook(optimizer, before_step, after_step, undo)
    undo.append(wrap_step(wrapper, guard(begin), guard(end)))
