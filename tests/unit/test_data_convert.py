"""Conversion: the crop, the layout that is written, and going on after an interruption."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from posthoc_ema.errors import ConfigError, SnapshotWriteError
from reference_trainer.data import load_dataset
from reference_trainer.data.conversion import ConversionOptions, convert
from reference_trainer.data.crop import adm_crop, center_crop, crop_image
from reference_trainer.data.loading import open_items

from . import data_sets as ds

SIDE8 = ConversionOptions(resolution=8)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width, height):
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


# ---- crop


@pytest.mark.parametrize(
    ("width", "height"), [(64, 40), (40, 64), (37, 91), (16, 16), (9, 200), (8, 8)]
)
@pytest.mark.parametrize("crop", ["adm", "center"])
def test_crops_have_the_asked_size(width, height, crop):
    assert crop_image(picture(width, height), 8, crop).size == (8, 8)


def halved(pixels):
    """Means of neighbouring columns, then of rows, each rounded to 8 bits."""
    h, w, c = pixels.shape
    columns = np.floor(pixels.reshape(h, w // 2, 2, c).mean(2) + 0.5)
    return np.floor(columns.reshape(h // 2, 2, w // 2, c).mean(1) + 0.5)


def test_adm_crop_halves_by_boxes_while_the_image_is_twice_as_large():
    image = picture(32, 32)
    expected = halved(halved(np.asarray(image, float)))
    assert np.array_equal(np.asarray(adm_crop(image, 8), float), expected)


def test_adm_crop_cuts_out_the_middle_of_the_longer_side():
    pixels = np.asarray(adm_crop(gradient(96, 64), 32), float)
    # Halved once: 48x32; columns 8 to 40 stay, each the mean of two.
    assert pixels[:, :, 0].mean(0) == pytest.approx(2 * np.arange(8, 40) + 0.5, abs=0.51)
    assert pixels[:, :, 1].mean(1) == pytest.approx(2 * np.arange(32) + 0.5, abs=0.51)


def test_adm_crop_resizes_bicubically_what_is_left():
    image = picture(15, 15)
    assert np.array_equal(adm_crop(image, 8), image.resize((8, 8), Image.Resampling.BICUBIC))


def test_center_crop_takes_the_largest_square():
    pixels = np.asarray(center_crop(gradient(96, 64), 64))
    assert (pixels[0, 0, 0], pixels[0, -1, 0]) == (16, 79)


# ---- convert


@pytest.fixture
def photographs(tmp_path):
    """Images of many sizes and kinds in folders of classes."""
    for i, kind in enumerate(("dog", "cat")):
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        for k in range(7):
            picture(20 + 3 * k, 30 - i, seed=k).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")
    picture(20, 20).convert("CMYK").save(tmp_path / "photos" / "cat" / "x.jpg")
    picture(20, 20).convert("RGBA").save(tmp_path / "photos" / "cat" / "y.webp")
    return tmp_path / "photos"


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_the_result_is_a_data_set_in_the_edm2_layout(photographs, tmp_path, name):
    written = convert(open_items(str(photographs)), tmp_path / name, SIDE8)
    assert (written.num_items, written.already, written.label_dim) == (16, 0, 2)
    dataset = load_dataset(str(tmp_path / name))
    assert (dataset.resolution, dataset.channels) == (8, 3)
    assert dataset.labels.tolist() == [0] * 9 + [1] * 7
    with Image.open(photographs / "cat" / "4.png") as image:
        expected = np.asarray(adm_crop(image, 8)).transpose(2, 0, 1)
    assert np.array_equal(dataset.read(np.array([4]))[0][0], expected)
    if name == "out.zip":
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
            names = archive.namelist()
        assert names[:2] == ["00000/img00000000.png", "00000/img00000001.png"]
        assert names[-1] == "dataset.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "photos"])


def test_a_folder_and_a_zip_hold_the_same(photographs, tmp_path):
    for name in ("out", "out.zip"):
        convert(open_items(str(photographs)), tmp_path / name, SIDE8)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        for name in archive.namelist():
            assert archive.read(name) == (tmp_path / "out" / name).read_bytes()


def test_more_entries_than_a_plain_zip_can_count(tmp_path):
    """65 535 entries are the limit without the zip64 records."""
    from reference_trainer.data.conversion import pixel_name
    from reference_trainer.data.output import labels_table, open_output

    with open_output(tmp_path / "a.zip", pixel_name, 70_000, {}) as output:
        for i in range(70_000):
            output.add(b"%d" % i)
        output.finish(labels_table([], None, {}))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == 70_001
        assert archive.read(pixel_name(69_999)) == b"69999"


def test_labels_of_a_file_replace_those_of_the_folders(photographs, tmp_path):
    names = [str(p.relative_to(photographs)) for p in sorted(photographs.rglob("*.*"))]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"labels": [[name, 7] for name in names]}))
    convert(open_items(str(photographs), labels), tmp_path / "out.zip", SIDE8)
    assert set(load_dataset(str(tmp_path / "out.zip")).labels.tolist()) == {7}
    labels.write_text('{"labels": [["a", 1]]}')
    with pytest.raises(ConfigError, match=r"has no label for cat/0\.png"):
        open_items(str(photographs), labels)


def test_gray_is_one_channel(photographs, tmp_path):
    convert(
        open_items(str(photographs)), tmp_path / "a", ConversionOptions(resolution=4, mode="gray")
    )
    assert load_dataset(str(tmp_path / "a")).channels == 1


def test_an_image_that_cannot_be_read_is_named(photographs, tmp_path):
    (photographs / "dog" / "2.png").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"dog/2.png is no image that can be read"):
        convert(open_items(str(photographs)), tmp_path / "a.zip", SIDE8)
    options = ConversionOptions(resolution=32, crop="none")
    with pytest.raises(
        ConfigError, match=r"cat/0.png: it is 20x29 and not 32x32. Choose --crop adm"
    ):
        convert(open_items(str(photographs)), tmp_path / "b.zip", options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "resolution must be a power of two, got 48"),
        ({"crop": "left"}, "crop must be one of adm, center, none, got 'left'"),
        ({"mode": "cmyk"}, "mode must be one of rgb, gray, got 'cmyk'"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        ConversionOptions(**{"resolution": 8, **changes})


# ---- going on


class Stop(Exception):
    pass


def interrupted_at(count):
    def progress(done, total):
        if done == count:
            raise Stop

    return progress


def contents(path):
    if path.suffix == ".zip":
        return path.read_bytes()
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_interrupted_conversions_go_on_and_end_the_same(photographs, tmp_path, name):
    items = open_items(str(photographs))
    convert(items, tmp_path / "whole" / name, SIDE8)
    for count in (3, 4, 11):
        with pytest.raises(Stop):
            convert(items, tmp_path / name, SIDE8, interrupted_at(count))
        if name == "out.zip":
            assert not (tmp_path / name).exists()
    assert convert(items, tmp_path / name, SIDE8).already == 11
    assert contents(tmp_path / name) == contents(tmp_path / "whole" / name)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_a_complete_data_set_is_left_alone(photographs, tmp_path, name):
    items = open_items(str(photographs))
    convert(items, tmp_path / name, SIDE8)
    before = (tmp_path / name).stat().st_mtime_ns
    assert convert(items, tmp_path / name, SIDE8).already == 16
    assert (tmp_path / name).stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="exists and is not what this command would make"):
        convert(items, tmp_path / name, ConversionOptions(resolution=4))


def test_a_part_of_another_conversion_is_not_continued(photographs, tmp_path):
    items = open_items(str(photographs))
    for name in ("out", "out.zip"):
        with pytest.raises(Stop):
            convert(items, tmp_path / name, SIDE8, interrupted_at(5))
    other = ConversionOptions(resolution=8, crop="center")
    with pytest.raises(ConfigError, match="holds a part of another data set"):
        convert(items, tmp_path / "out", other)
    assert convert(items, tmp_path / "out.zip", other).already == 0  # it was a hidden file of ours
    convert(items, tmp_path / "whole.zip", other)
    assert (tmp_path / "whole.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_something_else_in_the_place_is_left_alone(photographs, tmp_path, name):
    if name == "out":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("x")
    else:
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match="exists and is not what this command would make"):
        convert(open_items(str(photographs)), tmp_path / name, SIDE8)


def test_two_at_a_time_are_refused(photographs, tmp_path):
    items = open_items(str(photographs))

    def again(done, total):
        with pytest.raises(ConfigError, match="is being written by another process"):
            convert(items, tmp_path / "a.zip", SIDE8)
        raise Stop

    with pytest.raises(Stop):
        convert(items, tmp_path / "a.zip", SIDE8, again)


def test_a_folder_that_may_not_be_written_is_named(photographs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotWriteError, match="could not be written"):
        convert(open_items(str(photographs)), tmp_path / "file" / "a.zip", SIDE8)


def test_latents_cannot_be_converted(tmp_path):
    ds.write_folder(tmp_path / "z", {"a.npy": ds.npy(np.zeros((4, 4, 4), np.float32))})
    with pytest.raises(ConfigError, match="holds latents; only images can be converted"):
        convert(open_items(str(tmp_path / "z")), tmp_path / "a.zip", SIDE8)
