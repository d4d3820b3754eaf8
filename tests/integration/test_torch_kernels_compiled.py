"""The compiled kernel with the real compiler, and without one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from posthoc_ema.torch.averaging import Averages, eager

PROGRAM = """
import logging, sys, torch
from posthoc_ema.torch.averaging import Averages
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
value = {"w": torch.arange(200_000.0), "s": torch.ones(3)}
averages = Averages(value, 2, kernel="compiled")
for weights in ([1.0, 1.0], [0.5, 0.5]):
    averages.update(value, weights)
assert torch.equal(averages.average("w", 1), value["w"])
"""


@pytest.fixture(autouse=True)
def no_fallback(caplog):
    """Where it says nothing, the kernel that was asked for is the one that runs."""
    yield
    assert "does not work here" not in caplog.text


def test_one_function_serves_all_shapes_and_nothing_is_compiled_again():
    generator = torch.Generator().manual_seed(0)
    random_state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        first = {"w": torch.randn(140_000, generator=generator).to(dtype)}
        Averages(first, 2, kernel="compiled").update(first, [0.25, 0.125])
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (131_073, 200_001, 300_000):
                shapes = {"w": (length,), "m": (3, 50_000), "s": (7,), "t": (), "e": (0,)}
                values = {
                    name: torch.randn(shape, generator=generator).to(dtype)
                    for name, shape in shapes.items()
                }
                averages = Averages(values, 2, kernel="compiled")
                averages.update(values, [0.25, 0.125])
                for name, value in values.items():
                    expected = torch.stack([value.float() / 4, value.float() / 8])
                    torch.testing.assert_close(averages.stack(name), expected, rtol=3e-7, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_first_updates_are_exact_and_later_ones_are_compiled(monkeypatch):
    value = {"w": torch.randn(200_000), "s": torch.randn(9)}
    averages = Averages(value, 2, kernel="compiled")
    averages.load("w", torch.full((2, 200_000), 1e8))
    averages.update(value, [1.0, 1.0])
    assert torch.equal(averages.average("w", 1), value["w"])

    def refuse(*args):
        raise AssertionError("the eager kernel was used")

    monkeypatch.setattr(eager.EagerKernel, "update", refuse)
    value["w"].add_(4)
    averages.update(value, [0.25, 0.0])
    torch.testing.assert_close(averages.average("w", 0), value["w"] - 3)
    torch.testing.assert_close(averages.average("w", 1), value["w"] - 4, rtol=0, atol=1e-6)


def test_without_a_compiler_the_eager_kernel_stands_in_and_says_so_once(tmp_path):
    environment = os.environ | {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "kernel='compiled'" in line]
    assert len(said) == 1
    assert "does not work here" in said[0]
    assert "by the eager kernel" in said[0]


def test_bfloat16_averages_are_rounded_by_the_eager_kernel(caplog):
    value = {"w": torch.rand(1000)}
    compiled, eager = (
        Averages(value, 1, kernel=k, dtype="bfloat16") for k in ("compiled", "eager")
    )
    with caplog.at_level(logging.DEBUG, "posthoc_ema"):
        for averages in (compiled, eager):
            averages.update(value, [1.0], seed=3)
    assert torch.equal(compiled.stack("w"), eager.stack("w"))


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_updates_in_a_thread_beside_the_training(threads):
    value = {"w": torch.randn(200_000), "s": torch.randn(9)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        averages = Averages(value, 2, kernel="compiled", device="cpu")
        expected = {name: torch.zeros(2, *v.shape) for name, v in value.items()}
        for weights in ([1.0, 1.0], [0.25, 0.01], [0.25, 0.75], [0.1, 1e-3]):
            averages.update(value, weights)
            for name, stack in expected.items():
                value[name].mul_(1.0)
                for average, weight in zip(stack, weights, strict=True):
                    average.lerp_(value[name], weight)
        for name, stack in expected.items():
            torch.testing.assert_close(averages.stack(name), stack, rtol=1e-6, atol=1e-6)
        averages.close()
    finally:
        torch.set_num_threads(before)
