"""Training data: built-in sets, folders and zips of images or latents, and the order they are seen in.

`load_dataset` returns a `Dataset`, which is read by index; `new_batches` gives a run its batches on the
device, read ahead; `batch_indices` says which items a run draws at which point of training.
"""

from __future__ import annotations

from reference_trainer.data.batches import Batches, new_batches
from reference_trainer.data.dataset import ArrayDataset, Dataset
from reference_trainer.data.loading import load_built_in, load_dataset
from reference_trainer.data.sampler import batch_indices

__all__ = [
    "ArrayDataset",
    "Batches",
    "Dataset",
    "batch_indices",
    "load_built_in",
    "load_dataset",
    "new_batches",
]
