"""The pickle reader: what real tools write comes out as data, what is hostile does nothing."""

from __future__ import annotations

import collections
import importlib.util
import io
import pickle  # noqa: TID251  # writes what the reader reads, and shows what it does not do
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.constructors import NumpyArray
from posthoc_ema.importers.restricted_pickle import Global, Opaque
from posthoc_ema.importers.spans import Span
from posthoc_ema.importers.tensors import PickledTensor
from posthoc_ema.importers.torch_files import load_bytes, open_pickle

CORPUS = Path(__file__).parents[1] / "corpus"
_spec = importlib.util.spec_from_file_location("pickle_seeds", CORPUS / "pickle_seeds.py")
seeds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(seeds)

PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**70, -(2**200), 0.5, float("inf"), True, False],
    "text": ["", "ü€𝄞", "a\nb\\c'\"", "x" * 300],
    "bytes": [b"", b"\x00\xff", b"y" * 300],
    "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], {}, {"a": {1: None}}),
    "sets": {1, "b"},
    "frozen": frozenset({2}),
    "ordered": collections.OrderedDict(b=1, a=2),
    ("tuple", 1): b"key",
}


@pytest.mark.parametrize("protocol", range(6))
def test_restricted_pickle_reads_plain_data_of_every_protocol(protocol):
    assert load_bytes(pickle.dumps(PLAIN, protocol)) == PLAIN


def test_restricted_pickle_keeps_shared_and_cyclic_values():
    shared = []
    shared.append(shared)
    value = load_bytes(pickle.dumps([shared, shared]))
    assert value[0] is value[1] is value[0][0]


def test_restricted_pickle_leaves_long_bytes_in_the_file():
    value = load_bytes(pickle.dumps(b"a" + b"x" * 10_000 + b"z"))
    assert isinstance(value, Span)
    assert (value.size, value.read(0, 2), value.read(9_999, 10_002)) == (10_002, b"ax", b"xxz"[-3:])


TENSORS = {
    "half": torch.arange(6.0).reshape(2, 3).half(),
    "bfloat16": torch.tensor([1.0, -2.5]).bfloat16(),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "scalar": torch.tensor(3),
    "bool": torch.tensor([True, False]),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "slice": torch.arange(20.0).reshape(4, 5)[1:3, 1::2],
}


def saved(value, zipped):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def same(tensor, found):
    assert found.dtype == str(tensor.dtype).removeprefix("torch.")
    assert found.shape == tuple(tensor.shape)
    bits = tensor.detach().contiguous()
    bits = bits.view(torch.uint16) if tensor.dtype == torch.bfloat16 else bits
    np.testing.assert_array_equal(found.read(), bits.numpy(), strict=True)


@pytest.mark.parametrize("form", ["pickle-2", "pickle-4", "pickle-5", "zip", "legacy"])
def test_restricted_pickle_reads_tensors(form):
    if form.startswith("pickle"):
        data = pickle.dumps(TENSORS, int(form[-1]))
    else:
        data = saved(TENSORS, form == "zip")
    found = load_bytes(data)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        same(tensor, found[name])


def test_restricted_pickle_tied_tensors_share_a_view():
    weight = torch.ones(2, 2)
    found = load_bytes(saved({"a": weight, "b": weight, "c": weight.t()}, True))
    assert found["a"].view == found["b"].view != found["c"].view


def test_restricted_pickle_reads_numpy():
    arrays = {
        "c": np.arange(6, dtype="f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype="i8").reshape(2, 3)),
    }
    for protocol in (2, 4):
        found = load_bytes(pickle.dumps({**arrays, "number": np.float32(2.5)}, protocol))
        assert found.pop("number") == 2.5
        for name, array in arrays.items():
            assert isinstance(found[name], NumpyArray)
            np.testing.assert_array_equal(found[name].tensor.read(), array, strict=True)


def test_restricted_pickle_of_objects_is_names_and_state():
    module = load_bytes(pickle.dumps(torch.nn.BatchNorm1d(2)))
    assert isinstance(module, Opaque)
    assert (module.module, module.name) == ("torch.nn.modules.batchnorm", "BatchNorm1d")
    assert isinstance(module.state["_parameters"]["weight"], PickledTensor)
    assert load_bytes(pickle.dumps(torch.float16)) == Global("torch", "float16")


# ---- hostile pickles


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


READ_ALL = """
import sys
import warnings
from pathlib import Path
from posthoc_ema.errors import SnapshotFormatError
from posthoc_ema.importers.torch_files import load_bytes
before = set(sys.modules)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        repr(load_bytes(path.read_bytes()))
    except SnapshotFormatError:
        pass
assert set(sys.modules) == before, set(sys.modules) - before
"""


def test_restricted_pickle_executes_no_hostile_pickle(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "pickles"
    folder.mkdir()
    hostile = seeds.hostile(str(canary))
    for name, data in hostile.items():
        (folder / name).write_bytes(data)
    run(READ_ALL, folder)
    assert not canary.exists()


ACTIVE = ["os-system-protocol-0", "getattr-of-import", "inst", "obj"]


@pytest.mark.parametrize("name", ACTIVE)
def test_hostile_pickles_are_hostile(name, tmp_path):
    """Python's own reader does what they say: the test above would see it."""
    canary = tmp_path / "canary"
    data = seeds.hostile(str(canary))[name]
    code = (
        "import pickle, sys\ntry: pickle.loads(bytes.fromhex(sys.argv[1]))\nexcept Exception: pass"
    )
    run(code, data.hex())
    assert canary.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ext-1", "extension registry"),
        ("persistent-id", "persistent id"),
        ("binary-persistent-id", "persistent id"),
        ("storage-bytes", "cannot be read as a pickle"),
    ],
)
def test_restricted_pickle_refuses(name, reason):
    with pytest.raises(SnapshotFormatError, match=reason):
        load_bytes(seeds.hostile()[name])


