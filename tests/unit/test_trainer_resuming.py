"""Where a run goes on, and the switches of PyTorch while it trains."""

import pytest
import torch

from posthoc_ema import ConfigError
from reference_trainer.distributed import DistributedContext
from reference_trainer.loop import _reproducible, newest_checkpoint

CPU = torch.device("cpu")


class SecondProcess:
    """The second of two, the first of which has found a checkpoint of `images`."""

    rank, is_main = 1, False

    def __init__(self, images):
        self.images = images

    def sum_(self, tensor):
        return tensor + self.images

    def agree(self, action):
        return action()


def test_without_checkpoints_all_processes_begin_anew(tmp_path):
    assert newest_checkpoint(tmp_path, DistributedContext(0, 1, CPU)) == (None, [])
    assert newest_checkpoint(tmp_path, SecondProcess(-1)) == (None, [])


def test_processes_that_see_other_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        newest_checkpoint(tmp_path, SecondProcess(48))
    assert "process 1 finds no checkpoint as the newest and process 0 one of 48 images" in str(
        caught.value
    )


def switches():
    """Of convolutions and products in CUDA; they exist without a GPU too."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction
    return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, reduced


def test_training_on_cuda_sums_in_full_and_leaves_the_switches_as_they_were():
    before = switches()
    with _reproducible(torch.device("cuda")):
        assert switches() == (True, False, False, False, False)
    assert switches() == before
    with _reproducible(CPU):
        assert switches() == before
