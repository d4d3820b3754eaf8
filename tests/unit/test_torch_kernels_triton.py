"""The Triton kernel, under Triton's interpreter: without it this file runs itself once more with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from posthoc_ema.torch.averaging import Averages
from posthoc_ema.torch.averaging.choosing import triton_is_interpreted

from .averaging_cases import FLOAT_DTYPES, WEIGHTS, assert_same, changed, parameters, run

pytest.importorskip("triton", reason="Triton is installed on Linux only")
interpreted = pytest.mark.skipif(not triton_is_interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(triton_is_interpreted(), reason="the interpreter compiles nothing")


@compiled
def test_this_file_passes_under_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 8


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_averages_of_every_kind_of_parameter_follow_the_formula(dtype):
    values = parameters(dtype, large=66_000)
    averages = Averages(values, 3, kernel="triton")
    assert_same(averages, run(averages, values))


@interpreted
def test_more_profiles_than_one_launch_takes():
    value = {"w": torch.randn(5000), "s": torch.randn(3)}
    averages = Averages(value, 6, kernel="triton")
    averages.update(value, [1.0, 0.5, 0.25, 0.125, 1.0, 0.75])
    for name, tensor in value.items():
        expected = torch.stack([tensor * w for w in (1.0, 0.5, 0.25, 0.125, 1.0, 0.75)])
        torch.testing.assert_close(averages.stack(name), expected, rtol=2e-7, atol=0)


@interpreted
def test_parameters_at_any_address_and_new_addresses():
    base = torch.randn(20_000)
    averages = Averages({"w": base[1:10_001], "s": base[3:8]}, 1, kernel="triton")
    for start in (1, 4, 7, 8000):
        values = {"w": base[start : start + 10_000], "s": base[start + 2 : start + 7].bfloat16()}
        averages.update(values, [1.0])
        assert torch.equal(averages.average("w", 0), values["w"])
        assert torch.equal(averages.average("s", 0), values["s"].float())
    base.add_(1)  # the same memory: the table of addresses stays
    averages.update(values, [1.0])
    assert torch.equal(averages.average("w", 0), values["w"])


@interpreted
def test_state_is_portable_between_kernels():
    values = parameters(large=66_000)
    first = Averages(values, 3, kernel="triton")
    run(first, values, WEIGHTS[:2])
    second = Averages(values, 3, kernel="eager")
    for name in values:
        second.load(name, first.stack(name))
    whole = Averages(values, 3, kernel="eager")
    run(whole, values)
    for number, row in list(enumerate(WEIGHTS))[2:]:
        second.update(changed(values, number), row)
    for name in values:
        torch.testing.assert_close(second.stack(name), whole.stack(name), rtol=5e-7, atol=5e-7)


@interpreted
def test_bfloat16_averages_are_rounded_without_bias_and_by_their_seed():
    low, high = 1.0, 1.0 + 2.0**-7
    value = {"w": torch.full((40_000,), low + 0.3 * (high - low)), "s": torch.full((50,), 1.0)}
    averages = Averages(value, 2, kernel="triton", dtype="bfloat16")
    state = torch.get_rng_state()
    averages.update(value, [1.0, 1.0], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    found = averages.stack("w").clone()
    assert set(found.unique().tolist()) == {low, high}
    for row in found:
        assert (row == high).double().mean().item() == pytest.approx(0.3, abs=0.012)
    assert not torch.equal(found[0], found[1])
    assert (averages.stack("s") == 1).all()
    averages.update(value, [1.0, 1.0], seed=1)
    assert torch.equal(averages.stack("w"), found)
    averages.update(value, [1.0, 1.0], seed=2)
    assert not torch.equal(averages.stack("w"), found)


@interpreted
def test_nan_and_infinity_stay_what_they_are():
    bits = [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000]
    value = {"w": torch.tensor(bits, dtype=torch.int32).view(torch.float32)}
    averages = Averages(value, 1, kernel="triton", dtype="bfloat16")
    averages.load("w", torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]]))
    with np.errstate(invalid="ignore"):  # the interpreter is NumPy
        averages.update(value, [0.25])
    found = averages.average("w", 0)
    assert found[:3].isnan().all()
    assert found[3:].tolist() == [float("inf"), -float("inf")]


@compiled
@pytest.mark.parametrize("average", ["fp32", "bf16"])
def test_compiled_for_a_gpu_sixteen_bytes_are_moved_at_a_time(average, tmp_path, monkeypatch):
    """Triton compiles for a GPU that is not there; PTX shows the width of loads and stores."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from posthoc_ema.torch.averaging import triton_code, triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "PROFILES": 2,
        "THETA": tl.float32,
        "AVERAGE": tl.float32 if average == "fp32" else tl.bfloat16,
        "ALIGNED": True,
        "ROUNDS": average == "bf16",
        "BLOCK": triton_kernel.BLOCK,
    }
    signature = dict.fromkeys(("parameters", "averages", "strides", "sizes", "starts"), "*i64")
    signature |= {"owners": "*i32", "first": "i32", "seed": "i32"}
    signature |= dict.fromkeys(("w0", "w1", "w2", "w3"), "fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_code.update, signature=signature, constexprs=constants)
    options = {"num_warps": triton_kernel.WARPS, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
