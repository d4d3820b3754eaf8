"""Pictures: valid files of the asked format, honest axes, nothing left behind by a failure."""

import numpy as np
import pytest
from PIL import Image

from posthoc_ema import RAW, SnapshotWriteError, plan_synthesis
from posthoc_ema.plotting import (
    BandCurve,
    Panel,
    _y_range,
    plot_images,
    plot_panels,
    plot_profiles,
    plot_sweep,
)

from .stores import make_store

LENGTHS = [0.01, 0.05, 0.1, 0.25]
CURVE = ("a", LENGTHS, [2.8, 1.8, 1.4, 2.9], 7.9)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("plot") / "store")
    return plan_synthesis(store, [RAW, 0.02, 0.075])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def ink(path):
    """Share of pixels that are not white."""
    return float(np.mean(pixels(path).min(axis=2) < 250))


def size(path):
    return pixels(path).shape[1::-1]


def shows(path, colour):
    return bool(np.any(np.all(pixels(path) == colour, axis=2)))


def test_a_sweep_is_drawn_as_a_picture_of_plausible_size(tmp_path):
    plot_sweep([CURVE], tmp_path / "a.png", ylabel="FD", title="a title")
    assert size(tmp_path / "a.png") == (1152, 704)
    assert 0.01 < ink(tmp_path / "a.png") < 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_each_sweep_has_its_own_colour(tmp_path):
    plot_sweep([CURVE, ("b", LENGTHS, [3, 2, 1.5, 3], None)], tmp_path / "a.png", ylabel="FD")
    assert shows(tmp_path / "a.png", (0x00, 0x72, 0xB2))
    assert shows(tmp_path / "a.png", (0xD5, 0x5E, 0x00))


@pytest.mark.parametrize(
    "curve",
    [
        ("one length", [0.12], [1.0], None),
        ("flat", [0.05, 0.1], [1.0, 1.0], 1.0),
        ("zero", [0.05, 0.1], [0.0, 0.0], None),
        ("negative", [0.05, 0.1], [-3.0, -4.0], -1.0),
        ("short", [1e-4, 2e-4], [1.0, 2.0], None),
        ("large", [0.05, 0.1], [1e30, 2e30], None),
    ],
    ids=lambda curve: curve[0],
)
@pytest.mark.parametrize("high", [False, True])
def test_odd_sweeps_are_drawn_without_a_warning(tmp_path, curve, high):
    plot_sweep([curve], tmp_path / "a.png", ylabel="y", higher_is_better=high)
    assert 0.005 < ink(tmp_path / "a.png") < 0.3


@pytest.mark.parametrize(
    "values", [[2.8, 1.4, 7.9], [38.6, 38.8], [-3.0, -1.0], [1.0], [0.0], [0.97, 0.9]]
)
def test_every_value_lies_inside_the_range_of_the_axis(values):
    low, high = _y_range(values)
    assert low < min(values) or low == min(values) == 0
    assert high > max(values)


def test_the_axis_starts_at_zero_unless_that_flattens_the_curve():
    assert _y_range([2.8, 1.4, 7.9])[0] == 0
    assert _y_range([38.6, 38.8])[0] > 38


def test_profiles_are_drawn(tmp_path, plan):
    plot_profiles(plan, tmp_path / "a.png", clock="images", title="here")
    assert size(tmp_path / "a.png") == (1152, 1216)
    assert 0.01 < ink(tmp_path / "a.png") < 0.3


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_ending_decides_the_format(tmp_path, plan, ending, start):
    for draw in (
        lambda path: plot_sweep([CURVE], path, ylabel="FD"),
        lambda path: plot_profiles(plan, path, clock="steps"),
    ):
        draw(tmp_path / f"a.{ending}")
        assert (tmp_path / f"a.{ending}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((256, 320), 2, (1440, 632)),
        ((64, 320), 2, (2304, 286)),
        ((64, 320), 3, (2304, 573)),
        ((64, 64, 3), 4, (2304, 632)),
    ],
)
def test_panels_stand_side_by_side_in_rows(tmp_path, shape, count, expected):
    panels = [(f"panel {k}", np.full(shape, 60 * k, np.uint8)) for k in range(1, count + 1)]
    plot_images(panels, tmp_path / "a.png")
    assert size(tmp_path / "a.png") == pytest.approx(expected, abs=3)
    assert shows(tmp_path / "a.png", 60)
    assert shows(tmp_path / "a.png", 120)


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(SnapshotWriteError, match=r"missing/a\.png: could not be written"):
        plot_sweep([CURVE], tmp_path / "missing" / "a.png", ylabel="FD")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SnapshotWriteError, match=r"folder\.png: could not be written"):
        plot_sweep([CURVE], tmp_path / "folder.png", ylabel="FD")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def band_curve(label, mark=None, y=(2.0, 1.0, 3.0)):
    low, high = (tuple(v * f for v in y) for f in (0.9, 1.1))
    return BandCurve(label=label, x=(0.05, 0.1, 0.2), low=low, middle=y, high=high, mark=mark)


def panel(*curves, **options):
    return Panel(title="t", xlabel="sigma_rel", ylabel="y", curves=curves, **options)


def test_panels_stand_side_by_side_in_rows_of_two(tmp_path):
    sizes = []
    for count in (1, 2, 3):
        plot_panels([panel(band_curve("a"))] * count, tmp_path / "a.png")
        sizes.append(size(tmp_path / "a.png"))
        assert 0.01 < ink(tmp_path / "a.png") < 0.3
    assert sizes == [(600, 390), (1200, 390), (1200, 780)]


def test_a_band_is_shaded_and_a_point_is_circled(tmp_path):
    x, y = (0.05, 0.1, 0.2), (2.0, 1.0, 3.0)
    line = BandCurve(label="a", x=x, low=y, middle=y, high=y)
    plot_panels([panel(line)], tmp_path / "line.png")
    plot_panels([panel(band_curve("a"))], tmp_path / "band.png")
    plot_panels([panel(band_curve("a", mark=(0.1, 1.0)))], tmp_path / "mark.png")
    assert ink(tmp_path / "line.png") < ink(tmp_path / "band.png")
    assert dark(tmp_path / "band.png") < dark(tmp_path / "mark.png")


def dark(path):
    """Share of pixels of strong colour; a band's are pale."""
    return float(np.mean(pixels(path).min(axis=2) < 100))


def test_more_curves_than_colours_are_drawn(tmp_path):
    curves = [band_curve(str(i), y=(i + 1.0, i + 2.0, i + 3.0)) for i in range(9)]
    plot_panels([panel(*curves, log_y=True)], tmp_path / "a.png")
    assert shows(tmp_path / "a.png", (0, 0, 0))
