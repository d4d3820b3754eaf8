from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema import (
    ConfigError,
    NewAverage,
    PowerProfile,
    SnapshotFormatError,
    SnapshotStore,
    plan_synthesis,
)
from posthoc_ema.codecs import decode, decode_int8_blocks, encode
from posthoc_ema.synthesis.arithmetic import BASIS_ERROR, NumpyArithmetic, basis, choose
from posthoc_ema.synthesis.combine import Group, combine
from posthoc_ema.synthesis.reading import SnapshotSource
from posthoc_ema.synthesis.streams import AheadStream, CachedStream, block_bytes, is_cold, pages
from posthoc_ema.torch.arithmetic import TorchArithmetic

from .stores import entry, make_store, make_table

# The name `combine` of the package is the function.
combine_module = importlib.import_module("posthoc_ema.synthesis.combine")

DTYPES = ["float32", "float16", "bfloat16"]
DEVICES = ["numpy", "cpu"]
TABLE = make_table(
    entry("a", (70, 11)), entry("b", (3,)), entry("none", (0, 2)), entry("c", (1000,))
)


def collect(sources, groups, **options):
    """The results of `combine`, tensor by tensor."""
    parts = {}
    for block in combine(sources, groups, **options):
        rows = parts.setdefault(block.name, [])
        assert block.start == sum(r.shape[1] for r in rows)
        rows.append(block.values.copy())
    return {name: np.concatenate(rows, axis=1) for name, rows in parts.items()}


def opened(tmp_path, dtype="float32", times=(10, 20, 30)):
    store = make_store(tmp_path / dtype, times=times, dtype=dtype, table=TABLE)
    records = [r for r in store.records if r.sigma_rel is not None]
    return store, [SnapshotSource.open(store, r) for r in records]


def sizes():
    return {name: int(np.prod(e.shape)) for name, e in TABLE.entries.items()}


def expected(store, sources, weights, dtype):
    """Sums in float64 of what the files hold."""
    result = {}
    for name in TABLE.entries:
        stored = [decode(s.read_copy(name).reshape(-1), dtype) for s in sources]
        result[name] = weights @ np.float64(stored)
    return result


@pytest.fixture
def cold(monkeypatch):
    """Files are read ahead and past the page cache, however small they are."""
    monkeypatch.setattr(combine_module, "is_cold", lambda *_: True)


