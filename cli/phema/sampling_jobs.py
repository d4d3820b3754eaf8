"""What `phema sample` does: images of each average into a picture or a folder, alone or as a rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phema.guides import Guidance
from phema.measuring import decoder
from phema.networks import Average
from phema.output import output_folder, progress

if TYPE_CHECKING:
    from reference_trainer.distributed import DistributedContext
    from reference_trainer.sampling import ImageBatch, SamplerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingJob:
    """What is asked for, apart from the average and the place.

    Attributes:
        seeds: one per image.
        asked: classes to ask for in turn; None leaves it to `in_turn`.
        in_turn: ask for all classes in turn, not for those that the seeds draw.
        guidance: the opened guides.
        sampler: the sampler.
        precision: that of the network; None for that of training.
        compiled: whether the network is compiled.
        batch_size: images at a time.
        vae: autoencoder of latents, folder or name.
        input_range: range of the pixels that it was fed when the latents were made.
        ranks: this process among those of the job.
    """

    seeds: list[int]
    asked: list[int] | None
    in_turn: bool
    guidance: Guidance
    sampler: SamplerConfig
    precision: str | None
    compiled: bool
    batch_size: int
    vae: str | None
    input_range: str
    ranks: DistributedContext

    def classes(self, average: Average) -> list[int] | None:
        """The classes that are asked for in turn; None for those that the seeds draw."""
        if self.asked is not None:
            return self.asked
        return (list(range(average.network.label_dim)) or None) if self.in_turn else None

    def settings(self, average: Average) -> dict[str, Any]:
        """All that decides how the image of a seed looks, as JSON values."""
        sampler = {k: "inf" if v == math.inf else v for k, v in asdict(self.sampler).items()}
        return {
            "weights": average.identity,
            "guidance": self.guidance.identity,
            "sampler": sampler,
            "classes": self.classes(average),
            "precision": self.precision or average.config.network.dtype,
            "vae": None if self.vae is None else [self.vae, self.input_range],
        }


def make_picture(job: SamplingJob, averages: Iterable[Average], out: Path, columns: int) -> None:
    """One grid per average, side by side.

    Args:
        job: what is asked for.
        averages: the averages.
        out: the picture, .png.
        columns: images in a row of a grid.
    """
    from posthoc_ema.plotting import plot_images
    from reference_trainer.sampling import image_grid, save_png

    panels = []
    with output_folder(out.parent):
        for average in averages:
            images = _all_images(job, average)
            if images is not None:
                scale = max(1, 32 // images.shape[-1])
                grid = image_grid(images, min(columns, len(images)), scale, gap=2)
                panels.append((average.label, grid))
        if len(panels) == 1:
            save_png(out, panels[0][1])
        elif panels:
            named = [("raw weights" if n == "raw" else f"sigma_rel {n}", g) for n, g in panels]
            plot_images(named, out)


def fill_folders(
    job: SamplingJob, averages: Iterable[Average], out: Path, several: bool, overwrite: bool
) -> None:
    """A folder of images; with several averages one for each, inside `out`."""
    for average in averages:
        _fill_folder(job, average, out / average.label if several else out, overwrite)


def _batches(job: SamplingJob, average: Average, **options: Any) -> Iterator[ImageBatch]:
    """This process's batches of an average; refuses bad arguments before the first one."""
    from reference_trainer.sampling import image_batches

    turn = job.classes(average)
    return image_batches(
        job.guidance.of(average.network),
        job.seeds,
        batch_size=job.batch_size,
        sampler=job.sampler,
        labels=[turn[seed % len(turn)] for seed in job.seeds] if turn else None,
        precision=job.precision,
        compiled=job.compiled,
        decode=decoder(average, job.vae, job.ranks.device, job.input_range),
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        **options,
    )


def _shown(
    job: SamplingJob, average: Average, batches: Iterable[ImageBatch]
) -> Iterator[ImageBatch]:
    """The batches, with a progress bar."""
    with progress(f"sampling {average.label}") as bar:
        for batch in batches:
            yield batch
            bar(batch.first + len(batch.seeds), len(job.seeds))


def _all_images(job: SamplingJob, average: Average) -> Any:
    """The images in the order of the seeds, uint8 `[n, c, h, w]`, on the first process."""
    import numpy as np

    batches = job.ranks.agree(functools.partial(_batches, job, average)) or ()
    mine = [(batch.first, batch.images) for batch in _shown(job, average, batches)]
    gathered = job.ranks.gather(mine)
    if gathered is None:
        return None
    images = dict(part for parts in gathered for part in parts)
    return np.concatenate([images[first] for first in sorted(images)])


def _fill_folder(job: SamplingJob, average: Average, folder: Path, overwrite: bool) -> None:
    from reference_trainer.sampling import ImageWriter, existing_images, prepare_folder

    ranks, settings = job.ranks, job.settings(average)
    missing: set[int] = set()

    def needed(seeds: Iterable[int]) -> bool:
        return not missing.isdisjoint(seeds)

    batches = ranks.agree(functools.partial(_batches, job, average, wanted=needed)) or ()
    prepare = functools.partial(prepare_folder, folder, settings, overwrite=overwrite)
    ranks.agree(prepare, main_only=True)
    missing |= set(job.seeds) - ranks.broadcast(set(existing_images(folder)))
    with ImageWriter(folder, missing) as writer:
        for batch in _shown(job, average, batches):
            writer.write(batch)
    gathered = ranks.gather(writer.labels)
    if gathered is not None:
        _write_labels(job, average, folder, {s: c for part in gathered for s, c in part.items()})


def _write_labels(job: SamplingJob, average: Average, folder: Path, labels: dict[int, int]) -> None:
    from reference_trainer.sampling import (
        existing_images,
        seeded_labels,
        stored_labels,
        write_labels,
    )

    if not average.network.label_dim:
        write_labels(folder, None)
        return
    known = {**stored_labels(folder), **labels}
    # A kill may have left images without labels.
    lost = sorted(set(existing_images(folder)) - set(known))
    turn = job.classes(average)
    known |= (
        {s: turn[s % len(turn)] for s in lost} if turn else seeded_labels(lost, average.network)
    )
    write_labels(folder, known)
