"""From the parameters of an optimizer to the module that is trained.

Several modules own the same parameters: the network, a loss or a framework's class around it, a wrapper, a
holder of two networks. The one whose names a checkpoint has is, as a rule, the outermost that is called in
training. So those that come into question are watched for one iteration, each by a hook before its
forward; where none of them is called, the outermost one that could be called is taken.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_WATCHED = 8
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def class_name(module: nn.Module) -> str:
    """Name by which `--model` and `{model}` know a module: of its own class, not of what FSDP2 makes it."""
    classes = type(module).__mro__
    own = (c for c in classes if not c.__module__.startswith("torch.distributed"))
    return next(own, classes[0]).__name__


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(
        module,
        nn.DataParallel | nn.parallel.DistributedDataParallel | torch._dynamo.OptimizedModule,
    )


def _is_lightning(module: nn.Module) -> bool:
    return any(
        base.__name__ == "LightningModule"
        and base.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for base in type(module).__mro__
    )


def _can_be_called(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


def _live_modules() -> list[nn.Module]:
    """Every module of the process that is complete enough to be looked into.

    The type is asked, not the object: `isinstance` would wake up lazy proxies of other packages.
    """
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), nn.Module) and "_parameters" in vars(found)
    ]


@dataclass(frozen=True)
class Owner:
    """A module, and which of the parameters in question are its own."""

    module: nn.Module
    owned: frozenset[int]


class Scan:
    """The modules of the process at one time, and which of them are called from then on.

    Args:
        parameters: what an optimizer trains; modules that own none of them do not matter.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._calls: list[int] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._watched: set[int] = set()
        self._modules: list[weakref.ref[nn.Module]] = []
        self._known: set[int] = set()
        self._times = 0
        # A script that ends after one step may have dropped its model before it is decided what to track.
        self._held: list[nn.Module] = []
        self.watch(parameters)

    def _rescan(self) -> None:
        modules = _live_modules()
        self._modules = [weakref.ref(module) for module in modules]
        self._known = {id(p) for module in modules for p in module._parameters.values()}

    def owners(self, parameters: Sequence[torch.Tensor]) -> list[Owner]:
        """Modules that own some of `parameters`, wrappers left out (what they wrap is there too)."""
        wanted = {id(parameter) for parameter in parameters}
        found = []
        for reference in self._modules:
            module = reference()
            if module is None or _is_wrapper(module):
                continue
            owned = frozenset(id(p) for p in module.parameters() if id(p) in wanted)
            if owned:
                found.append(Owner(module, owned))
        return found

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        """Watch which of the modules that own all of `parameters` are called, if there are several.

        The hook does nothing that torch.compile could not trace, and modules that are compiled already
        are left alone: they would be compiled anew.
        """
        self._times += 1
        if (
            self._times > _WATCHED
        ):  # one optimizer for each parameter: the first ones tell the model
            return
        if not {id(p) for p in parameters} <= self._known:
            self._rescan()
        owners = self.owners(parameters)
        self._held += [owner.module for owner in owners]
        most = max((len(owner.owned) for owner in owners), default=0)
        candidates = [
            owner.module
            for owner in owners
            if len(owner.owned) == most and _can_be_called(owner.module)
        ]
        if len(candidates) < 2:
            return
        compiled = [m for r in self._modules if (m := r()) is not None and _is_compiled(m)]
        inside = {id(inner) for outer in compiled for inner in outer.modules()}
        for module in candidates:
            if id(module) not in inside:
                self._listen(module, id(module))
        for wrapper in compiled:
            inner = getattr(wrapper, "_orig_mod", None)
            if any(inner is module for module in candidates):
                self._listen(wrapper, id(inner))

    def _listen(self, module: nn.Module, key: int) -> None:
        if id(module) in self._watched:
            return
        self._watched.add(id(module))
        calls = self._calls

        def called(module: nn.Module, arguments: object) -> None:
            # An evaluation in between, of averages that another package keeps, is not what trains.
            if torch.is_grad_enabled():
                calls.append(key)

        self._handles.append(module.register_forward_pre_hook(called))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def find(self, parameters: Sequence[torch.Tensor], pattern: str | None) -> nn.Module | None:
        """The module that is trained through `parameters`, as far as one module owns them.

        Args:
            parameters: what is trained, in the order of the optimizer.
            pattern: regular expression; modules of other classes do not come into question, if any
                fits at all.

        Returns:
            The module that owns the most of them; None if none owns any.
        """
        owners = self.owners(parameters)
        if pattern is not None:
            fitting = [o for o in owners if re.search(pattern, class_name(o.module))]
            owners = fitting or owners
        if not owners:
            return None
        order = {id(parameter): place for place, parameter in enumerate(parameters)}
        best = max(owners, key=lambda o: (len(o.owned), -min(order[key] for key in o.owned)))
        return self._choose([owner.module for owner in owners if owner.owned == best.owned])

    def find_all(
        self,
        parameters: Sequence[torch.Tensor],
        pattern: str | None,
        owner: dict[int, nn.Module],
    ) -> list[nn.Module]:
        """The modules that are trained through `parameters`, in the order of those.

        Args:
            parameters: what is trained, in the order of the optimizer.
            pattern: as for `find`.
            owner: id of a parameter -> its module, as far as it has been found; is added to.
        """
        while rest := [p for p in parameters if id(p) not in owner]:
            module = self.find(rest, pattern)
            if module is None:
                break
            for parameter in module.parameters():
                owner.setdefault(id(parameter), module)
        known = [owner[id(p)] for p in parameters if id(p) in owner]
        return list({id(module): module for module in known}.values())

    def _choose(self, modules: list[nn.Module]) -> nn.Module:
        lightning = [module for module in modules if _is_lightning(module)]
        if lightning:
            return _outermost(lightning)
        by_id = {id(module): module for module in modules}
        for key in self._calls:
            if key in by_id:
                return by_id[key]
        # A call of a module that was compiled in place is not seen, but why else was it compiled.
        compiled = [m for m in modules if _is_compiled(m)]
        return _outermost(compiled or [m for m in modules if _can_be_called(m)] or modules)


def _outermost(modules: Sequence[nn.Module]) -> nn.Module:
    """The module that is in no other; of several, the one with the fewest modules inside."""
    inner = {id(m) for outer in modules for m in outer.modules() if m is not outer}
    outer = [module for module in modules if id(module) not in inner] or list(modules)
    return min(outer, key=lambda module: sum(1 for _ in module.modules()))
