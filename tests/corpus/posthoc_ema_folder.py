"""Makes tests/corpus/pytorch_posthoc_ema with the real package, pytorch-posthoc-ema 1.0.10.

That package installs a module of our own name, so it cannot be installed beside this project:

    pip install --no-deps --target /tmp/other pytorch-posthoc-ema==1.0.10
    cd /tmp && PYTHONPATH=/tmp/other python .../tests/corpus/posthoc_ema_folder.py

At step i the parameter w is the i-th unit vector, so what is stored as w is the weight of every step.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

STEPS, EVERY, LATE = 400, 80, 25
SIGMA_RELS = (0.10, 0.25)
FOLDER = Path(__file__).parent / "pytorch_posthoc_ema"


def main():
    import torch

    from posthoc_ema import PostHocEMA

    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(STEPS + 1))
    model.norm = torch.nn.BatchNorm1d(2)
    shutil.rmtree(FOLDER, ignore_errors=True)
    tracker = PostHocEMA.from_model(
        model,
        str(FOLDER),
        sigma_rels=SIGMA_RELS,
        update_every=1,
        checkpoint_every=EVERY,
        update_after_step=LATE,
    )
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            model.w.zero_()[step] = 1.0
        tracker.update_(model)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != str(Path(__file__).parents[2])]
    main()
