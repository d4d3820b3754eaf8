"""Folders of ema-pytorch, nitrous-ema and pytorch-posthoc-ema: `{index}.{step}.pt`.

All three write one file of `torch.save` per length and time; which length an index stands for is not
in the files. What they write differs in details that tell them apart (found by running them, versions
0.8.3, 0.0.1 and 1.0.10):

    ema-pytorch           ema_model.NAME, initted, step; all of them cast to the snapshot's dtype
    nitrous-ema           ema_model.NAME, _extra_state with initted and step; only floats are cast
    pytorch-posthoc-ema   NAME, initted, step; its own step starts `update_after_step` steps late

The decay is (1 - 1/(step+1))^(gamma+1) at each update, so the share of the first s updates is
((s+1)/(t+1))^(gamma+1): the profile of the asked length, up to one step. With an update every k steps
it is another profile, see `plans.tracked_profile`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posthoc_ema.errors import (
    ConfigError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
)
from posthoc_ema.importers.plans import (
    Contents,
    ImportOptions,
    ImportPlan,
    SourceFile,
    contents,
    plan_files,
    tracked_profile,
)
from posthoc_ema.importers.tensors import LazyTensor, to_float64
from posthoc_ema.importers.torch_files import open_pickle
from posthoc_ema.profiles import GammaProfile, PowerProfile

_NAME = re.compile(r"(?P<index>\d{1,4})\.(?P<step>\d{1,18})\.pt")
_PREFIX = "ema_model."
_STATE = ("initted", "step", "_extra_state")
_EXACT = {"float16": 2048, "bfloat16": 256, "float32": 1 << 24, "float64": 1 << 53}
"""Largest whole number below which a float dtype holds all of them."""


def snapshot_paths(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, index of the length, step) of the files of a folder, by step."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.pt")]
    found = [(path, int(match["index"]), int(match["step"])) for path, match in matches if match]
    return sorted(found, key=lambda row: (row[2], row[1]))


def kind_of_folder(folder: Path) -> str:
    """Which of the three tools wrote a folder, from the names in its first file."""
    path = snapshot_paths(folder)[0][0]
    with open_pickle(path) as value:
        names = _state_dict(path, value)
        if not any(name.startswith(_PREFIX) for name in names):
            return "posthoc-ema"
        return "nitrous" if "_extra_state" in names else "ema-pytorch"


def plan_average_folder(source: Path, options: ImportOptions, kind: str) -> ImportPlan:
    """Plan the import of a folder.

    Args:
        source: the folder.
        options: `sigma_rels` and `update_every` must be given: the files do not say them.
        kind: "ema-pytorch", "nitrous" or "posthoc-ema".

    Raises:
        SnapshotNotFoundError: there are no such files.
        SnapshotMismatchError: the files do not belong together.
        ConfigError: what the files do not say is not told, or does not fit them.
        SnapshotFormatError: a file is damaged.
    """
    rows = snapshot_paths(source)
    if not rows:
        raise SnapshotNotFoundError(
            f"{source} holds no files with names like 0.1000.pt. Give the folder that was passed as "
            "checkpoint_folder or checkpoint_dir."
        )
    lengths = max(index for _, index, _ in rows) + 1
    if len(options.sigma_rels) != lengths or 0.0 in options.sigma_rels:
        raise ConfigError(
            f"{source} holds averages of {lengths} lengths and does not say which. Give --sigma-rel "
            "with those that were passed to the tool, in that order."
        )
    if options.update_every is None:
        raise ConfigError(
            f"the files of {source} do not say how often the averages were updated, and the tool tracks "
            "another length if that was not at every step. Give --update-every with the value of "
            "update_every (1 if the tool corrected the step size)."
        )
    if options.batch_size is not None or options.times:
        raise ConfigError(
            "--batch-size and --time are for EDM2: these files say their step. Leave it out."
        )
    rows, notes = _on_own_clock(rows)
    left = [row for row in rows if row[2] > 0]
    if len(left) < len(rows):
        notes.append("files of time 0 hold no training and are left out.")
    files = []
    for path, index, time in left:
        profile = tracked_profile(time, options.sigma_rels[index], options.update_every)
        files.append(SourceFile(path, time, profile, functools.partial(_open, path, kind)))
    if not files:
        raise SnapshotNotFoundError(f"{source} holds only files of time 0: no training to average.")
    if options.update_every > 1:
        tracked = [tracked_profile(1, asked, options.update_every) for asked in options.sigma_rels]
        texts = [
            f"{asked:g} is {_words(profile)}"
            for asked, profile in zip(options.sigma_rels, tracked, strict=True)
        ]
        notes.append(
            f"updates every {options.update_every} steps tracked other lengths: {', '.join(texts)}."
        )
    return plan_files(kind, "steps", files, {"imported_from": kind}, notes)


def _words(profile: PowerProfile | GammaProfile) -> str:
    if isinstance(profile, GammaProfile):
        return f"gamma {profile.gamma:.3g}"
    return f"sigma_rel {profile.sigma_rel:.4g}"


def _on_own_clock(
    rows: list[tuple[Path, int, int]],
) -> tuple[list[tuple[Path, int, int]], list[str]]:
    """Times as the averages counted them, which may have started later than the file names' count."""
    late: int | None = None
    for path, _, step in rows:
        with open_pickle(path) as value:
            own = _own_step(path, _state_dict(path, value))
        if own is None:
            continue
        if late is None:
            late = step - own
        if step - own != late:
            raise SnapshotMismatchError(
                f"{path}: counts {own} steps inside, {rows[0][0].name} suggests {step - late}. Was it "
                "renamed, or are two runs in one folder? Keep the files of one run there."
            )
    if not late:
        return rows, []
    note = f"the averages were started after {late} steps: times count from there."
    return [(path, index, step - late) for path, index, step in rows], [note]


def _own_step(path: Path, state: dict[str, Any]) -> int | None:
    """The step counter in a file, None if its dtype cannot hold it."""
    extra = state.get("_extra_state")
    value = extra.get("step") if isinstance(extra, dict) else state.get("step")
    if type(value) is int:
        return value
    if value is None or not hasattr(value, "read"):
        return None
    tensor: LazyTensor = value
    if tensor.shape not in ((), (1,)):
        raise SnapshotFormatError(
            f"{path}: its 'step' is no counter but a tensor of {tensor.shape}."
        )
    number = float(to_float64(tensor).reshape(-1)[0])
    limit = _EXACT.get(tensor.dtype, 1 << 63)
    return int(number) if 0 <= number < limit else None


def _state_dict(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise SnapshotFormatError(
            f"{path}: holds no table of tensors. Give files that the tool wrote."
        )
    return value


@contextlib.contextmanager
def _open(path: Path, kind: str) -> Iterator[Contents]:
    prefix = "" if kind == "posthoc-ema" else _PREFIX
    with open_pickle(path) as value:
        state = _state_dict(path, value)
        strange = [n for n in state if n not in _STATE and not n.startswith(prefix)]
        if strange:
            raise SnapshotFormatError(
                f"{path}: holds {strange[0]!r}, which {kind} does not write. Check --from."
            )
        named = {n.removeprefix(prefix): v for n, v in state.items() if n not in _STATE}
        yield contents(path, named)
