"""Mutated manifests and safetensors headers: only our errors come out, nothing outside is touched.

Two processes (one per reader) take a seed corpus and a real store, change bytes and JSON values at
random, and use what is still accepted. An audit hook sees every file that is opened, listed, renamed or
removed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posthoc_ema import (
    NewAverage,
    PhemaError,
    PointProfile,
    PowerProfile,
    SnapshotFormatError,
    SnapshotStore,
    TensorEntry,
    TensorTable,
)
from posthoc_ema.chains import dependents, file_coefficients, parts
from posthoc_ema.classical_profiles import ExponentialProfile, TabulatedProfile, UniformProfile
from posthoc_ema.manifest import MANIFEST, own_description, read_manifest, rebuild_manifest
from posthoc_ema.profiles import GammaProfile
from posthoc_ema.snapshot import METADATA_KEY
from posthoc_ema.synthesis.plan import plan_synthesis
from posthoc_ema.tensor_files import TensorFile, read_header

CORPUS = Path(__file__).parents[1] / "corpus"
INPUTS = int(os.environ.get("PHEMA_FUZZ_INPUTS", "260000"))  # of each kind
EXAMPLES = 1500  # of hypothesis, of each kind
MOST_GROWTH = 64 << 20  # bytes of memory, over all inputs
PLANNED = 40  # one in so many accepted manifests is planned with: that costs milliseconds
REBUILT = 6  # one in so many headers goes on to the rebuilding of a manifest

# ---- mutations

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    64,
    2**31,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    0.04,
    0.2886751345948129,
    1e308,
    -1e308,
    1e-320,
    "@INF",
    "@NAN",
    "@BIG",
    "@DEEP",
    "@LONG",
    "",
    "\ud800",
    "a\ud800b",
    "\x00",
    "größe",
    "../x.safetensors",
    "/etc/passwd",
    "manifest.json",
    "a" * 300,
    "000000000010-raw.safetensors",
    "000000000010-sigma_rel-0.1.safetensors",
    "\u0661" * 12 + "-raw.safetensors",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "delta-float16",
    "delta-int8",
    "complex64",
    "F32",
    "I8",
    "BOOL",
    [],
    {},
    [[]],
    [{}],
    "__metadata__",
    [2**62, 2**62],
    [2**62, 2**62, 0],
    [0, 2**62, 2**62],
    [1] * 65,
    [10**400],
    [2],
    [2, 3],
    [0, 8],
    [8, 0],
    list(range(40)),
    [["000000000010-raw.safetensors", 1.0]],
    [["", 1e308]],
    [["", 10**400]],
    [[10, {"kind": "power", "sigma_rel": 0.05}, 1.0]],
    [[10, {"kind": "point"}, 10**400]],
    [[[], {}, 1]],
    [[1.5, [], 1]],
    {"kind": "point"},
    {"kind": "power", "sigma_rel": 0.1},
    {"kind": "gamma", "gamma": 1e308},
    {"kind": "gamma", "gamma": -0.5},
    {"kind": "uniform", "length": 5},
    {"kind": "uniform", "length": 1e-300},
    {"kind": "power", "sigma_rel": 1e-307},
    {"kind": "exponential", "half_life": 1e308, "interval": 1e-300, "warmup": True},
    {"kind": "exponential", "half_life": 1e-300, "interval": 5, "warmup": True},
    {"kind": "exponential", "half_life": 5, "interval": 5, "warmup": False},
    {"kind": "tabulated", "times": [0, 10], "tails": [1, 0]},
    {"kind": "tabulated", "times": [0, 5e-324, 10], "tails": [1, 1, 0]},
    {"kind": "tabulated", "times": ["@INF", "@NAN"], "tails": [1, 0]},
]
TEXTS = {  # what json.dumps cannot write
    '"@INF"': "1e999",
    '"@NAN"': "NaN",
    '"@BIG"': "9" * 5000,
    '"@DEEP"': "[" * 3000 + "]" * 3000,
    '"@LONG"': "0." + "1" * 5000,
}


def copied(value):
    """A copy that shares no list: one that came to hold itself would never end."""
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def places(value):
    """(container, key) of everything inside a JSON value."""
    found, left = [], [value]
    while left:
        node = left.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def change_value(value, rng):
    """One random edit inside a JSON value, in place."""
    spots = places(value)
    if not spots:
        return
    node, key = rng.choice(spots)
    match rng.randrange(7):
        case 0 | 1 | 2:
            node[key] = copied(rng.choice(VALUES))
        case 3:
            del node[key]
        case 4:  # something from elsewhere
            other, name = rng.choice(spots)
            node[key] = copied(other[name])
        case 5:
            new = copied(node[key])
            if isinstance(node, list):
                node.insert(rng.randrange(len(node) + 1), new)
            else:
                node[rng.choice(["x", "\ud800", "", "w:scales", "__metadata__", "format"])] = new
        case 6:
            number = node[key]
            if isinstance(number, int | float) and abs(number) < 1e300:
                node[key] = number + rng.choice((-1, 1, 0.5, 1e-9, 2**63, -(2**62)))


def change_text(text, rng):
    """Constants that Python does not write, keys that stand twice, and escapes, in JSON text."""
    for mark, instead in TEXTS.items():
        text = text.replace(mark, instead)
    if rng.random() < 0.03:
        at = text.find('"', rng.randrange(len(text)))
        end = text.find('":', at + 1)
        if 0 <= at < end:
            text = text[:at] + text[at:end] + '": 1, ' + text[at:]
    return text


def change_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(
                    (b"[", b"{", b'"', b"\\", b"}", b"]", b",", b"\xef\xbb\xbf", b"\\ud800")
                )
            case 2:
                del data[at : at + rng.choice((1, 1, 8, 64))]
            case 3:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randrange(1, 60)]
            case 4 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 5:
                data[at : at + 1] = b"%d" % rng.choice((0, 1, 9, 2**63, 10**30))
    return bytes(data)


def mutate_json(text, rng):
    """Bytes of a changed JSON text: a third by its bytes, the others by its values."""
    if rng.random() < 0.3:
        return change_bytes(text.encode(), rng)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return change_bytes(text.encode(), rng)
    if isinstance(value, dict | list):
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change_value(value, rng)
    ascii_only = rng.random() < 0.7
    new = change_text(json.dumps(value, ensure_ascii=ascii_only), rng)
    return new.encode("utf-8", "surrogatepass")


# ---- what is read

TABLE = TensorTable(
    {
        "w": TensorEntry("w", (3, 2), "float32", True),
        "b": TensorEntry("b", (), "bfloat16", True),
        "n": TensorEntry("n", (2,), "int64", False),
    },
    {"v": "w"},
)


def make_store(folder, codec="delta", times=(10, 20, 30)):
    """A store of every kind of profile that can stand in one."""

    def read(name):
        row = TABLE.entries[name]
        return (
            np.full(row.shape, 0.5, np.float32) if row.averaged else np.zeros(row.shape, np.int64)
        )

    with SnapshotStore.create(
        folder, clock="steps", table=TABLE, run_id="r", metadata={"a": "b"}
    ) as store:
        for t in times:
            profiles = [PowerProfile(t, 0.05), PowerProfile(t, 0.1), PointProfile(t)]
            if t == times[0]:
                profiles += [
                    GammaProfile(t, -0.5),
                    UniformProfile(5, t),
                    ExponentialProfile(t, 3.5, 1.0, True),
                    TabulatedProfile((0, 5, t), (0.9, 0.5, 0)),
                ]
            store.add(t, [NewAverage(p, codec, read) for p in profiles])
    return SnapshotStore.open(folder)


def use_manifest(folder, deep):
    """Everything that a reader does before the first tensor is read; returns how many headers fitted."""
    store = SnapshotStore.open(folder)
    records, fitting = store.records, 0
    assert (store.times, store.sigma_rels, store.averages, store.metadata) is not None
    again = json.loads(json.dumps(read_manifest(folder).to_json(), ensure_ascii=False).encode())
    assert [row["file"] for row in again["snapshots"]] == [r.file for r in records]
    by_file = {r.file: r for r in records}
    for record in records[:5]:
        path = store.path(record)
        assert path.parent == folder
        assert "\x00" not in record.file
        try:
            parts(by_file, record)
            file_coefficients(records, [record], np.ones((1, 1)))
            store.header(record)
            fitting += 1
        except PhemaError:
            pass
    dependents(records, records[:1])
    if records:
        file_coefficients(records, records, np.full((len(records), 2), 1 / len(records)))
        if deep:
            plan_synthesis(store, [0.07])
    return fitting


def has_unknown_keys(data):
    """The one difference: both ignore such keys, but safetensors refuses some of their values.

    (Numbers beyond float64, nesting deeper than 128.)
    """
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    rows = [row for name, row in header.items() if name != "__metadata__"]
    return any(set(row) - {"dtype", "shape", "data_offsets"} for row in rows)


def use_header(path, data):
    """Read a header; compare with the safetensors package; read the tensors."""
    try:
        header = read_header(path)
    except SnapshotFormatError:
        header = None
    try:
        theirs = {name: row["shape"] for name, row in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        theirs = None
    if header is not None:
        if theirs is not None or not has_unknown_keys(data):
            assert {n: list(i.shape) for n, i in header.tensors.items()} == theirs
        json.dumps([*header.tensors, header.metadata], ensure_ascii=False).encode()
        with TensorFile(path, header) as file:
            for name in header.tensors:
                file.read(name)
        if METADATA_KEY in header.metadata:
            own_description(path, header)
    return header, theirs


def mutate_header(data, rng):
    """A changed safetensors file: its length field, its header (as JSON), or its data."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    what = rng.random()
    if what < 0.08:
        length = rng.choice(
            (0, 1, 2**63, 2**64 - 1, length - 1, length + 1, length + 8, rng.randrange(2**32))
        )
        return struct.pack("<Q", length % 2**64) + header + body
    if what < 0.12:
        return data[: rng.randrange(len(data))] if what < 0.1 else data + b"x"
    text = header.decode("utf-8", "replace")
    if what < 0.45 and METADATA_KEY in text:  # its own description, JSON inside JSON
        try:
            value = json.loads(text)
            inner = value["__metadata__"][METADATA_KEY]
            changed = mutate_json(inner, rng).decode("utf-8", "replace")
            value["__metadata__"][METADATA_KEY] = changed
            new = json.dumps(value).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            new = change_bytes(header, rng)
    else:
        new = mutate_json(text, rng)
    if rng.random() < 0.1:
        body = body[: rng.randrange(len(body) + 1)]
    return struct.pack("<Q", len(new)) + new + body


