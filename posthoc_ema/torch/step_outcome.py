"""Whether a step that a GradScaler watches over has moved the weights."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class Outcome:
    """Whether a step has moved the weights, which a GradScaler may leave to the device.

    Fused optimizers are called with `found_inf` set, and do nothing where it is 1. On the CPU it is read at
    once. A read on an accelerator would wait for all work before it, so the value is copied to pinned
    memory, and looked at when the next step begins.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        found = getattr(optimizer, "found_inf", None)
        self._value: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        if not isinstance(found, torch.Tensor):
            return
        found = found.detach()
        if found.is_cuda:
            self._value = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True)
            self._value.copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(found.device))
        else:
            self._value = found.clone()

    @property
    def known(self) -> bool:
        """Whether `moved` answers without waiting for a device."""
        return self._copied is None

    def moved(self) -> bool:
        """Whether the weights were changed by the step."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._value is None or not bool(self._value.any())
