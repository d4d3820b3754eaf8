"""From a module to its named tensors, under the names of the bare model's state_dict."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from posthoc_ema.codecs import DTYPE_CODES, FLOATING, AnyArray
from posthoc_ema.errors import TrackingError
from posthoc_ema.snapshot import TensorEntry, TensorTable
from posthoc_ema.torch.distributed.sharding import check_can_be_tracked, is_sharded
from posthoc_ema.torch.peft_names import adapter_tensors

_log = logging.getLogger("posthoc_ema")


def _wrapped_attribute(module: nn.Module) -> str | None:
    """Attribute under which a wrapper holds the module that it wraps; None for ordinary modules.

    Decided by type, not by name: a model may well have a submodule that is called `module`.
    """
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "_orig_mod"
    if type(module).__name__ == "CheckpointWrapper":  # torch.distributed's activation checkpointing
        return "_checkpoint_wrapped_module"
    return None


def _wrapper_prefixes(module: nn.Module) -> list[tuple[str, str]]:
    """(prefix as it stands in state_dict, prefix without the wrapper), inner wrappers first."""
    prefixes = []
    for path, child in module.named_modules():
        attribute = _wrapped_attribute(child)
        if attribute is not None:
            outer = f"{path}." if path else ""
            prefixes.append((f"{outer}{attribute}.", outer))
    return prefixes[::-1]


SELECTIONS = ("auto", "all", "trainable")
"""Which tensors are stored: see `named_tensors`."""


def named_tensors(module: nn.Module, selection: str = "auto") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers as (name, live tensor), tied ones under every name.

    Names are those of the bare model's `state_dict()`: the prefixes of DistributedDataParallel,
    DataParallel, torch.compile and activation checkpointing are taken out. Those of a PEFT model's
    adapter are the names in `adapter_model.safetensors`.

    Args:
        module: a model, wrapped or not.
        selection: "all"; "trainable" leaves frozen parameters out; "auto" takes the adapter of a PEFT
            model only, and all of any other model.

    Raises:
        TrackingError: a tensor cannot be tracked (on the meta device, of a dtype that safetensors
            lacks).
    """
    adapter = None if selection == "all" else adapter_tensors(module)
    for name, tensor in _all_named_tensors(module) if adapter is None else adapter.items():
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if selection == "trainable" and is_frozen:
            continue
        _check(name, tensor)
        yield name, tensor


