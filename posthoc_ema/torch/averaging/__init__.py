"""Averages in memory, and the kernels that update them: all profiles in one pass over the parameters."""

from posthoc_ema.torch.averaging.averages import Averages

__all__ = ["Averages"]
