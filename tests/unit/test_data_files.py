"""Folders and zips of images and latents: the EDM2 layout, plain folders, and what is refused."""

import json
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from posthoc_ema.errors import ConfigError
from reference_trainer.config import DataConfig
from reference_trainer.data import load_dataset

from . import data_sets as ds

IMAGES = ds.pictures(12)
LABELS = np.arange(12) % 5


@pytest.fixture(params=["folder", "zip", "deflated zip"])
def stored(request, tmp_path):
    """The same data set in every container."""

    def write(files):
        if request.param == "folder":
            return ds.write_folder(tmp_path / "set", files)
        method = zipfile.ZIP_DEFLATED if "deflated" in request.param else zipfile.ZIP_STORED
        return ds.write_zip(tmp_path / "set.zip", files, method)

    return write


def test_the_edm2_layout_is_read_in_order_with_its_labels(stored):
    dataset = load_dataset(str(stored(ds.edm2_files(IMAGES, LABELS))))
    assert (dataset.name, dataset.kind, len(dataset)) == ("set", "pixels", 12)
    assert (dataset.resolution, dataset.channels, dataset.label_dim) == (8, 3, 5)
    values, labels = dataset.read(np.array([7, 0, 11]))
    assert np.array_equal(values, IMAGES[[7, 0, 11]])
    assert values.dtype == np.uint8
    assert labels.tolist() == LABELS[[7, 0, 11]].tolist()
    assert dataset.labels.tolist() == LABELS.tolist()


def test_latents_of_mean_and_standard_deviation_have_half_the_channels(stored):
    values = ds.pictures(6, channels=8).astype(np.float32)
    dataset = load_dataset(str(stored(ds.edm2_files(values, None, "img-mean-std-", "npy"))))
    assert (dataset.kind, dataset.channels, dataset.label_dim) == ("latents", 4, 0)
    assert np.array_equal(dataset.read(np.arange(6))[0], values)


def test_other_latents_have_all_their_channels(stored):
    values = ds.pictures(6, channels=4).astype(np.float16)
    dataset = load_dataset(str(stored(ds.edm2_files(values, None, "z", "npy"))))
    assert (dataset.channels, dataset.read(np.arange(2))[0].dtype) == (4, np.float32)


def test_the_fingerprint_is_of_the_content_not_of_the_container(tmp_path):
    files = ds.edm2_files(IMAGES, LABELS)
    paths = (ds.write_folder(tmp_path / "a", files), ds.write_zip(tmp_path / "b.zip", files))
    first, second = (load_dataset(str(path)).fingerprint for path in paths)
    other = ds.edm2_files(IMAGES, LABELS[::-1])
    assert first == second != load_dataset(str(ds.write_zip(tmp_path / "c.zip", other))).fingerprint


def test_without_a_labels_file_the_top_folders_are_the_classes(stored):
    files = {
        f"{kind}/deep/{i}.png": ds.png(IMAGES[0, 0]) for kind in ("dog", "cat") for i in (1, 2)
    }
    dataset = load_dataset(str(stored(files)))
    assert (dataset.labels.tolist(), dataset.label_dim, dataset.channels) == ([0, 0, 1, 1], 2, 1)


@pytest.mark.parametrize(
    "names",
    [
        ["00000/img00000000.png", "00001/img00001000.png"],  # EDM2's folders only count
        ["a/1.png", "2.png"],
        ["1.png", "2.png"],
    ],
)
def test_folders_that_are_no_classes_give_no_labels(tmp_path, names):
    path = ds.write_folder(tmp_path / "set", {name: ds.png(IMAGES[0, 0]) for name in names})
    assert load_dataset(str(path)).label_dim == 0


def test_labels_null_means_none_even_with_folders(tmp_path):
    files = {"a/1.png": ds.png(IMAGES[0, 0]), "dataset.json": b'{"labels": null}'}
    assert load_dataset(str(ds.write_folder(tmp_path / "set", files))).label_dim == 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_image_formats(tmp_path, suffix):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(tmp_path / "set" / f"x.{suffix}")
    values, _ = load_dataset(str(tmp_path / "set")).read(np.zeros(1, np.int64))
    assert np.abs(values.astype(int) - 77).max() <= 3


