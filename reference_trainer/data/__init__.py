"""Training data: built-in sets of small images, and the order in which a run sees them.

`load_dataset` returns a `Dataset` record; `batch_indices` says which of its items a run draws at
which point of training.
"""

from __future__ import annotations

from reference_trainer.data.dataset import Dataset, load_dataset
from reference_trainer.data.sampler import batch_indices

__all__ = ["Dataset", "batch_indices", "load_dataset"]
