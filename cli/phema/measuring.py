"""Metrics of generated images, for the commands that measure; and their options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phema.guides import Guidance
from phema.networks import Average, classes_in_turn, open_averages
from posthoc_ema import ConfigError
from posthoc_ema.tensor_files import byte_view, checksum

if TYPE_CHECKING:
    from reference_trainer.distributed import DistributedContext
    from reference_trainer.metrics import Evaluator

Reference = Annotated[
    Path | None,
    typer.Option(
        "--ref",
        metavar="REF",
        help="Reference statistics of real images, of `phema reference`; the digits metrics bring theirs.",
    ),
]
ExtractorWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="PATH",
        help="Weights of the feature network, or inception=PATH, dinov2=PATH.  "
        "[default: from the cache of its library, or downloaded]",
    ),
]
CLASSES = ("in-turn", "drawn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How images are made and measured; all of it is part of what a number means.

    Attributes:
        evaluator: the metrics.
        num_images: images of one measurement.
        steps: steps of the Heun sampler.
        seed: first of the consecutive seeds.
        classes: "in-turn", "drawn" (by each image's seed), or None: in turn for the digits metrics.
        guidance: guides of every network.
        precision: of the networks; None is that of training.
        compiled: whether the networks are compiled.
        batch_size: images at a time.
        vae: autoencoder that decodes latents.
    """

    evaluator: Evaluator
    num_images: int
    steps: int
    seed: int
    classes: str | None = None
    guidance: Guidance = field(default_factory=lambda: Guidance((), []))
    precision: str | None = None
    compiled: bool = False
    batch_size: int = 256
    vae: str | None = None

    @property
    def in_turn(self) -> bool:
        """Whether the classes are asked for in turn."""
        if self.classes is not None:
            return self.classes == "in-turn"
        return set(self.evaluator.extractors) == {"digits"}

    @property
    def description(self) -> str:
        """What the numbers depend on, for people and for telling sweeps apart."""
        evaluator = self.evaluator
        names = ",".join(metric.name for metric in evaluator.metrics)
        parts = [f"{names} num_images={self.num_images} steps={self.steps} seed={self.seed}"]
        if self.classes is not None:
            parts.append(f"classes={self.classes}")
        for name, reference in evaluator.references.items():
            if name != "digits":
                mark = checksum(byte_view(reference.moments.covariance))[:8]
                parts.append(f"{name}={reference.source}:{mark}")
        parts += [text for text in (self.guidance.description,) if text]
        if self.precision is not None:
            parts.append(f"precision={self.precision}")
        return " ".join(parts)


def open_evaluation(
    metrics: str,
    reference: Path | None,
    weights: list[str] | None,
    ranks: DistributedContext,
) -> Evaluator:
    """Load metrics; with several processes the first one goes ahead, so that nothing is loaded twice.

    Raises:
        ConfigError, MetricError: see `reference_trainer.metrics.open_evaluator`.
    """
    from reference_trainer.metrics import open_evaluator

    def load() -> Evaluator:
        return open_evaluator(
            metrics,
            reference=reference,
            weights=parse_weights(weights, metrics),
            device=ranks.device,
        )

    first = ranks.agree(load, main_only=True)  # downloads once
    evaluator = ranks.agree(lambda: load() if first is None else first)
    assert evaluator is not None
    return evaluator


def parse_weights(given: list[str] | None, metrics: str) -> dict[str, Path]:
    """Extractor name -> path, of PATH or NAME=PATH.

    Raises:
        ConfigError: a plain PATH could belong to several extractors, or one is given twice.
    """
    from reference_trainer.metrics import EXTRACTORS, find_metrics

    names = list(dict.fromkeys(metric.extractor for metric in find_metrics(metrics)))
    found: dict[str, Path] = {}
    for text in given or ():
        name, mark, path = text.partition("=")
        if not mark or name not in EXTRACTORS:
            name, path = names[0], text
            if len(names) > 1:
                raise ConfigError(
                    f"--weights {text} could be of {' or '.join(names)}; write --weights {names[0]}={text}."
                )
        if name in found:
            raise ConfigError(f"--weights names two files for {name}. Give one.")
        found[name] = Path(path)
    return found


