"""Train the classifier of `fd-digits` and write its weights.

    python -m reference_trainer.metrics.train_digit_classifier --out digit_classifier.safetensors

Deterministic on one kind of CPU: one thread, fixed seeds. Training sees four of five digits; the
accuracy on the others goes into the file's metadata.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch.nn import functional

from reference_trainer.data import batch_indices, load_dataset
from reference_trainer.metrics.digit_classifier import (
    CARD_KEY,
    WEIGHTS_FILE,
    DigitClassifier,
    held_out,
)

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and a seed of our own; the caller's threads and random state come back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def shifted(images: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Move each image by -1, 0 or 1 pixel along both axes, filling with 0; `[n, 1, 8, 8]`."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    rows, columns = rng.integers(3, size=(2, len(images)))
    return windows[np.arange(len(images)), :, rows, columns]


def train(epochs: int = EPOCHS, seed: int = SEED) -> DigitClassifier:
    """Train on the digits that are not held out; AdamW, cosine decay, shifts of one pixel."""
    dataset = load_dataset("digits")
    seen = ~held_out(len(dataset))
    images, labels = dataset.images[seen], dataset.labels[seen]
    steps = epochs * len(images) // BATCH_SIZE
    rng = np.random.default_rng(seed)
    with _reproducible(seed):
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            items = batch_indices(len(images), step * BATCH_SIZE, BATCH_SIZE, seed)
            logits = classifier(torch.tensor(shifted(images[items], rng)))
            loss = functional.cross_entropy(
                logits, torch.tensor(labels[items]), label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def held_out_accuracy(classifier: DigitClassifier) -> float:
    """Share of the held-out digits that the classifier names rightly, 0..1."""
    dataset = load_dataset("digits")
    unseen = held_out(len(dataset))
    classes = classifier(torch.tensor(dataset.images[unseen])).argmax(dim=1).numpy()
    return float(np.mean(classes == dataset.labels[unseen]))


def card(classifier: DigitClassifier) -> dict[str, Any]:
    """Describe the weights: what the file's metadata says."""
    unseen = held_out(len(load_dataset("digits")))
    return {
        "test_accuracy": held_out_accuracy(classifier),
        "test_images": int(unseen.sum()),
        "train_images": int((~unseen).sum()),
        "test_rule": "index % 5 == 4",
        "seed": SEED,
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing": LABEL_SMOOTHING,
        "made_by": "python -m reference_trainer.metrics.train_digit_classifier",
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def main() -> None:
    """Train, write the weights file, say the accuracy."""
    parser = argparse.ArgumentParser(description="Train the classifier of the fd-digits metric.")
    parser.add_argument("--out", type=Path, default=WEIGHTS_FILE, help="file to write")
    out = parser.parse_args().out
    classifier = train()
    description = card(classifier)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    # One metadata key: safetensors writes several in no fixed order, and the file would differ.
    save_file(weights, out, metadata={CARD_KEY: json.dumps(description)})
    out.chmod(0o644)  # safetensors writes files that only their owner may read
    sys.stdout.write(f"{out}: test accuracy {description['test_accuracy']:.4f}\n")


if __name__ == "__main__":
    main()
