"""Network snapshots of EDM2 (pickles): published ones and those of training runs.

A snapshot is a pickled table whose `ema` is a module. Modules are pickled with the source text of their
class beside their state; here the text is a string like any other, and the state is walked for its
tensors. Time and length stand in the file name only: thousands of images, rounded down, and sigma_rel to
three decimals, as in `edm2-img512-xs-2147483-0.135.pkl` or `network-snapshot-0008388-0.050.pkl`.
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
)
from posthoc_ema.importers.restricted_pickle import Opaque
from posthoc_ema.importers.torch_files import open_pickle
from posthoc_ema.profiles import PowerProfile

_NAME = re.compile(r"(?P<run>.+?)-(?P<kimg>\d{5,15})(-(?P<sigma_rel>0\.\d+))?\.pkl")
_CLOCK_UNIT = 1024
_MOST_MODULES, _LONGEST_PREFIX = 100_000, 2000
_HALF_DIGIT = 0.0005000001  # names have three decimals


def plan_edm2(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of one snapshot or of a folder of them.

    Raises:
        SnapshotNotFoundError: there are none.
        SnapshotMismatchError: they are of several runs.
        ConfigError: a time or a length cannot be told from the names and the options.
        SnapshotFormatError: a file is damaged or holds no network.
    """
    if options.update_every not in (None, 1):
        raise ConfigError(
            "--update-every is not for EDM2: its averages are exact whatever the interval. Leave it out."
        )
    paths = sorted(source.glob("*.pkl")) if source.is_dir() else [source]
    parsed = [(path, _NAME.fullmatch(path.name)) for path in paths]
    named = [(path, match) for path, match in parsed if match]
    if not named:
        raise SnapshotNotFoundError(
            f"{source} holds no file with a name like network-snapshot-0008388-0.050.pkl. Give the "
            "folder of network snapshots, under the names they were written with."
        )
    runs = sorted({match["run"] for _, match in named})
    if len(runs) > 1:
        raise SnapshotMismatchError(
            f"{source} holds snapshots of {len(runs)} runs, {runs[0]} and {runs[1]}. Keep those of one "
            "run in a folder, or give a single file."
        )
    stamps = sorted({int(match["kimg"]) for _, match in named} - {0})
    if not stamps:
        raise SnapshotNotFoundError(
            f"{source} holds only snapshots of time 0: no training to average."
        )
    times, notes = _times(stamps, options)
    skipped = [path.name for path, match in parsed if match is None]
    if skipped:
        notes.append(f"{len(skipped)} other .pkl files are left out, the first is {skipped[0]}.")
    if any(int(match["kimg"]) == 0 for _, match in named):
        notes.append("snapshots of time 0 hold no training and are left out.")
    files = []
    for path, match in named:
        if int(match["kimg"]):
            time = times[int(match["kimg"])]
            profile = PowerProfile(time, _sigma_rel(path, match["sigma_rel"], options.sigma_rels))
            files.append(SourceFile(path, time, profile, functools.partial(_open, path)))
    return plan_files("edm2", "images", files, {"imported_from": "edm2", "run": runs[0]}, notes)


def _times(stamps: list[int], options: ImportOptions) -> tuple[dict[int, int], list[str]]:
    """Exact time of each number of thousands of images."""
    if options.times:
        if len(options.times) != len(stamps):
            raise ConfigError(
                f"--time names {len(options.times)} times, the files have {len(stamps)}: "
                f"{stamps[0]} to {stamps[-1]} thousand images. Give one for each."
            )
        times = dict(zip(stamps, options.times, strict=True))
        for stamp, time in times.items():
            if time // 1000 != stamp:
                raise ConfigError(
                    f"--time {time} does not fit the file of {stamp} thousand images (rounded down)."
                )
        return times, []
    times = {stamp: images_of_stamp(stamp, options.batch_size) for stamp in stamps}
    unit = "the batch size" if options.batch_size else f"{_CLOCK_UNIT} images"
    note = f"the names round times down to thousands of images; taken as multiples of {unit}."
    return times, [note]


