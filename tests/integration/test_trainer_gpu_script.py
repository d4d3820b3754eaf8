"""The benchmark for GPUs runs, at a tiny size, where there is none; its counts are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference_trainer.config import DataConfig
from reference_trainer.precond import Precond

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import trainer_gpu

    return trainer_gpu


def test_gpu_benchmark_runs_at_a_tiny_size_on_a_processor(tmp_path):
    out = tmp_path / "figures.json"
    small = "--rounds 1 --batch 2 --steps 2 --matrix 64 --dtype float32"
    command = [sys.executable, str(FOLDER / "trainer_gpu.py"), "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--eager", *small.split(), "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(out.read_text())
    assert figures["training"] > 0
    assert figures["sampling"] > 0
    assert figures["matrix_rate"] > 0
    assert 0 < figures["share"] < 1
    assert 0 < sum(figures["seconds_by_kind"].values()) <= 1.1 * figures["seconds_profiled"]
    for line in ("training step, batch 2", "Heun steps", "convolutions and matrix products"):
        assert line in done.stdout


def test_gpu_benchmark_counts_three_evaluations_worth_of_products_per_step(script):
    """Forwards once, backwards twice; only the first layer needs no gradient of its input."""
    with torch.device("meta"):
        model = Precond(script.SMALL, DataConfig())
        given = torch.empty(4, 3, 16, 16), torch.ones(4), torch.empty(4, 10)
    with FlopCounterMode(display=False) as counter:
        model(*given)
    ratio = script.training_operations(script.SMALL, 4) / counter.get_total_flops()
    assert 2.9 < ratio <= 3.1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_red_fused__to_copy_linalg_vector_norm_3", "compiled pointwise and reductions"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "convolutions and matrix products"),
        ("pytorch_flash::flash_bwd_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel", "eager pointwise and reductions"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllReduce", "communication"),
    ],
)
def test_gpu_benchmark_sorts_kernels_by_name(script, name, kind):
    assert script.kind_of(name) == kind
