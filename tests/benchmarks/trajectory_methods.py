"""Ways to spend disk on stored averages, each one function from a run to errors and bytes.

All averages come from the real `Tracker`, which is fed the weights of the kept trajectory step by step;
ours are stored, planned and read by the library, from files. Bytes are those of the tensors in the files:
on so few weights the headers (names, checksums, provenance) would be a tenth of a file, on a real model
they are nothing. The full size of the files is counted beside it.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import nn

from posthoc_ema import PowerProfile, SnapshotStore, fit, plan_synthesis, synthesize
from posthoc_ema.codecs import BLOCK, DELTA_WIDTHS
from posthoc_ema.fitting import FitNorm
from posthoc_ema.snapshot_folder import LONGEST_CHAIN
from posthoc_ema.tensor_files import read_header
from posthoc_ema.torch import Tracker

from .trajectory_run import SHAPES, Trajectory, averages

FloatArray = npt.NDArray[np.float64]

TARGETS = (0.015, 0.02, 0.03, 0.04, 0.07, 0.13, 0.16, 0.20, 0.25)
PUBLISHED = (0.05, 0.10)
_DEFAULTS = inspect.signature(Tracker).parameters
DEFAULT_SIGMA_RELS: tuple[float, ...] = _DEFAULTS["sigma_rels"].default
DEFAULT_CODEC: str = _DEFAULTS["dtype"].default


@dataclass(frozen=True)
class Outcome:
    """What a method reaches at the end of the run.

    Attributes:
        errors: |reconstruction - true average| / |true average|, shape (num_targets,).
        predicted: what the plan says of them; nan where a method says nothing.
        times: number of times that are stored.
        tensor_bytes: of the tensors of all files, per weight; raw weights count where they are kept.
        file_bytes: of the files as they are, per weight.
    """

    errors: FloatArray
    predicted: FloatArray
    times: int
    tensor_bytes: float
    file_bytes: float


@dataclass(frozen=True)
class Run:
    """A trajectory, and the averages that methods are measured against."""

    trajectory: Trajectory

    @property
    def end(self) -> int:
        """Number of steps."""
        return len(self.trajectory)

    @cached_property
    def truth(self) -> FloatArray:
        """True averages, (num_targets, num_weights)."""
        return averages(self.trajectory, [PowerProfile(self.end, s) for s in TARGETS])

    @cached_property
    def floor(self) -> FloatArray:
        """Relative errors of tracking the targets themselves, in float32, (num_targets,)."""
        with tempfile.TemporaryDirectory() as folder:
            tracked = self.track(Path(folder) / "none", (), TARGETS, "float32")
            found = [flat({n: a.numpy() for n, a in tracked.averages(s).items()}) for s in TARGETS]
        return relative(np.array(found), self.truth)

    def track(
        self,
        folder: Path,
        times: Sequence[int],
        sigma_rels: Sequence[float],
        dtype: str,
        then: Callable[[Tracker], object] = Tracker.snapshot,
    ) -> Tracker:
        """Run a tracker along the trajectory, and do something at each of the times."""
        weights = torch.zeros(self.trajectory.shape[1])
        parts = weights.split([int(np.prod(shape)) for shape in SHAPES.values()])
        model = nn.ParameterDict(
            {
                name: nn.Parameter(part.view(shape))  # a view: it follows `weights`
                for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
            }
        )
        wanted = set(times)
        with Tracker(
            model, folder, sigma_rels=sigma_rels, every=None, dtype=dtype, on_error="raise"
        ) as tracker:
            for t, theta in enumerate(self.trajectory, start=1):
                weights.copy_(torch.from_numpy(theta))
                tracker.step()
                if t in wanted:
                    then(tracker)
        return tracker


Method = Callable[[Run, int], Outcome]
"""From a run and n to an outcome; the published procedure stores n times."""


def flat(tensors: dict[str, npt.NDArray[np.float32]]) -> FloatArray:
    """All weights of a model in one vector."""
    return np.concatenate([tensors[name].ravel() for name in SHAPES]).astype(np.float64)


def relative(found: FloatArray, truth: FloatArray) -> FloatArray:
    """|found - truth| / |truth| of each row."""
    errors: FloatArray = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    return errors


def even_times(run: Run, count: int) -> list[int]:
    """`count` even times, the last at the end of the run."""
    return [round(run.end * (i + 1) / count) for i in range(count)]


def sizes_of(paths: Sequence[Path], num_weights: int) -> tuple[float, float]:
    """Bytes per weight of the tensors in some files, and of the files as they are."""
    infos = [info for path in paths for info in read_header(path).tensors.values()]
    files = sum(path.stat().st_size for path in paths)
    return sum(info.end - info.start for info in infos) / num_weights, files / num_weights


def published(run: Run, n: int) -> Outcome:
    """EDM2's released procedure: density norm, (0.05, 0.10) in float16, free sum. Plain files."""
    with tempfile.TemporaryDirectory() as name:
        folder, times = Path(name), even_times(run, n)
        paths: list[Path] = []
        profiles: list[PowerProfile] = []

        def save(tracker: Tracker) -> None:
            for s in PUBLISHED:
                tensors = {n: a.numpy().astype("f2") for n, a in tracker.averages(s).items()}
                paths.append(folder / f"{tracker.time}-{s}.safetensors")
                profiles.append(PowerProfile(tracker.time, s))
                safetensors.numpy.save_file(tensors, paths[-1])

        run.track(folder / "unused", times, PUBLISHED, "float32", save)
        stored = np.array([flat(safetensors.numpy.load_file(path)) for path in paths])
        wanted = [PowerProfile(run.end, s) for s in TARGETS]
        x = fit(profiles, wanted, norm="published").coefficients
        errors = relative(x.T @ stored, run.truth)
        sizes = sizes_of(paths, run.trajectory.shape[1])
        return Outcome(errors, np.full(len(errors), np.nan), n, *sizes)


