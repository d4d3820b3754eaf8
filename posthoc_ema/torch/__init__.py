"""The PyTorch side: track averages of a module while any optimizer trains it."""

from posthoc_ema.torch.batchnorm import recalibrate_batchnorm
from posthoc_ema.torch.optimizer_hook import track
from posthoc_ema.torch.swap import swap_in, swapped
from posthoc_ema.torch.tracker import Tracker

__all__ = ["Tracker", "recalibrate_batchnorm", "swap_in", "swapped", "track"]