@pytest.mark.parametrize("name", sorted(seeds.bombs()))
def test_restricted_pickle_survives_bombs(name):
    try:
        load_bytes(seeds.bombs()[name])
    except SnapshotFormatError as error:
        assert "(bytes)" in str(error)  # noqa: PT017  # it may also be read


def repeated(*parts):
    return b"\x80\x04" + b"".join(parts) + b"N."


GROWING = {
    "sets": repeated(b"\x8f" * 600_000),
    "calls-of-calls": repeated(b"cos\nx\n", b")R" * 300_000),
    "copied-lists": repeated(
        b"cbuiltins\nlist\n\x940(", b"N" * 100_000, b"l\x85\x940", b"h\x00h\x01R" * 100_000
    ),
    "encoded-text": repeated(
        b"c_codecs\nencode\n\x940X", (10**6).to_bytes(4, "little"), b"a" * 10**6, b"\x940"
    )[:-2]
    + b"\x8c\x06latin1\x940"
    + b"h\x00h\x01h\x02\x86R" * 100_000
    + b".",
}


@pytest.mark.parametrize("name", GROWING)
def test_restricted_pickle_memory_is_bounded(name):
    """Without the budget these take gigabytes."""
    with pytest.raises(SnapshotFormatError, match="far more memory than its size"):
        load_bytes(GROWING[name])


class Tensor:
    """Pickles as a tensor over 4 float32 numbers, with any shape."""

    def __init__(self, *layout):
        self.layout = layout

    def __reduce__(self):
        storage = torch.zeros(4).storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.layout, False, {})


def tensor_pickle(shape, strides, offset=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: typed storages are what it still pickles
        return pickle.dumps(Tensor(offset, shape, strides))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (4,), 0),
        ((10**9,), (0,), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((2,), (1, 1), 0),
        ((2**61,) * 2, (0, 0), 0),
        ((True,), (1,), 0),
        ((2.0,), (1,), 0),
        ((2,), (1,), -1),
        ((1,) * 70, (1,) * 70, 0),
    ],
)
def test_restricted_pickle_refuses_tensors_beyond_their_storage(shape, strides, offset):
    with pytest.raises(SnapshotFormatError, match="tensor in it"):
        load_bytes(tensor_pickle(shape, strides, offset))


def test_restricted_pickle_views_inside_a_storage_are_read():
    np.testing.assert_array_equal(
        load_bytes(tensor_pickle((2, 2), (1, 2))).read(), np.zeros((2, 2))
    )


@pytest.mark.parametrize(
    "name", ["tensors-4.pkl", "state-zip.pt", "state-legacy.pt", "plain-0.pkl"]
)
def test_restricted_pickle_cut_anywhere_is_refused(name):
    data = (CORPUS / "pickles" / name).read_bytes()
    for size in range(len(data)):
        with pytest.raises(SnapshotFormatError):
            load_bytes(data[:size])


def test_open_pickle_names_the_file(tmp_path):
    path = tmp_path / "broken.pkl"
    path.write_bytes(b"\x80\x04")
    for bad in (path, tmp_path / "missing.pkl", tmp_path):
        with pytest.raises(SnapshotFormatError, match=str(bad)), open_pickle(bad):
            pass


def test_tensors_cannot_be_read_from_a_closed_file(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"w": torch.ones(2)}, path)
    with open_pickle(path) as value:
        assert value["w"].read().tolist() == [1, 1]
    with pytest.raises(SnapshotFormatError, match=r"state\.pt: cannot be read"):
        value["w"].read()


def test_zip_with_compressed_entries_is_refused():
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    with pytest.raises(SnapshotFormatError, match="compressed"):
        load_bytes(buffer.getvalue())


def test_the_seeds_are_those_of_the_script():
    """Except for what depends on the versions of torch and NumPy."""
    found = {path.name: path.read_bytes() for path in (CORPUS / "pickles").iterdir()}
    for prefix, made in (("hostile", seeds.hostile()), ("bomb", seeds.bombs())):
        for name, data in made.items():
            assert found[f"{prefix}-{name}.pkl"] == data
