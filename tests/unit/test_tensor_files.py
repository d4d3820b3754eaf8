from __future__ import annotations

import errno
import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from posthoc_ema import SnapshotFormatError, SnapshotWriteError
from posthoc_ema.tensor_files import (
    TensorFile,
    TensorFileWriter,
    atomic_write,
    is_temporary_name,
    read_header,
    write_json,
    write_tensors,
)

TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "größe": np.float16([1.5, -2.0]),
    "steps": np.int64(70001),
    "mask": np.array([True, False, True]),
    "none": np.zeros((0, 4), dtype=np.float64),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"who": "me"})
    return tmp_path / "x.safetensors"


def craft(path, header, data=b"", length=None):
    """A file of any header, as text, bytes or a table."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def row(start, end, dtype="F32", shape=None):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def read_all(file):
    return [file.read(name) for name in file.header.tensors]


def interrupted_write(path):
    with TensorFileWriter(path, [("a", "float32", (2,))]) as writer:
        writer.write("a", np.zeros(2, dtype=np.float32))
        raise KeyError


def test_safetensors_package_reads_what_is_written(path):
    read = safetensors.numpy.load_file(path)
    assert set(read) == set(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(read[name], array)
        assert (read[name].dtype, read[name].shape) == (array.dtype, np.shape(array))
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_files_of_the_safetensors_package_are_read(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file({n: np.asarray(a) for n, a in TENSORS.items()}, path, {"a": "b"})
    with TensorFile(path) as file:
        assert file.header.metadata == {"a": "b"}
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(file.read(name), array)


def test_same_tensors_give_the_same_bytes(path, tmp_path):
    """The metadata of the safetensors package changes its order from call to call."""
    for i in range(3):
        write_tensors(tmp_path / f"{i}", TENSORS, {"who": "me"})
        assert (tmp_path / f"{i}").read_bytes() == path.read_bytes()


def test_data_is_aligned_to_the_element_size(path):
    for info in read_header(path).tensors.values():
        assert info.start % info.itemsize == 0
        assert info.size == np.size(TENSORS[info.name])


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_mode_of_a_file_follows_the_umask(tmp_path, mask, mode):
    """Temporary files of the tempfile module are 0600 whatever the umask: others could not read."""
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "x", TENSORS)
        write_json(tmp_path / "y", {})
    finally:
        os.umask(before)
    for name in ("x", "y"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_pieces_may_be_written_in_any_order(tmp_path):
    layout = [("a", "float32", (4,)), ("b", "bfloat16", (3,))]
    with TensorFileWriter(tmp_path / "x", layout, {"k": "0000"}) as writer:
        writer.write("b", np.uint16([2, 3]), offset=1)
        writer.write("a", np.float32([3, 4]), offset=2)
        writer.write("a", np.float32([1, 2]))
        writer.write("b", np.uint16([1]))
        writer.set_metadata({"k": "1111"})
        assert names_in(tmp_path) != ["x"]
    with TensorFile(tmp_path / "x") as file:
        assert file.read("a").tolist() == [1, 2, 3, 4]
        assert file.read("b").tolist() == [1, 2, 3]
        assert file.header.metadata["k"] == "1111"
        assert file.header.checksum == writer.header_checksum
        assert file.header.file_bytes == writer.file_bytes == (tmp_path / "x").stat().st_size


def test_file_without_tensors_is_a_file(tmp_path):
    write_tensors(tmp_path / "x", {})
    assert read_header(tmp_path / "x").tensors == {}
    assert safetensors.numpy.load_file(tmp_path / "x") == {}


def test_truncated_file_is_refused_wherever_it_is_cut(path):
    content = path.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 13, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(SnapshotFormatError, match=r"x\.safetensors: .*cut short"):
            read_header(path)


def test_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(SnapshotFormatError, match="its header describes"):
        read_header(path)


def test_file_that_shrinks_while_it_is_read_is_refused(path):
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 20)
        with pytest.raises(SnapshotFormatError, match="became shorter"):
            read_all(file)


def test_every_bit_of_the_header_matters(path):
    """A flipped bit is refused, or read as another name or number: never as the same header."""
    content, whole = path.read_bytes(), read_header(path)
    length = int.from_bytes(content[:8], "little")
    for position in range(0, 8 + length, 5):
        for bit in (0, 3, 6):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                header = read_header(path)
            except SnapshotFormatError:
                continue
            assert header.checksum != whole.checksum


HOSTILE = {
    "overlap": ({"a": row(0, 8), "b": row(4, 12)}, b"\0" * 12, "does not follow"),
    "hole": ({"a": row(0, 4), "b": row(8, 12)}, b"\0" * 12, "does not follow"),
    "gap at the start": ({"a": row(4, 8)}, b"\0" * 8, "does not follow"),
    "data beyond": ({"a": row(0, 4)}, b"\0" * 8, "its header describes"),
    "huge offsets": ({"a": row(0, 2**62, shape=[2**60])}, b"", "its header describes"),
    "overflowing shape": ({"a": row(0, 4, shape=[2**62, 2**62])}, b"\0" * 4, "malformed"),
    "offset beyond int64": ({"a": row(0, 2**70)}, b"", "malformed"),
    "negative": ({"a": row(-4, 0, shape=[1])}, b"", "malformed"),
    "backwards": ({"a": row(4, 0, shape=[1])}, b"\0" * 4, "needs 4 bytes"),
    "fraction": ({"a": row(0, 4, shape=[1.0])}, b"\0" * 4, "malformed"),
    "bool": ({"a": row(0, 4, shape=[True])}, b"\0" * 4, "malformed"),
    "wrong size": ({"a": row(0, 8, shape=[3])}, b"\0" * 8, "needs 12 bytes and has 8"),
    "unknown dtype": ({"a": row(0, 4, "F7")}, b"\0" * 4, "malformed"),
    "dtype is a list": ({"a": {**row(0, 4), "dtype": []}}, b"\0" * 4, "malformed"),
    "no offsets": ({"a": {"dtype": "F32", "shape": []}}, b"", "malformed"),
    "row is a number": ({"a": 3}, b"", "malformed"),
    "too many dimensions": ({"a": row(0, 4, shape=[1] * 65)}, b"\0" * 4, "malformed"),
    "metadata is a list": ({"__metadata__": []}, b"", "map of strings"),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, b"", "map of strings"),
    "a list": ("[]", b"", "not a table"),
    "not json": ("{", b"", "not JSON"),
    "not utf-8": (b"\xff\xfe{}", b"", "not JSON"),
    "duplicate key": (
        '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "not JSON",
    ),
    "deep nesting": ("[" * 200_000, b"", "not JSON"),
    "long number": ('{"a":' + "9" * 6000 + "}", b"", "not JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused(tmp_path, case):
    header, data, message = HOSTILE[case]
    path = craft(tmp_path / "x.safetensors", header, data)
    with pytest.raises(SnapshotFormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [3, 10**6, 10**9, 2**63, 2**64 - 1])
def test_announced_header_length_is_checked_before_memory_is_taken(tmp_path, length):
    path = craft(tmp_path / "x", "{}", length=length)
    with pytest.raises(SnapshotFormatError, match="do not hold the header"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"\0" * 400, b"\x80\x02}q\x00." * 50, b"notes\n" * 40, b"\0" * 64]
)
def test_foreign_file_is_refused_by_name(tmp_path, content):
    """ema-pytorch dies of the zip error or int('notes') of a stray file, and names none."""
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SnapshotFormatError, match="x: not a readable safetensors file"):
        read_header(tmp_path / "x")


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(SnapshotFormatError, match=str(path)):
            read_header(path)


def test_error_while_writing_leaves_the_old_file_and_no_temporary_one(path):
    before = path.read_bytes()
    with pytest.raises(KeyError):
        interrupted_write(path)
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["write", "pwrite", "ftruncate", "fsync", "open"])
def test_failing_system_call_is_a_write_error(path, monkeypatch, call):
    """mergekit finishes its index while an exception is on its way; here nothing half-done stays."""
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(SnapshotWriteError, match=r"No space left.*Make room.*untouched"):
            (write_json if call == "write" else write_tensors)(
                path, TENSORS if call != "write" else {}
            )
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


def test_folder_that_is_missing_is_a_write_error(tmp_path):
    with pytest.raises(SnapshotWriteError, match="Check the folder"):
        write_tensors(tmp_path / "no" / "x", TENSORS)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """A write may take fewer bytes than it was given, for example at 2 GiB."""
    whole, pwrite, write = np.arange(1000, dtype=np.float32), os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:777], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    write_tensors(tmp_path / "x", {"w": whole})
    write_json(tmp_path / "y", {"a": "b" * 100})
    monkeypatch.undo()
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x")["w"], whole)
    assert json.loads((tmp_path / "y").read_text()) == {"a": "b" * 100}


def test_short_reads_are_continued(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    with TensorFile(path) as file:
        np.testing.assert_array_equal(file.read("w"), TENSORS["w"])


def test_writing_is_synced_before_the_name_appears(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    rename = os.rename
    monkeypatch.setattr(os, "replace", lambda *a, **k: calls.append("rename") or replace(*a, **k))
    monkeypatch.setattr(os, "rename", lambda *a, **k: calls.append("rename") or rename(*a, **k))
    with atomic_write(path) as descriptor:
        os.write(descriptor, b"x")
    assert calls == ["fsync", "rename", "fsync"]


def test_only_names_of_this_tool_count_as_temporary():
    assert is_temporary_name(".tmp-manifest.json-0123abcd")
    for name in (".tmp-", ".tmp-notes", "tmp-x-0123abcd", ".tmp-x-0123ABCD", "x"):
        assert not is_temporary_name(name)