class Place:
    """A file that gets one content after another; opening it anew each time takes most of the time."""

    def __init__(self, path):
        self.path, self._fd = path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def put(self, data):
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))


class Watch:
    """An audit hook: which files are used, while it is on."""

    EVENTS = (
        "open",
        "os.remove",
        "os.rename",
        "os.listdir",
        "os.scandir",
        "os.mkdir",
        "os.symlink",
        "os.truncate",
    )

    def __init__(self, folder):
        self.folder, self.on, self.outside = os.path.realpath(folder), False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if (
            self.on
            and event in self.EVENTS
            and args
            and isinstance(args[0], str | bytes | os.PathLike)
        ):
            path = os.path.normpath(Path.cwd() / os.fsdecode(args[0]))
            if os.path.commonpath([self.folder, path]) != self.folder:
                self.outside.append((event, path))


def fuzz_manifests(folder, seed, count):
    """Returns how many inputs were accepted, and how many headers fitted to what they say."""
    rng = random.Random(seed)
    store = make_store(folder / "s")
    texts = [p.read_text("utf-8") for p in sorted((CORPUS / "manifests").iterdir())]
    texts = [
        *(t for t in texts if len(t) < 8000),
        *[(store.folder / MANIFEST).read_text("utf-8")] * 16,
    ]
    place, watch = Place(store.folder / MANIFEST), Watch(folder)
    accepted = fitting = longest = 0
    usual = None
    for i in range(count):
        data = mutate_json(rng.choice(texts), rng)
        place.put(data)
        watch.on = True
        try:
            fitting += use_manifest(store.folder, deep=accepted % PLANNED == 0)
            accepted += 1
        except PhemaError as error:
            longest = max(longest, len(str(error)))
        except BaseException as error:
            watch.on = False
            raise AssertionError(f"input {data!r}") from error
        watch.on = False
        if i == count // 20:  # caches and pools are filled
            usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert not watch.outside, watch.outside[:3]
    assert longest < 4000  # a message is for people, whatever the file holds
    check_memory(usual)
    return accepted, fitting


