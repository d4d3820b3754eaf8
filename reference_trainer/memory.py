"""Memory of a training process: how much it has used, and what to do when it runs out."""

from __future__ import annotations

import contextlib
import resource
import sys
import traceback
from collections.abc import Iterator

import torch

from posthoc_ema import ConfigError
from reference_trainer.config import TrainConfig
from reference_trainer.distributed import DistributedContext
from reference_trainer.parallel import images_per_pass, next_lower_divisor


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has used so far: of its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def memory_advice(config: TrainConfig, ranks: DistributedContext) -> Iterator[None]:
    """Turn running out of memory into one sentence that says which microbatch to try.

    Raises:
        ConfigError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold tensors, and replicas
        raise ConfigError(advice(config, ranks)) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator, the driver and NVIDIA's libraries have no class of their own for it.
    words = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def advice(config: TrainConfig, ranks: DistributedContext) -> str:
    """What is said when memory runs out.

    Args:
        config: the run's configuration.
        ranks: the processes.
    """
    now, share = images_per_pass(config, ranks), config.batch_size // ranks.world_size
    where = "CUDA" if ranks.device.type == "cuda" else "this machine"
    ran_out = f"{where} is out of memory ({ranks.device}) with {now} images per forward pass"
    if now > 1:
        smaller = next_lower_divisor(share, now // 2)
        return (
            f"{ran_out}: try --microbatch {smaller}. The gradients of a step stay those of all "
            f"{config.batch_size} images."
        )
    return (
        f"{ran_out}, the fewest there are: try --set network.dtype=bfloat16, several GPUs with "
        "--parallel fsdp2, or a smaller network."
    )
