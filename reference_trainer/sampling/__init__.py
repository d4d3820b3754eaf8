"""Images from a trained denoiser: samplers, random numbers per seed, batches of images, pictures."""

from __future__ import annotations

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
from reference_trainer.sampling.seeds import Start, seeded_noise, start_of

__all__ = [
    "Decoder",
    "Denoiser",
    "ImageBatch",
    "ImageNetwork",
    "SamplerConfig",
    "Start",
    "Step",
    "StepwiseDenoiser",
    "evaluated",
    "heun_sample",
    "image_batches",
    "image_grid",
    "plan_steps",
    "run_sampler",
    "sample_images",
    "save_png",
    "seeded_noise",
    "sigma_schedule",
    "start_of",
    "to_pixels",
    "to_values",
]