def fuzz_headers(folder, seed, count):
    """Returns how many headers were accepted, and how many manifests were made from them."""
    rng = random.Random(seed)
    store = make_store(folder / "s", times=(10, 20))
    seeds = [p.read_bytes() for p in sorted((CORPUS / "headers").iterdir())]
    own = [store.path(record).read_bytes() for record in store.records]
    places = [Place(store.path(record)) for record in (store.records[0], store.records[-1])]
    single = Place(folder / "x.safetensors")
    watch = Watch(folder)
    accepted = rebuilt = 0
    usual = None
    for i in range(count):
        data = mutate_header(rng.choice(seeds if i % 2 else own), rng)
        place = rng.choice(places) if i % REBUILT == 0 else single
        place.put(data)
        watch.on = True
        try:
            accepted += use_header(place.path, data)[0] is not None
            if place is not single:
                rebuild_manifest(store.folder)
                rebuilt += 1
        except PhemaError:
            pass
        except BaseException as error:
            watch.on = False
            raise AssertionError(f"input {data!r}") from error
        watch.on = False
        if i == count // 20:
            usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert not watch.outside, watch.outside[:3]
    check_memory(usual)
    return accepted, rebuilt


def check_memory(usual):
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - usual
    assert grown < MOST_GROWTH, grown