def _all_named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    prefixes = _wrapper_prefixes(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            _log.warning(
                "%r of the state_dict is no tensor (%s): it is not stored and will be missing when a "
                "synthesized file is loaded strictly.",
                name,
                type(value).__name__,
            )
            continue
        for prefix, replacement in prefixes:
            if name.startswith(prefix):
                name = replacement + name[len(prefix) :]
        yield name, value


def _check(name: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise TrackingError(
            f"{name!r} has no shape yet (a lazy module). Run the model once before you track it."
        )
    if tensor.is_meta:
        raise TrackingError(
            f"{name!r} is on the meta device and has no values; materialise the model before tracking."
        )
    if name == "__metadata__":
        raise TrackingError(
            "a tensor cannot be called '__metadata__' in a safetensors file; rename it."
        )
    if dtype_name(tensor) not in DTYPE_CODES:
        raise TrackingError(f"{name!r} has dtype {tensor.dtype}, which safetensors cannot store.")


def dtype_name(tensor: torch.Tensor) -> str:
    """Name of the dtype without the `torch.` in front."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_table(module: nn.Module, selection: str = "auto") -> TensorTable:
    """Tensor table of a module: trainable floating parameters are averaged, all else is copied.

    Args:
        module: a model, wrapped or not.
        selection: which of its tensors, see `named_tensors`.

    Raises:
        TrackingError: nothing is trainable, or a trainable parameter cannot be averaged.
    """
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in named_tensors(module, selection):
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        averaged = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        dtype = dtype_name(tensor)
        if averaged and dtype not in FLOATING:
            raise TrackingError(
                f"parameter {name!r} has dtype {dtype}; averages are defined for "
                f"{', '.join(sorted(FLOATING))}."
            )
        entries[name] = TensorEntry(name, tuple(tensor.shape), dtype, averaged)
    if not any(entry.averaged for entry in entries.values()):
        raise TrackingError(
            f"{type(module).__name__} has no parameter with requires_grad=True: nothing to average."
        )
    return TensorTable(entries, aliases)


def to_numpy(tensor: torch.Tensor) -> AnyArray:
    """Bits of a tensor as a NumPy array; bfloat16 and float8 as unsigned integers of their size."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if dtype_name(tensor).startswith("float8"):
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


class TrackedModel:
    """A module and the tensors that tracking started with.

    Args:
        module: the module that is trained, wrapped or not.
        selection: which of its tensors are stored, see `named_tensors`.

    Raises:
        TrackingError: nothing is trainable, or a tensor cannot be tracked.
    """

    def __init__(self, module: nn.Module, selection: str = "auto") -> None:
        check_can_be_tracked(module)
        self.module = module
        self.table = tensor_table(module, selection)
        self._selection = selection
        self._sharded: dict[str, torch.Tensor] = {}

    def averaged(self) -> dict[str, torch.Tensor]:
        """The parameters that are averaged, as they are now.

        Raises:
            TrackingError: one was removed or reshaped.
        """
        parameters: dict[str, torch.Tensor] = {}
        for name, shape, owner, key in self._slots:
            parameter: torch.Tensor | None = owner._parameters.get(key)
            if parameter is None or parameter.shape != shape:
                raise TrackingError(
                    f"parameter {name!r} was removed or reshaped while it was tracked. Start a new "
                    "tracker with a new folder for the changed model."
                )
            if type(parameter) is not nn.Parameter or self._sharded:
                parameter = self._shards(name, parameter)
            parameters[name] = parameter
        return parameters

    def _shards(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What the optimizer trains: the shards, also where FSDP2 has gathered them.

        It does for a forward pass, and leaves them so if no backward pass follows.
        """
        if is_sharded(parameter):
            self._sharded[name] = parameter
        return self._sharded.get(name, parameter)

    @functools.cached_property
    def _slots(self) -> list[tuple[str, tuple[int, ...], nn.Module, str]]:
        """(name, shape, owning module, attribute) of each averaged parameter.

        Looking parameters up by attribute at each update follows re-assignment (`.to`,
        `load_state_dict(assign=True)`) at a fraction of the cost of a state_dict.
        """
        by_id = {id(p): (m, key) for m in self.module.modules() for key, p in m._parameters.items()}
        tensors = self._live()
        return [
            (name, entry.shape, *by_id[id(tensors[name])])
            for name, entry in self.table.entries.items()
            if entry.averaged
        ]

    def live(self) -> dict[str, torch.Tensor]:
        """The module's tensors by name, checked against those that tracking started with.

        Raises:
            TrackingError: tensors were added, removed, reshaped, cast, frozen, unfrozen or replaced.
        """
        tensors = self._live()
        for name, parameter in self.averaged().items():
            if tensors[name] is not parameter:
                raise TrackingError(_replaced(name))
        return tensors

    def _live(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in named_tensors(self.module, self._selection):
            if name in self.table.aliases:
                if found.get(self.table.aliases[name]) is not tensor:
                    raise TrackingError(_replaced(name))
                continue
            entry = self.table.entries.get(name)
            if entry is None:
                raise TrackingError(_changed(f"{name!r} is new"))
            # One that was trained once may be frozen for a while: the half of a GAN whose turn it is not.
            is_parameter = isinstance(tensor, nn.Parameter)
            averaged = is_parameter and (tensor.requires_grad or entry.averaged)
            now = TensorEntry(name, tuple(tensor.shape), dtype_name(tensor), averaged)
            if now != entry:
                raise TrackingError(_changed(f"{name!r} was {_words(entry)} and is {_words(now)}"))
            found[name] = tensor
        missing = next((name for name in self.table.entries if name not in found), None)
        if missing is not None:
            raise TrackingError(_changed(f"{missing!r} is gone"))
        return found


def _replaced(name: str) -> str:
    return (
        f"{name!r} is another parameter than the one that was tracked so far (a module was replaced, or a "
        "tie was broken). Start a new tracker with a new folder."
    )


def _changed(what: str) -> str:
    return (
        f"the model changed while it was tracked: {what}. Build the model as it will be trained before "
        "the tracker, or start a new tracker with a new folder."
    )


def _words(entry: TensorEntry) -> Any:
    return f"{entry.dtype} {entry.shape}, {'trainable' if entry.averaged else 'not trainable'}"
