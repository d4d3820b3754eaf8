"""Laws of the data package: order, threads, ranks, resumption, and zips cut anywhere."""

import io
import json
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reference_trainer.data import batch_indices, load_dataset
from reference_trainer.data.archive import is_inside
from reference_trainer.data.conversion import ConversionOptions, convert, pixel_name
from reference_trainer.data.loading import open_items
from reference_trainer.data.output import open_output
from reference_trainer.data.reading import ItemReader, ordered

COUNT = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("laws") / "set.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(COUNT):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(buffer, "png")
            archive.writestr(pixel_name(i), buffer.getvalue())
    return load_dataset(str(path))


@given(order=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=80))
@settings(max_examples=30, deadline=None)
def test_items_read_by_threads_are_those_read_one_by_one(dataset, order):
    reader = ItemReader(dataset)
    try:
        values, labels = reader.begin(np.array(order)).result()
    finally:
        reader.close()
    expected = np.concatenate([dataset.read(np.array([i]))[0] for i in order])
    assert np.array_equal(values.numpy(), expected)
    assert labels.tolist() == [0] * len(order)


def test_many_threads_at_one_zip_read_what_one_reads(dataset):
    expected, _ = dataset.read(np.arange(COUNT))
    orders = [np.random.default_rng(k).permutation(COUNT) for k in range(64)]
    with ThreadPoolExecutor(16) as pool:
        for order, (values, _) in zip(orders, pool.map(dataset.read, orders), strict=True):
            assert np.array_equal(values, expected[order])


@given(count=st.integers(0, 60), ahead=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_results_of_threads_come_in_order(count, ahead):
    assert list(ordered(lambda i: i * i, range(count), ahead)) == [i * i for i in range(count)]


@given(
    items=st.integers(1, 40),
    batch=st.integers(1, 16),
    steps=st.integers(1, 20),
    resumed=st.integers(0, 19),
    seed=st.integers(0, 2**40),
)
def test_a_run_resumed_at_any_image_draws_the_same(items, batch, steps, resumed, seed):
    whole = [batch_indices(items, k * batch, batch, seed) for k in range(steps)]
    for k in range(min(resumed, steps - 1), steps):
        assert np.array_equal(batch_indices(items, k * batch, batch, seed), whole[k])
    counts = np.bincount(np.concatenate(whole), minlength=items)
    assert counts.max() - counts.min() <= 1  # every epoch holds each item once


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """What a conversion leaves that was killed, and what it makes when it was not."""
    folder = tmp_path_factory.mktemp("partial")
    data = [bytes([i]) * (7 * i % 40) for i in range(12)]
    with open_output(folder / "whole.zip", pixel_name, 12, {"a": 1}) as output:
        for item in data:
            output.add(item)
        output.finish({"labels": None})
    with open_output(folder / "part.zip", pixel_name, 12, {"a": 1}) as output:
        for item in data:
            output.add(item)
    left = (folder / ".part.zip.partial.zip").read_bytes()
    return data, left, (folder / "whole.zip").read_bytes()


@given(cut=st.floats(0, 1), tail=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_zip_cut_anywhere_is_continued_to_the_same_bytes(partial, cut, tail):
    data, left, whole = partial
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.zip"
        path.with_name(".x.zip.partial.zip").write_bytes(left[: round(cut * len(left))] + tail)
        path.with_name(".x.zip.partial.json").write_text(json.dumps({"a": 1}))
        with open_output(path, pixel_name, 12, {"a": 1}) as output:
            for item in data[output.done :]:
                output.add(item)
            output.finish({"labels": None})
        assert path.read_bytes() == whole
        assert [p.name for p in Path(name).iterdir()] == ["x.zip"]


@given(parts=st.lists(st.sampled_from(["a", "..", ".", "b.png", ""]), min_size=1, max_size=5))
def test_names_inside_are_those_that_never_climb(parts):
    name = "/".join(parts)
    if is_inside(name):
        root = Path("/root/of/data")
        assert ".." not in (root / name).parts
        assert (root / name).is_relative_to(root)


@given(
    sizes=st.lists(st.tuples(st.integers(8, 40), st.integers(8, 40)), min_size=1, max_size=4),
    crop=st.sampled_from(["adm", "center"]),
)
@settings(max_examples=15, deadline=None)
def test_images_of_any_size_are_converted(sizes, crop):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
        options = ConversionOptions(resolution=8, crop=crop)
        convert(open_items(str(folder)), Path(name) / "out.zip", options)
        values, _ = load_dataset(f"{name}/out.zip").read(np.arange(len(sizes)))
    for i, image in enumerate(values):  # a flat image stays what it is
        assert (image == np.array([i, 2 * i, 3 * i]).reshape(3, 1, 1)).all()
