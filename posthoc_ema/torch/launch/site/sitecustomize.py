"""What `phema track` puts into every Python process of its command: found on PYTHONPATH, run by `site`.

It gives way to the sitecustomize that it hides, and waits for `torch.optim.optimizer` to be imported: then
two hooks that every optimizer calls are registered. Until an optimizer steps nothing else of this package
is loaded, allocated or written, save a line in the temporary folder of this run of `phema track`, which
counts processes. Python 3.7 and later can read this file: the command may run any.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

ENVIRONMENT = "PHEMA_TRACK"
EVENTS = "PHEMA_TRACK_EVENTS"
OPTIMIZER = "torch.optim.optimizer"


def note(kind: str, text: str = "") -> None:
    """Append a line to the events of this run of `phema track`; one write, so lines stay whole."""
    line = " ".join([kind, str(os.getpid()), text.replace("\n", " ")]).rstrip() + "\n"
    try:
        descriptor = os.open(os.environ[EVENTS], os.O_WRONLY | os.O_APPEND)
    except (KeyError, OSError):  # `phema track` is gone, or another user runs this
        return
    try:
        os.write(descriptor, line.encode("utf-8", "backslashreplace"))
    except OSError:
        pass
    finally:
        os.close(descriptor)


class Launch:
    """Loads `posthoc_ema.torch.launch` when the first optimizer steps, and hands it all steps."""

    def __init__(self) -> None:
        self.before: Callable[[Any, Any, Any], None] = self.load
        self.after: Callable[[Any, Any, Any], None] = self.load

    def load(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The first step in this process: whatever goes wrong here is said, and training goes on."""
        self.before = self.after = lambda optimizer, args, kwargs: None
        try:
            from posthoc_ema.torch import launch

            hooks = launch.start(note)
        except Exception as error:
            note("missing", "%s\t%s: %s" % (sys.executable, type(error).__name__, error))  # noqa: UP031
            return
        self.before, self.after = hooks.before_step, hooks.after_step
        self.before(optimizer, args, kwargs)


class WhenImported:
    """A finder that finds nothing itself: it runs `action` once one module has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with `action` behind the module's execution."""
        if name != self.name:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                self.follow(spec)
                return spec
        return None

    def follow(self, spec: ModuleSpec) -> None:
        """Let `spec` run the action after the module."""
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            self.action(module)

        loader.exec_module = exec_module


def register(optimizer_module: Any) -> None:
    """Register the hooks; `optimizer_module` is torch.optim.optimizer."""
    launch = Launch()

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        launch.before(optimizer, args, kwargs)

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        launch.after(optimizer, args, kwargs)

    try:
        from torch._compile import _disable_dynamo as untraced  # a compiled step calls it as it is

        optimizer_module.register_optimizer_step_pre_hook(untraced(before_step))
        optimizer_module.register_optimizer_step_post_hook(untraced(after_step))
    except (ImportError, AttributeError):
        note("missing", "%s\tits torch is too old: 2.6 is needed" % sys.executable)  # noqa: UP031
        return
    note("torch")


def next_sitecustomize() -> None:
    """Run the sitecustomize that this one hides, as Python would have."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    sys.path[:] = [p for p in sys.path if not p or os.path.abspath(p) != here]  # noqa: PTH100
    ours = sys.modules.pop(__name__)
    try:
        __import__(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, ours)


if ENVIRONMENT in os.environ:
    note("python")
    sys.meta_path.insert(0, WhenImported(OPTIMIZER, register))
next_sitecustomize()
