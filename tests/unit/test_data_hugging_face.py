"""Data sets that `datasets` saved to disk: columns, splits, labels, threads, and what is refused."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posthoc_ema.errors import ConfigError
from reference_trainer.data import load_dataset
from reference_trainer.data.hugging_face import SavedItems

from . import data_sets as ds

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES = ds.pictures(20, channels=1)


def rows(labels=None, column="image", **features):
    files = [{"bytes": ds.png(image[0]), "path": None} for image in IMAGES]
    values = {column: files, **({} if labels is None else {"label": labels})}
    kinds = {column: datasets.Image(), **features}
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "saved")


def test_rows_are_read_by_many_threads_as_by_one(folder):
    rows(list(range(20)), label=datasets.Value("int32")).save_to_disk(folder)
    dataset = load_dataset(folder)
    assert (dataset.name, dataset.label_dim, dataset.channels, len(dataset)) == ("saved", 20, 1, 20)
    orders = [np.random.default_rng(k).permutation(20) for k in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, (values, labels) in zip(orders, pool.map(dataset.read, orders), strict=True):
            assert np.array_equal(values, IMAGES[order])
            assert labels.tolist() == order.tolist()


def test_classes_that_have_names_count_even_if_none_is_there(folder):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    rows([0, 1] * 10, label=names).save_to_disk(folder)
    assert load_dataset(folder).label_dim == 3


def test_rows_that_were_selected_keep_their_order(folder):
    rows(list(range(20)), label=datasets.Value("int64")).select([5, 3, 9]).save_to_disk(folder)
    dataset = load_dataset(folder)
    assert np.array_equal(dataset.read(np.array([2, 0]))[0], IMAGES[[9, 5]])
    assert dataset.labels.tolist() == [5, 3, 9]


def test_a_column_of_images_is_found_by_its_type_and_labels_may_lack(folder):
    rows(column="photo").save_to_disk(folder)
    dataset = load_dataset(folder)
    assert (dataset.label_dim, len(dataset)) == (0, 20)


def test_images_outside_of_the_tables_are_read_from_their_files(tmp_path, folder):
    Image.open(io.BytesIO(ds.png(IMAGES[0, 0]))).save(tmp_path / "x.png")
    features = datasets.Features({"image": datasets.Image()})
    linked = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.png")]}, features=features)
    table = linked.cast_column("image", datasets.Image(decode=False))
    item = {"bytes": None, "path": str(tmp_path / "x.png")}
    plain = datasets.Dataset.from_list([{"image": item}], features=table.features)
    plain.cast_column("image", datasets.Image()).save_to_disk(folder)
    dataset = load_dataset(folder)
    assert np.array_equal(dataset.read(np.zeros(1, np.int64))[0][0], IMAGES[0])


def test_the_train_split_is_taken_or_the_only_one(folder, tmp_path):
    first, second = rows([1] * 20, label=datasets.Value("int64")), rows()
    datasets.DatasetDict({"test": second, "train": first}).save_to_disk(folder)
    assert load_dataset(folder).label_dim == 2
    datasets.DatasetDict({"test": second}).save_to_disk(str(tmp_path / "one"))
    assert len(load_dataset(str(tmp_path / "one"))) == 20
    datasets.DatasetDict({"a": second, "b": first}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match=r"has the splits a, b\. Give the folder of one: .*two/a"):
        load_dataset(str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rows([-1] * 20, label=datasets.Value("int64")),
            r"row 0 \(label\): a label must be",
        ),
        (lambda: rows([None] * 20, label=datasets.Value("int64")), "got None"),
        (lambda: rows().select([]), "cannot be read by datasets"),
        (
            lambda: rows([1] * 20, label=datasets.Value("int64")).select_columns("label"),
            "no column of images, only label",
        ),
    ],
    ids=["negative", "null", "empty", "no images"],
)
def test_bad_rows_are_named(folder, make, message):
    make().save_to_disk(folder)
    with pytest.raises(ConfigError, match=message):
        load_dataset(folder)


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="data here holds no rows"):
        SavedItems(rows().select([]), Path("here"), "here")


def test_a_damaged_folder_is_a_sentence(folder, tmp_path):
    rows().save_to_disk(folder)
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read by datasets"):
        load_dataset(folder)


def test_without_datasets_the_pip_line_is_named(folder, monkeypatch):
    rows().save_to_disk(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="Run: pip install datasets"):
        load_dataset(folder)