# ---- sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_targets", [1, 5])
def test_numpy_and_torch_add_up_alike(rng, dtype, num_targets):
    values = rng.normal(size=(37, 5000)).astype(np.float32)
    stored = encode(values, dtype)
    weights = rng.normal(size=(num_targets, 37)).astype(np.float32)
    size = np.abs(weights).sum(axis=1, keepdims=True) * np.abs(values).max()
    exact = np.float64(weights) @ np.float64(decode(stored, dtype))
    for arithmetic in (NumpyArithmetic(), TorchArithmetic(torch.device("cpu"))):
        stack = arithmetic.stack(dtype, 40, 6000)
        stack[:37, :5000] = stored
        sums = arithmetic.sums(num_targets, 6000)
        for repeat in (1, 2):
            part = stack[:37, :5000]
            arithmetic.add(sums, arithmetic.weights(weights), part, dtype, repeat == 1)
            result = arithmetic.fetch(sums, np.empty((num_targets, 5000), dtype=np.float32))
            assert np.max(np.abs(result - repeat * exact) / size) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_combine_is_the_weighted_sum(tmp_path, rng, monkeypatch, device, dtype, workers):
    monkeypatch.setattr(combine_module, "_num_workers", lambda *_: workers)
    monkeypatch.setattr(combine_module, "TILE", 100)
    monkeypatch.setattr(combine_module, "_GROUP", 2)
    store, sources = opened(tmp_path, dtype)
    weights = rng.normal(size=(3, len(sources)))
    result = collect(sources, [Group(sizes(), weights)], device=device)
    for name, values in expected(store, sources, weights, dtype).items():
        np.testing.assert_allclose(result[name], values, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_combine_gives_the_same_bits_again(tmp_path, rng, monkeypatch, device):
    """Sums are made in the order of the inputs, whichever thread is faster."""
    monkeypatch.setattr(combine_module, "_num_workers", lambda *_: 3)
    monkeypatch.setattr(combine_module, "TILE", 50)
    _, sources = opened(tmp_path, "float16")
    group = Group(sizes(), rng.normal(size=(2, len(sources))))
    first, second = (collect(sources, [group], device=device) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("device", DEVICES)
def test_combine_copies_a_target_that_is_one_input(tmp_path, rng, device):
    _, sources = opened(tmp_path, "float16")
    weights = rng.normal(size=(3, len(sources)))
    weights[1] = 0
    weights[1, 4] = 1
    result = collect(sources, [Group(sizes(), weights)], device=device)
    for name in sizes():
        copied = decode(sources[4].read_copy(name).reshape(-1), "float16")
        np.testing.assert_array_equal(result[name][1], copied)


@pytest.mark.parametrize("device", DEVICES)
def test_combine_gives_zeros_for_weights_of_zero(tmp_path, device):
    _, sources = opened(tmp_path)
    weights = np.zeros((2, len(sources)))
    weights[1, 2] = 1
    result = collect(sources, [Group(sizes(), weights)], device=device)
    assert not result["a"][0].any()
    assert result["a"][1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_are_not_finite_stay_so_and_alone(tmp_path, device):
    table = make_table(entry("w", (100,)))
    with SnapshotStore.create(tmp_path, clock="steps", table=table) as store:
        for time in (1, 2):
            values = np.full(100, time, dtype=np.float32)
            values[7 * time] = np.inf
            values[50] = np.nan
            new = NewAverage(PowerProfile(time, 0.1), "float16", lambda _, v=values: v)
            store.add(time, [new])
    sources = [SnapshotSource.open(store, r) for r in store.records]
    for count in (1, 12):  # without and with a basis
        weights = np.tile([[0.25, 0.5]], (count, 1))
        result = collect(sources, [Group({"w": 100}, weights)], device=device)["w"]
        assert np.isposinf(result[:, [7, 14]]).all()
        assert np.isnan(result[:, 50]).all()
        rest = np.delete(result, [7, 14, 50], axis=1)
        assert (rest == np.float32(1.25)).all()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


class Plain:
    """A source that only knows how to read, as a checkpoint's would."""

    def __init__(self, values):
        self.values = values

    def read(self, tile, out):
        for piece in tile:
            begin = piece.position
            out[begin : begin + piece.stop - piece.start] = self.values[piece.name][
                piece.start : piece.stop
            ]


@pytest.mark.parametrize("device", DEVICES)
def test_sources_of_any_kind_mix(tmp_path, rng, monkeypatch, device):
    monkeypatch.setattr(combine_module, "TILE", 64)
    store, sources = opened(tmp_path, "bfloat16")
    plain = Plain({n: rng.normal(size=k).astype(np.float32) for n, k in sizes().items()})
    weights = rng.normal(size=(2, 1 + len(sources)))
    result = collect([plain, *sources], [Group(sizes(), weights)], device=device)
    for name, values in expected(store, sources, weights[:, 1:], "bfloat16").items():
        total = values + weights[:, :1] * plain.values[name]
        np.testing.assert_allclose(result[name], total, atol=1e-5)


# ---- a basis of the targets


def test_basis_of_a_dense_range_of_lengths_is_smaller(tmp_path):
    store = make_store(tmp_path, times=tuple(range(10, 400, 10)), table=make_table(entry("w", ())))
    weights = plan_synthesis(store, np.linspace(0.02, 0.25, 31).tolist()).coefficients.T
    chosen, matrix = basis(weights)
    assert len(chosen) < 24
    np.testing.assert_array_equal(matrix[chosen], np.eye(len(chosen)))
    error = np.abs(matrix @ weights[chosen] - weights).sum(axis=1)
    assert (error <= 1.01 * BASIS_ERROR * np.abs(weights).sum(axis=1)).all()


def test_basis_is_not_looked_for_where_nothing_is_gained(rng):
    assert basis(rng.normal(size=(20, 40))) is None
    assert basis(np.ones((3, 40))) is None


def test_targets_made_of_a_basis_are_those_of_their_own(tmp_path):
    store, sources = opened(tmp_path, "float16", tuple(range(10, 400, 10)))
    weights = plan_synthesis(store, np.linspace(0.02, 0.25, 31).tolist()).coefficients.T
    assert basis(weights) is not None
    result = collect(sources, [Group(sizes(), weights)])["c"]
    exact = expected(store, sources, weights, "float16")["c"]
    bound = np.abs(weights).sum(axis=1, keepdims=True) * 5
    assert (np.abs(result - exact) / bound).max() < 1e-6


# ---- reading


@pytest.mark.parametrize("block", [4096, 8192])
def test_ahead_and_cached_streams_give_the_same_bytes(tmp_path, rng, block):
    content = rng.integers(0, 256, size=50_001, dtype=np.uint8)
    path = tmp_path / "x"
    path.write_bytes(content.tobytes())
    ranges = [(17, 9000), (9001, 9002), (20_000, 50_001)]
    wanted = np.concatenate([content[a:b] for a, b in ranges])
    with combine_module.ThreadPoolExecutor(2) as executor:
        streams = [
            CachedStream(path, ranges, keep_open=True),
            CachedStream(path, ranges, keep_open=False),
            AheadStream(path, ranges, pages(2, block), executor),
        ]
        for stream in streams:
            out = np.zeros(len(wanted), dtype=np.uint8)
            cuts = [0, 1, 8983, 8984, 20_000, len(wanted)]
            for a, b in itertools.pairwise(cuts):
                stream.readinto(out[a:b])
            np.testing.assert_array_equal(out, wanted)
            stream.close()


def test_reading_ahead_does_without_direct_access(tmp_path, rng, monkeypatch, cold):
    """tmpfs and some network file systems refuse O_DIRECT, when opening or when reading."""
    direct, preadv = os.O_DIRECT, os.preadv
    _, sources = opened(tmp_path)
    weights = rng.normal(size=(1, len(sources)))
    before = collect(sources, [Group(sizes(), weights)])
    for where in ("open", "preadv"):
        real = getattr(os, where)

        def refuse(path, flags=0, *rest, real=real, where=where):
            import fcntl

            held = flags if where == "open" else fcntl.fcntl(path, fcntl.F_GETFL)
            if held & direct:
                raise OSError(22, "Invalid argument")
            return real(path, flags, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(os, where, refuse)
            after = collect(sources, [Group(sizes(), weights)])
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values)
    assert os.preadv is preadv


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_depend_on_the_page_cache(tmp_path, rng, monkeypatch, device, request):
    _, sources = opened(tmp_path, "float16")
    group = Group(sizes(), rng.normal(size=(2, len(sources))))
    warm = collect(sources, [group], device=device)
    request.getfixturevalue("cold")
    ahead = collect(sources, [group], device=device)
    for name in warm:
        np.testing.assert_array_equal(warm[name], ahead[name])


def test_cold_files_are_recognised(tmp_path, rng):
    path = tmp_path / "x"
    size = 16 << 20
    path.write_bytes(rng.integers(0, 256, size=size, dtype=np.uint8).tobytes())
    assert not is_cold(path, [(0, size)])
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    probe = bytearray(1)
    try:
        os.preadv(descriptor, [probe], size // 2 + 4096, os.RWF_NOWAIT)
        dropped = False
    except BlockingIOError:
        dropped = True
    os.close(descriptor)
    assert is_cold(path, [(0, size)]) == dropped  # a memory file system drops nothing


def test_blocks_read_ahead_keep_to_their_memory():
    for files in (1, 3, 64, 128, 500, 2000):
        assert 2 * files * block_bytes(files) <= 128 << 20


@pytest.mark.parametrize("where", ["cached", "ahead"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_named_with_file_and_tensor(tmp_path, request, where, damage):
    if where == "ahead":
        request.getfixturevalue("cold")
    _, sources = opened(tmp_path)
    path = sources[3].path
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content[:-4] if damage == "cut" else content)
    pattern = {"bit": "'c' is damaged", "cut": "became shorter", "gone": "cannot be opened"}
    weights = np.ones((1, len(sources)))
    with pytest.raises(SnapshotFormatError, match=f"{path.name}.*{pattern[damage]}"):
        collect(sources, [Group(sizes(), weights)])


@pytest.mark.parametrize("where", ["cached", "ahead"])
def test_leaving_early_ends_threads_and_closes_files(tmp_path, monkeypatch, request, where):
    if where == "ahead":
        request.getfixturevalue("cold")
    monkeypatch.setattr(combine_module, "TILE", 16)
    monkeypatch.setattr(combine_module, "_num_workers", lambda *_: 2)
    _, sources = opened(tmp_path)
    threads, files = threading.active_count(), open_files()
    blocks = combine(sources, [Group(sizes(), np.ones((1, len(sources))))])
    next(blocks)
    blocks.close()
    assert threading.active_count() == threads
    assert open_files() == files


# ---- who does it


def test_the_callers_torch_settings_stay(tmp_path):
    threads = torch.get_num_threads()
    _, sources = opened(tmp_path)
    torch.set_num_threads(threads + 1)
    torch.set_float32_matmul_precision("high")
    try:
        for _ in combine(sources, [Group(sizes(), np.ones((1, len(sources))))], device="cpu"):
            assert torch.get_num_threads() == threads + 1
        assert torch.get_num_threads() == threads + 1
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", ["quantum", "cuda:99"])
def test_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=f"device must be one.*'{device}'"):
        choose(device, 0)


def test_small_synthesis_imports_no_torch(tmp_path):
    store, _ = opened(tmp_path)
    code = (
        "import sys, posthoc_ema; posthoc_ema.synthesize(sys.argv[1], 0.07);"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---- int8 with a scale per block


@pytest.fixture
def int8_store(tmp_path, rng):
    """A walk, stored as differences in int8; sizes that are no multiples of a block."""
    table = make_table(entry("a", (70, 11)), entry("b", (3,)), entry("c", (1000,)))
    walk = {e.name: rng.normal(size=e.shape).astype(np.float32) for e in table.entries.values()}
    with SnapshotStore.create(tmp_path / "int8", clock="steps", table=table) as store:
        for time in range(1, 9):
            for values in walk.values():
                values += 0.01 * rng.normal(size=values.shape).astype(np.float32)
            new = NewAverage(PowerProfile(time, 0.1), "delta-int8", lambda n: walk[n].copy())
            store.add(time, [new])
    return SnapshotStore.open(tmp_path / "int8")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["cached", "ahead"])
@pytest.mark.parametrize("tile", [64, 128, 1 << 17])
def test_int8_files_are_read_in_blocks(int8_store, rng, monkeypatch, request, device, where, tile):
    if where == "ahead":
        request.getfixturevalue("cold")
    monkeypatch.setattr(combine_module, "TILE", tile)
    sources = [SnapshotSource.open(int8_store, r) for r in int8_store.records]
    kinds = {s.header.tensors["a"].dtype for s in sources}
    assert "int8" in kinds
    weights = rng.normal(size=(2, len(sources)))
    counts = {"a": 770, "b": 3, "c": 1000}
    result = collect(sources, [Group(counts, weights)], device=device)
    for name, count in counts.items():
        stored = []
        for source in sources:
            bits = source.read_copy(name).reshape(-1)
            if source.header.tensors[name].dtype == "int8":
                out = np.empty(count, dtype=np.float32)
                stored.append(decode_int8_blocks(bits, source.read_copy(name + ":scales"), out))
            else:
                stored.append(decode(bits, source.header.tensors[name].dtype))
        np.testing.assert_allclose(result[name], weights @ np.float64(stored), atol=1e-5)


@pytest.mark.parametrize("part", ["c", "c:scales"])
def test_damage_of_int8_data_or_scales_is_named(int8_store, part):
    sources = [SnapshotSource.open(int8_store, r) for r in int8_store.records]
    source = next(s for s in sources if s.header.tensors["c"].dtype == "int8")
    content = bytearray(source.path.read_bytes())
    content[source.header.tensors[part].start] ^= 1
    source.path.write_bytes(content)
    with pytest.raises(SnapshotFormatError, match=f"{source.path.name}.*'{part}' is damaged"):
        collect(sources, [Group({"a": 770, "b": 3, "c": 1000}, np.ones((1, len(sources))))])