def ours(
    sigma_rels: Sequence[float] = DEFAULT_SIGMA_RELS,
    codec: str = DEFAULT_CODEC,
    share: float = 1.0,
    norm: FitNorm = "random-walk",
) -> Method:
    """The library from end to end, at as many even times as fit `share` of the published bytes."""

    def method(run: Run, n: int) -> Outcome:
        times = even_times(run, times_that_fit(4 * n * share, len(sigma_rels), codec))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "snapshots"
            run.track(folder, times, sigma_rels, codec)
            return reconstruct(run, folder, norm)

    return method


def reconstruct(run: Run, folder: Path, norm: FitNorm = "random-walk") -> Outcome:
    """What a store gives at the end of the run."""
    store = SnapshotStore.open(folder)
    plan = plan_synthesis(store, TARGETS, norm=norm)
    found = synthesize(store, TARGETS, norm=norm)
    errors = relative(np.array([flat(result) for result in found]), run.truth)
    sizes = sizes_of([store.path(r) for r in store.records], run.trajectory.shape[1])
    return Outcome(errors, plan.predicted_error, len(store.times), *sizes)


_WIDTHS = {
    "float32": 4.0,
    "float16": 2.0,
    "delta-float16": 2.0,
    "delta-int8": sum(p + 2 * -(-p // BLOCK) for p in map(np.prod, SHAPES.values()))
    / sum(map(np.prod, SHAPES.values())),
}
"""Kind of file -> bytes per weight; the scales of this model's tensors counted."""
RAW = 2.0
"""Bytes per weight of the raw weights, which a tracker keeps of the last time."""


def times_that_fit(budget: float, num_profiles: int, codec: str) -> int:
    """How many times of `codec` and the raw weights fit `budget`, in bytes per weight."""
    first, others = DELTA_WIDTHS.get(codec, (codec, codec))
    count, spent = 0, RAW
    while spent <= budget:
        is_key = codec in DELTA_WIDTHS and count % LONGEST_CHAIN == 0
        kinds = ["float32" if is_key else first]
        kinds += (num_profiles - 1) * ["float32" if is_key else others]
        spent += sum(_WIDTHS[kind] for kind in kinds)
        count += 1
    return count - 1
