"""The tensors of a PEFT adapter, under the names of its `adapter_model.safetensors`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The live tensors of the adapter that a PEFT model trains, under the names of its saved file.

    These are what `model.save_pretrained` writes: the adapter's own tensors, modules to save, and
    embeddings that the adapter targets. The hub is never asked. PEFT is not imported: a model of its
    kind cannot exist before it is.

    Args:
        model: a module; wrappers such as DistributedDataParallel and torch.compile are looked through.

    Returns:
        Name -> the model's own tensor (not a copy), in the order of the file. None if the model is no
        PEFT model or trains no adapter. There are two cases without a file of the same names, where
        they are those of the model's state_dict: several trained adapters (each has a file of its
        own), and adapters that are computed when they are saved (prompts with a reparametrization).
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    bare = _bare(model)
    if not isinstance(bare, peft.PeftModel):
        return None
    state = bare.state_dict(keep_vars=True)
    adapters = {name: _of_adapter(peft, bare, state, name) for name in bare.peft_config}
    own = {id(tensor) for tensor in state.values()}
    trained = {
        name: tensors
        for name, tensors in adapters.items()
        if any(tensor.requires_grad for tensor in tensors.values())
        and all(id(tensor) in own for tensor in tensors.values())
    }
    if len(trained) == 1:
        return next(iter(trained.values()))
    wanted = {id(tensor) for tensors in trained.values() for tensor in tensors.values()}
    return {n: t for n, t in state.items() if id(t) in wanted or t.requires_grad} or None


def _bare(model: nn.Module) -> nn.Module:
    while True:
        inner = model._modules.get("module" if _is_parallel(model) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)


def _of_adapter(
    peft: Any, model: nn.Module, state: dict[str, torch.Tensor], adapter: str
) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about saving, and nothing is saved here
        found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
            model,
            state_dict=dict(state),
            adapter_name=adapter,
            save_embedding_layers=_saves_embeddings(peft, model, adapter),
        )
    return {name: _own_prompt(model, adapter, name, tensor) for name, tensor in found.items()}


def _own_prompt(model: nn.Module, adapter: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight behind a saved prompt, which PEFT reads out as a copy, if it is nothing but that."""
    if name != "prompt_embeddings":
        return tensor
    encoders: Any = model.prompt_encoder
    weight = getattr(getattr(encoders[adapter], "embedding", None), "weight", None)
    if weight is not None and torch.equal(weight.detach().cpu(), tensor.detach().cpu()):
        return weight
    return tensor


def _saves_embeddings(peft: Any, model: nn.Module, adapter: str) -> bool | str:
    """`save_embedding_layers` such that PEFT decides as it does when saving, but never asks the hub."""
    configs: Any = model.peft_config
    config = configs[adapter]
    base = getattr(config, "base_model_name_or_path", None)
    if not base or Path(base, "config.json").exists():
        return "auto"
    names = peft.utils.other.EMBEDDING_LAYER_NAMES
    targeted = any(
        name.rpartition(".")[2] in names and hasattr(module, "base_layer")
        for name, module in model.named_modules()
    )
    return targeted and getattr(config, "trainable_token_indices", None) is None