def start(what, seed, count, folder):
    code = (
        "import importlib.util, resource, sys, warnings\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('fuzzing', sys.argv[1])\n"
        "fuzzing = importlib.util.module_from_spec(spec); spec.loader.exec_module(fuzzing)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "np.seterr(divide='raise', over='raise', invalid='raise')\n"
        "warnings.simplefilter('error')\n"
        "print(*getattr(fuzzing, sys.argv[2])(Path(sys.argv[5]), int(sys.argv[3]), int(sys.argv[4])))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, __file__, what, str(seed), str(count), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["fuzz_manifests", "fuzz_headers"])
def test_mutated_files_raise_only_our_errors(tmp_path, what):
    process = start(what, 0, INPUTS, tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err[-5000:]
    accepted, further = (int(number) for number in out.split())
    print(f"{what}: {INPUTS} inputs, {accepted} accepted, {further} used further")
    # the inputs reach the inside
    assert accepted > INPUTS // 20
    assert further > INPUTS // 100


# ---- structures that no mutation of a store makes

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(VALUES),
)
structures = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
searched = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def one_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("fuzz") / "s")


@searched
@given(st.data(), structures)
def test_any_structure_in_a_manifest_raises_only_our_errors(one_store, data, structure):
    path = one_store.folder / MANIFEST
    original = path.read_bytes()
    value = json.loads(original)
    container, key = data.draw(st.sampled_from(places(value)))
    container[key] = structure
    new = value if data.draw(st.booleans()) else structure
    path.write_bytes(json.dumps(new).encode())
    try:
        use_manifest(one_store.folder, deep=False)
    except PhemaError:
        pass
    finally:
        path.write_bytes(original)


@searched
@given(st.data(), structures)
def test_any_structure_in_a_header_raises_only_our_errors(one_store, data, structure):
    path = one_store.folder / "x.safetensors"
    content = (CORPUS / "headers" / "plain.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    value = json.loads(content[8 : 8 + length])
    container, key = data.draw(st.sampled_from(places(value)))
    container[key] = structure
    text = json.dumps(value if data.draw(st.booleans()) else structure).encode()
    new = struct.pack("<Q", len(text)) + text + content[8 + length :]
    path.write_bytes(new)
    try:
        use_header(path, new)
    finally:
        path.unlink()
