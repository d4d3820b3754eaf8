"""The metrics by name: what is measured, in whose features, and under which keys."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

from posthoc_ema.errors import ConfigError

Measure = Literal["frechet", "kid", "precision-recall"]


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as the user writes it.
        measure: what is computed from the features of generated and real images.
        extractor: whose features: "digits", "inception" or "dinov2".
        keys: names of the numbers in a result, the first one is what a sweep looks at.
        higher_is_better: direction of the first number.
    """

    name: str
    measure: Measure
    extractor: str
    keys: tuple[str, ...]

    @property
    def higher_is_better(self) -> bool:
        """Whether larger numbers are better: precision and recall; distances are to be small."""
        return self.measure == "precision-recall"

    @property
    def needs_features(self) -> bool:
        """Whether the features themselves are compared, and not their mean and covariance."""
        return self.measure != "frechet"


_FRECHET = {"digits": ("fd-digits", "fd"), "inception": ("fid", "fid")}


def _metrics(extractor: str) -> list[Metric]:
    frechet, key = _FRECHET.get(extractor, (f"fd-{extractor}", f"fd_{extractor}"))
    dash, line = ("", "") if extractor == "inception" else (f"-{extractor}", f"_{extractor}")
    return [
        Metric(frechet, "frechet", extractor, (key,)),
        Metric(f"kid{dash}", "kid", extractor, (f"kid{line}",)),
        Metric(
            f"precision-recall{dash}",
            "precision-recall",
            extractor,
            (f"precision{line}", f"recall{line}"),
        ),
    ]


METRICS: dict[str, Metric] = {
    metric.name: metric for e in ("digits", "inception", "dinov2") for metric in _metrics(e)
}
"""Every metric: `fd-digits`, `fid`, `fd-dinov2`, `kid`, `precision-recall` and their variants."""


def find_metrics(names: str | Sequence[str]) -> tuple[Metric, ...]:
    """Metrics by name, each once, in the order given.

    Args:
        names: names, or one string of names separated by commas.

    Raises:
        ConfigError: a name is unknown, or there is none.

    Example:
        >>> [metric.extractor for metric in find_metrics("fid,fd-dinov2")]
        ['inception', 'dinov2']
    """
    words = names.split(",") if isinstance(names, str) else names
    found = {}
    for word in (word.strip() for word in words):
        if word not in METRICS:
            near = difflib.get_close_matches(word, METRICS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"metric must be one of: {', '.join(METRICS)}; got '{word}'. Did you mean '{near}'?"
            )
        found[word] = METRICS[word]
    return tuple(found.values())
