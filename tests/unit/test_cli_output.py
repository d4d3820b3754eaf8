"""Tables, sizes, folders for output."""

import pytest

from phema.output import output_folder, size, table
from posthoc_ema.errors import SnapshotWriteError


def test_a_table_puts_numbers_right_and_words_left():
    text = table(["time", "what"], [[5, "a"], [1000, "bcd"]])
    assert text.splitlines() == ["time  what", "   5  a", "1000  bcd"]


def test_a_table_without_rows_is_its_header():
    assert table(["time", "what"], []) == "time  what"


def test_a_table_has_no_trailing_blanks():
    assert all(
        line == line.rstrip() for line in table(["a", "b"], [["x", ""], ["y", "z"]]).split("\n")
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1.5e6, "1.5 MB"),
        (2e9, "2.0 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes_are_for_people(num_bytes, text):
    assert size(num_bytes) == text


def test_an_output_folder_stays_when_the_work_succeeds(tmp_path):
    with output_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


def test_an_output_folder_goes_again_when_the_work_fails(tmp_path):
    with pytest.raises(ValueError, match="x"), output_folder(tmp_path / "a" / "b"):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def _touch_and_fail(path):
    path.touch()
    raise ValueError("y")


def test_an_output_folder_that_was_there_or_holds_something_stays(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="x"), output_folder(tmp_path / "old"):
        raise ValueError("x")
    with pytest.raises(ValueError, match="y"), output_folder(tmp_path / "new" / "inner"):
        _touch_and_fail(tmp_path / "new" / "result")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_a_file_in_the_place_of_an_output_folder_is_named(tmp_path):
    (tmp_path / "taken").touch()
    for folder in (tmp_path / "taken", tmp_path / "taken" / "inner"):
        with (
            pytest.raises(SnapshotWriteError, match=r"taken.*Choose another --out"),
            output_folder(folder),
        ):
            raise AssertionError("not reached")
