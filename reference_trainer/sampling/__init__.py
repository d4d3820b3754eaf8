"""Images from a trained denoiser: samplers, random numbers per seed, batches of images, pictures."""

from __future__ import annotations

from reference_trainer.sampling.folders import (
    ImageWriter,
    existing_images,
    prepare_folder,
    stored_labels,
    write_labels,
)
from reference_trainer.sampling.images import (
    Decoder,
    ImageBatch,
    ImageNetwork,
    evaluated,
    image_batches,
    sample_images,
    to_pixels,
    to_values,
)
from reference_trainer.sampling.pictures import image_grid, save_png
from reference_trainer.sampling.sampler import (
    Denoiser,
    SamplerConfig,
    Step,
    StepwiseDenoiser,
    heun_sample,
    plan_steps,
    run_sampler,
    sigma_schedule,
)
from reference_trainer.sampling.seeds import Start, seeded_labels, seeded_noise, start_of

__all__ = [
    "Decoder",
    "Denoiser",
    "ImageBatch",
    "ImageNetwork",
    "ImageWriter",
    "SamplerConfig",
    "Start",
    "Step",
    "StepwiseDenoiser",
    "evaluated",
    "existing_images",
    "heun_sample",
    "image_batches",
    "image_grid",
    "plan_steps",
    "prepare_folder",
    "run_sampler",
    "sample_images",
    "save_png",
    "seeded_labels",
    "seeded_noise",
    "sigma_schedule",
    "start_of",
    "stored_labels",
    "to_pixels",
    "to_values",
    "write_labels",
]