def test_palettes_and_bilevel_images_are_rgb_and_gray(tmp_path):
    image = Image.fromarray(IMAGES[0].transpose(1, 2, 0))
    for mode, channels in (("P", 3), ("1", 1)):
        folder = tmp_path / mode
        folder.mkdir()
        image.convert(mode).save(folder / "x.png")
        assert load_dataset(str(folder)).channels == channels


def test_a_configuration_names_the_data_by_its_path(tmp_path):
    path = ds.write_zip(tmp_path / "a.zip", ds.edm2_files(IMAGES))
    assert load_dataset(DataConfig(name="mine", path=str(path))).name == "mine"


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    files = {**ds.edm2_files(IMAGES), ".hidden/x.png": b"", "notes.txt": b"", "00000/.x.png": b""}
    assert len(load_dataset(str(ds.write_folder(tmp_path / "set", files)))) == 12


# ---- what is refused


GOOD = ds.edm2_files(IMAGES, LABELS)
NAME = "00000/img00000003.png"


def relabelled(value):
    return {**GOOD, "dataset.json": json.dumps({"labels": value}).encode()}


def rows(**changes):
    table = {**dict(json.loads(GOOD["dataset.json"])["labels"]), **changes}
    return relabelled([list(row) for row in table.items()])


BROKEN = {
    "no image": (b"hello", f"{NAME} is no image that can be read"),
    "empty": (b"", f"{NAME} is no image that can be read"),
    "cut": (GOOD[NAME][:-60], f"{NAME} is damaged: its pixels cannot be decoded"),
    "wrong size": (
        ds.png(ds.pictures(1, 16)[0].transpose(1, 2, 0)),
        f"{NAME} is 16x16, the others are 8x8",
    ),
    "gray": (ds.png(IMAGES[0, 0]), f"{NAME} has 1 channels, the first item has 3"),
    "alpha": (
        ds.png(ds.pictures(1, 8, 4)[0].transpose(1, 2, 0)),
        f"{NAME} has 4 channels of mode RGBA",
    ),
    "16 bit": (ds.png(np.zeros((8, 8), np.uint16)), f"{NAME} has 1 channels of mode I;16"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_named_when_it_is_read(stored, data, message):
    dataset = load_dataset(str(stored({**GOOD, NAME: data})))
    with pytest.raises(ConfigError, match=message):
        dataset.read(np.arange(12))


SETS = {
    "empty": ({}, "holds no images"),
    "only labels": ({"dataset.json": b"{}"}, "holds no images"),
    "not square": (
        {"x.png": ds.png(np.zeros((8, 4), np.uint8))},
        "x.png is 4x8; items must be square",
    ),
    "no power of two": (
        {"x.png": ds.png(np.zeros((6, 6), np.uint8))},
        "side that is a power of two",
    ),
    "images and latents": ({**GOOD, "x.npy": ds.npy(np.zeros(3))}, "holds images and latents"),
    "a label is missing": (
        relabelled([["00000/img00000000.png", 1]]),
        "no label for .*1.png. Add it",
    ),
    "negative label": (
        rows(**{NAME: -1}),
        f"{NAME}: a label must be an integer in 0..1048575, got -1",
    ),
    "huge label": (rows(**{NAME: 10**9}), "got 1000000000"),
    "label of many numbers": (rows(**{NAME: [0.5, 0.5]}), r"got \[0.5, 0.5\]"),
    "label true": (rows(**{NAME: True}), "got True"),
    "labels no list": (relabelled(3), "dataset.json must be"),
    "labels no pairs": (relabelled([["a"]]), "dataset.json must be"),
    "no json": ({**GOOD, "dataset.json": b"{"}, "dataset.json must be"),
    "labels file no table": ({**GOOD, "dataset.json": b"[]"}, "dataset.json must be"),
    "odd latents": (
        {"img-mean-std-00000000.npy": ds.npy(np.zeros((3, 4, 4), np.float32))},
        "as many standard deviations, got 3 channels",
    ),
    "latents with and without": (
        {n: ds.npy(np.zeros((8, 4, 4), np.float32)) for n in ("a.npy", "img-mean-std-0.npy")},
        "some files are named img-mean-std-",
    ),
    "integers": ({"a.npy": ds.npy(np.zeros((4, 4, 4), int))}, "a.npy must hold floats of shape"),
    "flat": ({"a.npy": ds.npy(np.zeros(16))}, r"got float64 of shape \(16,\)"),
    "nan": (
        {"a.npy": ds.npy(np.full((4, 4, 4), np.nan))},
        "a.npy holds numbers that are not finite",
    ),
    "no npy": ({"a.npy": b"x"}, "a.npy is no .npy file"),
}


@pytest.mark.parametrize(("files", "message"), SETS.values(), ids=SETS)
def test_a_broken_data_set_is_refused_at_once(stored, files, message):
    if not files:
        files = {"readme.txt": b"nothing"}
    with pytest.raises(ConfigError, match=message):
        load_dataset(str(stored(files)))


def test_pickled_arrays_are_not_loaded(tmp_path):
    (tmp_path / "set").mkdir()
    np.save(tmp_path / "set" / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"a.npy is no .npy file of numbers"):
        load_dataset(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"]
)
def test_a_zip_with_a_path_outside_is_refused(tmp_path, name):
    path = ds.write_zip(tmp_path / "a.zip", {**GOOD, name: GOOD[NAME]})
    with pytest.raises(ConfigError, match="a path outside of the zip"):
        load_dataset(str(path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("a.png", GOOD[NAME])
    with pytest.raises(ConfigError, match=r"'a.png' twice"):
        load_dataset(str(path))


def test_a_zip_packed_by_another_method_says_how_to_pack(tmp_path):
    path = ds.write_zip(tmp_path / "a.zip", GOOD, zipfile.ZIP_BZIP2)
    with pytest.raises(ConfigError, match="without compression"):
        load_dataset(str(path))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_entry_is_named(tmp_path, method):
    path = ds.write_zip(tmp_path / "a.zip", GOOD, method)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(NAME)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(NAME) + info.compress_size // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"'{NAME}' is damaged"):
        load_dataset(str(path)).read(np.arange(12))


def test_a_local_header_with_a_long_extra_field_is_read(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a.png")
        info.extra = struct.pack("<HH", 0xCAFE, 5000) + bytes(5000)
        archive.writestr(info, GOOD[NAME])
    assert np.array_equal(load_dataset(str(path)).read(np.zeros(1, np.int64))[0][0], IMAGES[3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist. Check the path."),
        (lambda p: p.write_bytes(b"PK not really"), "is no zip that can be read"),
        (
            lambda p: p.write_bytes(ds.write_zip(p, GOOD).read_bytes()[:-300]),
            "is no zip that can be read",
        ),
    ],
    ids=["missing", "other", "cut"],
)
def test_a_path_that_is_no_data_is_refused(tmp_path, make, message):
    path = tmp_path / "a.zip"
    make(path)
    with pytest.raises(ConfigError, match=message):
        load_dataset(str(path))


def test_a_file_that_went_away_is_named(tmp_path):
    dataset = load_dataset(str(ds.write_folder(tmp_path / "set", GOOD)))
    (tmp_path / "set" / NAME).unlink()
    with pytest.raises(ConfigError, match=f"{NAME}: cannot be read: No such file"):
        dataset.read(np.array([3]))


def test_links_are_followed_to_files(tmp_path):
    (tmp_path / "real.png").write_bytes(GOOD[NAME])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "real.png")
    assert len(load_dataset(str(tmp_path / "set"))) == 1