def check_classes(classes: str | None) -> None:
    """Raise ConfigError unless `classes` is None or a word of `CLASSES`."""
    if classes is not None and classes not in CLASSES:
        raise ConfigError(f"--classes must be {' or '.join(CLASSES)}, got {classes!r}.")


def measure_average(
    setup: Setup,
    average: Average,
    ranks: DistributedContext,
    *,
    repeat: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Generate images with one average and measure them.

    Args:
        setup: how.
        average: the network.
        ranks: the processes that share the images; all of them must call this.
        repeat: the block of seeds: each block is as long as the number of images.
        on_batch: called after each batch with (images done, images in all).

    Returns:
        See `reference_trainer.metrics.Evaluator.measure`.
    """
    from reference_trainer.sampling import SamplerConfig, image_batches

    first = setup.seed + repeat * setup.num_images
    labels = classes_in_turn(average.network, setup.num_images) if setup.in_turn else None

    def batches() -> Iterable[Any]:
        return image_batches(
            setup.guidance.of(average.network),
            range(first, first + setup.num_images),
            batch_size=setup.batch_size,
            sampler=SamplerConfig(num_steps=setup.steps),
            labels=labels,
            precision=setup.precision,
            compiled=setup.compiled,
            decode=decoder(average, setup.vae, ranks.device),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count * ranks.world_size
        if on_batch is not None:
            on_batch(min(done, setup.num_images), setup.num_images)

    made = ranks.agree(batches)
    assert made is not None
    return setup.evaluator.measure(made, ranks=ranks, on_batch=report)


_DECODED = 8  # latents at a time


def decoder(average: Average, vae: str | None, device: Any, input_range: str = "0..1") -> Any:
    """What makes pixels of a network's samples; None for networks of pixels.

    Args:
        average: the network.
        vae: autoencoder of latents, folder or name.
        device: where it computes.
        input_range: range of the pixels that it was fed when the latents were made.

    Raises:
        ConfigError: --vae is missing, or out of place.
    """
    if average.config.data.kind == "pixels":
        if vae is not None:
            raise ConfigError("--vae decodes latents, and this network makes pixels. Leave it out.")
        return None
    if vae is None:
        raise ConfigError(
            "this network makes latents: say which autoencoder decodes them, --vae FOLDER or NAME "
            "(for the published networks stabilityai/sd-vae-ft-mse)."
        )
    import numpy as np

    from reference_trainer.data.vae import load_autoencoder

    autoencoder = load_autoencoder(vae, input_range=input_range, device=device)

    def decode(latents: Any) -> Any:
        # A few at a time: an autoencoder takes far more memory per image than the network.
        return np.concatenate(
            [autoencoder.decode(part).numpy() for part in latents.split(_DECODED)]
        )

    return decode


class NetworkMetric:
    """Measures weights files of `phema train` for `run_sweep`.

    Every length is measured with the same seeds, so that rows differ by their weights alone.

    Args:
        setup: how.
        ranks: the process.
    """

    def __init__(self, setup: Setup, ranks: DistributedContext) -> None:
        self._setup, self._ranks = setup, ranks

    @property
    def description(self) -> str:
        """What the numbers depend on."""
        return self._setup.description

    def higher_is_better(self, key: str | None) -> bool:
        """Direction of a value; None is the first one."""
        deciding = [m for m in self._setup.evaluator.metrics if key is None or key in m.keys]
        return key == "accuracy" or (bool(deciding) and deciding[0].higher_is_better)

    def __call__(self, weights: Path, sigma_rel: float) -> dict[str, float]:
        """Measure one weights file."""
        del sigma_rel
        (average,) = open_averages(weights, None, None, str(self._ranks.device), "sweep")
        return measure_average(self._setup, average, self._ranks)
