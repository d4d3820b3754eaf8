"""What a study consists of, as plain records: runs to train, numbers to measure, what was found.

A study makes a `Plan`, which is decided by its scale, its seeds and earlier numbers; `apply` carries it out.
The study then makes a `Report` of the numbers. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posthoc_ema import ConfigError
from posthoc_ema.plotting import Panel
from reference_trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One network to train.

    Attributes:
        name: name of its folder; studies of one output folder share runs of one name.
        config: everything that determines it.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """An average of a run.

    Attributes:
        run: the run's name.
        sigma_rel: length of the average, 0 for the raw weights.
        at: training time in images, a stored one; None is the end of the run.
        overrides: (shell pattern of tensor names, sigma_rel): tensors of another length.
    """

    run: str
    sigma_rel: float
    at: int | None = None
    overrides: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """A second network that guides the first: D = w D_1 + (1 - w) D_0.

    Attributes:
        weights: the guiding network D_0.
        weight: w, 1 for no guidance.
        interval: noise levels (sigma_lo, sigma_hi] at which it guides, None for all.
    """

    weights: Weights
    weight: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Measure the Frechet distance of generated images: gives "fd".

    Attributes:
        weights: the network.
        guide: what guides it, if anything.
    """

    weights: Weights
    guide: Guide | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnitudes:
    """Measure root mean squares of weights and activations: gives "weights", "activations", ....

    Attributes:
        weights: the network.
    """

    weights: Weights


Measurement = Quality | Magnitudes
Numbers = Mapping[Measurement, Mapping[str, float]]
"""What was measured: measurement -> name -> number."""


def measurement_key(measurement: Measurement) -> str:
    """The text that stands for a measurement in a file; equal for equal measurements only.

    Example:
        >>> measurement_key(Magnitudes(weights=Weights(run="a", sigma_rel=0.1)))
        '{"magnitudes": {"weights": {"run": "a", "sigma_rel": 0.1}}}'
    """
    kind = type(measurement).__name__.lower()
    return json.dumps({kind: _given(dataclasses.asdict(measurement))})


def _given(values: dict[str, object]) -> dict[str, object]:
    """Without what is not set, so that a key stays the same when a record gets a new field."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None and value != ()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What has to be trained and measured.

    Attributes:
        runs: networks to train, each name once.
        measurements: numbers to measure, of these runs.

    Raises:
        ConfigError: two runs have one name, or a measurement is of a run that is not there.
    """

    runs: tuple[Run, ...]
    measurements: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise ConfigError(f"runs of a plan must have different names, got {', '.join(names)}.")
        unknown = {name for m in self.measurements for name in runs_of(m)} - set(names)
        if unknown:
            raise ConfigError(f"the plan measures runs that it does not train: {sorted(unknown)}.")


def runs_of(measurement: Measurement) -> list[str]:
    """Names of the runs that a measurement needs; the one that it is of comes first."""
    guide = measurement.guide if isinstance(measurement, Quality) else None
    return [measurement.weights.run, *([guide.weights.run] if guide else [])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A statement that was put to the test.

    Attributes:
        text: the statement, as a clause without a full stop.
        holds: whether the numbers agree with it.
        evidence: the numbers, in words.
    """

    text: str
    holds: bool
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Numbers for people.

    Attributes:
        caption: what they are.
        header: names of the columns.
        rows: one text per column each.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a study found.

    Attributes:
        claims: what was tested.
        tables: the numbers.
        panels: the figure.
    """

    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    panels: tuple[Panel, ...]

    @property
    def finding(self) -> str:
        """What was found, in words."""
        parts = []
        for holds, words in ((True, "Holds here"), (False, "Does not hold here")):
            found = [f"{c.text} ({c.evidence})" for c in self.claims if c.holds == holds]
            parts += [f"{words}: {'; '.join(found)}."] if found else []
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How large a study is.

    Attributes:
        name: name on the command line.
        base: the run of config G from which all others are derived.
        sigma_rels: lengths at which quality is measured, rising.
        num_images: images of one Frechet distance.
        sampler_steps: Heun steps of each image.
        batch_size: images at a time.
        metric: name of the metric.
        cost: what it takes, in words.
    """

    name: str
    base: TrainConfig
    sigma_rels: tuple[float, ...]
    num_images: int
    sampler_steps: int
    batch_size: int
    metric: str
    cost: str

    @property
    def settings(self) -> dict[str, object]:
        """What a measured number depends on besides the networks."""
        return {
            "metric": self.metric,
            "num_images": self.num_images,
            "sampler_steps": self.sampler_steps,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An experiment.

    Attributes:
        name: name on the command line.
        question: what it asks, one line.
        claim: what the paper says, with its section.
        plan: what has to be trained and measured at a scale with given seeds. It is asked again with
            the numbers of the plan before until it stays the same, so that it may build on them.
        report: what the numbers say.
    """

    name: str
    question: str
    claim: str
    plan: Callable[[Scale, Sequence[int], Numbers], Plan]
    report: Callable[[Scale, Sequence[int], Numbers], Report]