def images_of_stamp(stamp: int, batch_size: int | None = None) -> int:
    """Images seen, from the thousands of images in a file name.

    Args:
        stamp: images // 1000.
        batch_size: images per step; by default times are taken as multiples of 1024, as that tool
            demands of its intervals.

    Raises:
        ConfigError: no multiple, or more than one, lies between the stamp and the next.

    Example:
        >>> images_of_stamp(2147483)  # 2^31
        2147483648
        >>> images_of_stamp(50, batch_size=2000)
        50000
    """
    unit = batch_size or _CLOCK_UNIT
    first = -(-1000 * stamp // unit) * unit
    if first >= 1000 * (stamp + 1):
        remedy = "Give its true --batch-size" if batch_size else "Give --batch-size"
        raise ConfigError(
            f"no multiple of {unit} images rounds down to {stamp} thousand: the run counted otherwise. "
            f"{remedy}, or the exact --time."
        )
    if first + unit < 1000 * (stamp + 1):
        raise ConfigError(
            f"several multiples of {unit} images round down to {stamp} thousand, {first} and "
            f"{first + unit} for example. Give the exact --time."
        )
    return first


def _sigma_rel(path: Path, label: str | None, told: tuple[float, ...]) -> float:
    """sigma_rel of a file: what the user says, as far as it fits the name; else the name."""
    if label is None:
        if len(told) != 1:
            raise ConfigError(
                f"{path}: its name does not say its sigma_rel. Give --sigma-rel with one length."
            )
        return told[0]
    if not told:
        return float(label)
    fitting = [value for value in told if abs(value - float(label)) <= _HALF_DIGIT]
    if len(fitting) != 1:
        raise ConfigError(
            f"{path}: {len(fitting)} of the lengths of --sigma-rel round to the {label} of its name. "
            "Give each tracked length once, or leave the option out."
        )
    return fitting[0]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Contents]:
    with open_pickle(path) as value:
        network = _attributes(value).get("ema", value)
        parameters: dict[str, Any] = {}
        buffers: dict[str, Any] = {}
        _walk(path, network, parameters, buffers)
        if not parameters:
            raise SnapshotFormatError(
                f"{path}: holds no network under 'ema'. Give network snapshots, not training states."
            )
        yield contents(path, {**parameters, **buffers}, tuple(buffers))


def _attributes(value: Any) -> dict[Any, Any]:
    """What a dict, or an object that was not made, would hold."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Opaque):
        return {}
    state: Any = value.state if isinstance(value.state, dict) else {}
    for argument in value.args:
        # an object that is stored as its source text and its state
        if isinstance(argument, dict) and isinstance(argument.get("state"), dict):
            state = {**argument["state"], **state}
    return {**value.items, **state}


def _walk(path: Path, network: Any, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Collect the tensors of a module by the names that its `state_dict` would give them."""
    left = [("", network)]
    visited = 0
    while left:
        prefix, module = left.pop()
        visited += 1
        if visited > _MOST_MODULES or len(prefix) > _LONGEST_PREFIX:  # they may contain each other
            raise SnapshotFormatError(f"{path}: its modules are nested too deeply to be a network.")
        held = _attributes(module)
        unsaved = held.get("_non_persistent_buffers_set")
        left_out = unsaved if isinstance(unsaved, set | frozenset) else set()
        for found, key in ((parameters, "_parameters"), (buffers, "_buffers")):
            for name, tensor in _named(path, held, key):
                if tensor is not None and name not in left_out:
                    found[prefix + name] = tensor
        children = [
            (f"{prefix}{n}.", m) for n, m in _named(path, held, "_modules") if m is not None
        ]
        left += reversed(children)


def _named(path: Path, held: dict[Any, Any], key: str) -> list[tuple[str, Any]]:
    table = held.get(key, {})
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise SnapshotFormatError(f"{path}: the {key} of a module in it are malformed.")
    return list(table.items())
