"""Optimizers around optimizers whose `step` PyTorch does not know.

PyTorch puts hooks around `step` when `Optimizer.__init__` runs. Wrappers that leave it out (Lookahead in
several packages, accelerate's optimizer) or that are no `Optimizer` (schedule-free's wrapper) have none,
and the hooks of the optimizer inside fire too early: the wrapper may still change the weights. So the
wrapper's own `step` is wrapped, on the object. It counts when an optimizer inside has stepped meanwhile,
which those that accumulate gradients, or ask a GradScaler, do not do in each call.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from posthoc_ema.errors import ConfigError, TrackingError


def is_optimizer(thing: object) -> bool:
    """Whether it is one, or has what the tracker needs of one: `step` and `param_groups`."""
    return callable(getattr(type(thing), "step", None)) and hasattr(thing, "param_groups")


def has_hooks(optimizer: object) -> bool:
    """Whether PyTorch calls hooks in its `step`."""
    hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return bool(hooked) and hasattr(optimizer, "_optimizer_step_post_hooks")


def stepping_parts(optimizer: object) -> list[Optimizer]:
    """The optimizers with hooks that do the steps: this one, or those inside it.

    Args:
        optimizer: an optimizer, or a wrapper around one or several.

    Raises:
        ConfigError: it is no optimizer.
        TrackingError: it has no hooks, and no optimizer with hooks is found inside.
    """
    if not is_optimizer(optimizer):
        raise ConfigError(
            f"track follows optimizers, got {type(optimizer).__name__}, which has no `step` or no "
            "`param_groups`. Pass the optimizer, or make a Tracker and call Tracker.step() yourself "
            "after each step."
        )
    if has_hooks(optimizer):
        return [optimizer]  # type: ignore[list-item]
    found = list(_inside(optimizer))
    if not found or not hasattr(optimizer, "__dict__"):
        raise TrackingError(
            f"{type(optimizer).__name__} does not let PyTorch hook its `step`, and holds no optimizer "
            "that does. Make a Tracker and call Tracker.step() yourself after each step."
        )
    return found


def _inside(optimizer: object) -> Iterator[Optimizer]:
    seen, waiting = {id(optimizer)}, [optimizer]
    while waiting:
        for attribute in list(getattr(waiting.pop(), "__dict__", {}).values()):
            for part in _elements(attribute):
                if id(part) in seen or not is_optimizer(part):
                    continue
                seen.add(id(part))
                if has_hooks(part):
                    yield part
                else:
                    waiting.append(part)


def _elements(attribute: Any) -> list[Any]:
    if isinstance(attribute, dict):
        return list(attribute.values())
    return list(attribute) if isinstance(attribute, list | tuple) else [attribute]


def wrap_step(
    optimizer: Any, begin: Callable[[], None], end: Callable[[bool], None]
) -> Callable[[], None]:
    """Call `begin` before and `end` after each `step` of this one object.

    The learning rate schedulers of PyTorch wrap `step` on the object as well, and need a bound method with
    a function in it; so this is one, and it works before and after theirs.

    Args:
        optimizer: the object; its class stays as it is.
        begin: called before the outermost call.
        end: called after it, with whether it came to its end.

    Returns:
        A function that takes the wrapper off.
    """
    before = vars(optimizer).get("step")
    depth, active = 0, True

    @functools.wraps(type(optimizer).step if before is None else before)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        # A copy of the object has this method too, and is not followed.
        followed = self is optimizer
        inner = (
            before if followed and before is not None else functools.partial(type(self).step, self)
        )
        if not active or not followed or depth:
            return inner(*args, **kwargs)
        begin()
        depth, done = 1, False
        try:
            result = inner(*args, **kwargs)
            done = True
        finally:
            depth = 0
            end(done)
        return result

    method = types.MethodType(step, optimizer)
    vars(optimizer)["step"] = method

    def detach() -> None:
        nonlocal active
        active = False  # what a scheduler has wrapped later cannot be taken out
        if vars(optimizer).get("step") is method:
            if before is None:
                del vars(optimizer)["step"]
            else:
                vars(optimizer)["step"] = before

    return detach


def refuse_hidden_step(optimizer: Any) -> None:
    """Refuse a step of the optimizer inside that runs in a `step` of `optimizer` the wrapper missed.

    Raises:
        TrackingError: someone kept `step` from before it was wrapped: its end would go unnoticed.
    """
    code = getattr(inspect.unwrap(type(optimizer).step), "__code__", None)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is optimizer:
            raise TrackingError(
                f"`step` of {type(optimizer).__name__} is called by something that took it before "
                "tracking began, so its end cannot be seen. Pass the outermost optimizer to track, or "
                "make a Tracker and call Tracker.step() yourself after each step."
            )
        frame = frame.f_back
