"""Trains by several processes, as a program under torchrun: `trainer_ranks.py FOLDER`.

For each FOLDER/NAME.json a run goes to FOLDER/NAME. Last, one of them is asked for again with another seed.
What each process was told goes to FOLDER/told-RANK.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from posthoc_ema import PhemaError
from reference_trainer.config import TrainConfig
from reference_trainer.loop import train


def main(folder: Path) -> None:
    told = {}
    config = None
    for file in sorted(folder.glob("*.json")):
        config = TrainConfig.from_json(file.read_text())
        result = train(config, file.with_suffix(""), device="cpu")
        told[file.stem] = [result.started_at, result.nimg, result.is_main]
    try:
        train(dataclasses.replace(config, seed=7), file.with_suffix(""), device="cpu")
    except PhemaError as error:
        told["refused"] = [type(error).__name__, str(error)]
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
