"""Mutated pickles: only our own error comes out, nothing is executed, memory stays small."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.constructors import NumpyArray
from posthoc_ema.importers.restricted_pickle import Opaque
from posthoc_ema.importers.spans import Span
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.importers.torch_files import load_bytes

SEEDS = Path(__file__).parents[1] / "corpus" / "pickles"
INPUTS = 600_000
PROCESSES = 2
MOST_GROWTH = 96 << 20  # bytes of memory, over all inputs
LONGEST = 4096  # longer seeds are for other tests: they cost time and add no instruction
OPCODES = (
    b"IJKMLSTUBCNVXFG]ael)t}dsu021(ghjpqrcRboiPQ."
    b"\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98"
)
NUMBERS = [b"\x00" * 8, b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80", b"\x01"]


def mutate(data, others, rng):
    """A few random edits: bytes, instructions, sizes, repeated and exchanged pieces."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = bytes([rng.choice(OPCODES)])
            case 2:
                del data[at : at + rng.choice((1, 1, 2, 4, 16))]
            case 3:
                data[at : at + 1] = bytes([rng.choice(OPCODES)])
            case 4:
                number = rng.choice(NUMBERS)
                data[at : at + len(number)] = number
            case 5:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randrange(1, 40)]
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                data[at : at + 4] = other[start : start + rng.randrange(1, 60)]
            case 7 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def tensors_of(value):
    """All tensors in a value, which may contain itself."""
    left, seen, found = [value], set(), []
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, PickledTensor):
            found.append(item)
        elif isinstance(item, NumpyArray) and item.tensor is not None:
            found.append(item.tensor)
        elif isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            left += item
        elif isinstance(item, Opaque):
            left += [*item.args, item.state, item.items, item.elements]
        elif isinstance(item, Span):
            item.read(0, item.size)
    return found


def fuzz(seed, count):
    """Read `count` mutated seeds; returns how many were readable and how many tensors they held."""
    rng = random.Random(seed)
    paths = sorted(path for path in SEEDS.iterdir() if path.stat().st_size <= LONGEST)
    others = [path.read_bytes() for path in paths]
    with_tensors = [
        data for data in others if b"_rebuild_tensor" in data or b"_reconstruct" in data
    ]
    usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    readable = tensors = 0
    for _ in range(count):
        data = mutate(rng.choice(rng.choice((others, with_tensors))), others, rng)
        try:
            value = load_bytes(data)
            readable += 1
            for tensor in tensors_of(value):
                assert tensor.read().shape == tensor.shape
                tensors += 1
        except SnapshotFormatError:
            pass
        except BaseException as error:
            raise AssertionError(f"input {data!r}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - usual
    assert grown < MOST_GROWTH, grown
    return readable, tensors


def start(seed, count, folder):
    code = (
        "import importlib.util, resource, sys\n"
        "spec = importlib.util.spec_from_file_location('fuzzing', sys.argv[1])\n"
        "fuzzing = importlib.util.module_from_spec(spec); spec.loader.exec_module(fuzzing)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "modules = set(sys.modules)\n"
        "print(*fuzzing.fuzz(int(sys.argv[2]), int(sys.argv[3])))\n"
        "new = {name for name in set(sys.modules) - modules if not name.startswith('encodings.')}\n"
        "assert not new, new\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, __file__, str(seed), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(900)
def test_mutated_pickles_raise_only_our_error(tmp_path):
    running = [start(seed, INPUTS // PROCESSES, tmp_path) for seed in range(PROCESSES)]
    totals = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        totals.append([int(number) for number in out.split()])
    readable, tensors = map(sum, zip(*totals, strict=True))
    print(f"{INPUTS} inputs, {readable} readable, {tensors} tensors read")
    # the inputs reach the inside: many are still pickles, and tensors come out of some
    assert readable > INPUTS // 20
    assert tensors > INPUTS // 200
    assert list(tmp_path.iterdir()) == []
    assert not Path("/tmp/canary").exists()
