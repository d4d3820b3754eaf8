"""The log of a run in other programs: what they are told, and what is said when one is missing."""

import sys
import types

import pytest

from posthoc_ema import ConfigError
from reference_trainer.run_log import Status, scalars
from reference_trainer.run_loggers import RunInfo, check_loggers, loggers

STATUS = Status(
    event="status",
    nimg=64,
    total_images=128,
    loss=0.5,
    learning_rate=0.01,
    images_per_second=100.0,
    seconds=3.0,
    seconds_left=0.6,
    memory_bytes=2_000_000,
    dynamics={"weights": {"enc.r8_block0": 1.5, "stem": float("nan")}},
)
EXPECTED = {
    "loss": 0.5,
    "learning_rate": 0.01,
    "images_per_second": 100.0,
    "memory_bytes": 2e6,
    "weights/enc.r8_block0": 1.5,
}


def info(folder, nimg=0):
    return RunInfo(folder, "abc123", "digits-xs", {"seed": 3}, nimg)


def test_scalars_are_flat_names_and_finite_numbers():
    assert scalars(STATUS) == EXPECTED


def test_tensorboard_files_hold_the_numbers_of_every_status(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with loggers(["tensorboard"], info(tmp_path)) as (report,):
        report(STATUS)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == set(EXPECTED)
    for name, value in EXPECTED.items():
        (event,) = read.Scalars(name)
        assert event.step == 64
        assert event.value == pytest.approx(value)


def test_tensorboard_hides_the_points_of_a_future_that_was_lost(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with loggers(["tensorboard"], info(tmp_path)) as (report,):
        report(STATUS)
    with loggers(["tensorboard"], info(tmp_path, nimg=32)):  # goes on from before that status
        pass
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    read.Reload()
    assert [read.Scalars(name) for name in read.Tags()["scalars"]] == [[]] * len(EXPECTED)


class Recorder(types.ModuleType):
    """Stands for a package: remembers how it was called."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        print("a package that talks")
        return self

    def log(self, numbers, step):
        self.calls.append(("log", numbers, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wandb", {"id": "abc123", "name": "digits-xs"}),
        ("trackio", {"name": "digits-xs-abc123"}),
    ],
)
def test_services_get_the_numbers_and_a_name_that_stays(tmp_path, monkeypatch, capsys, name, told):
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    with loggers([name], info(tmp_path)) as (report,):
        report(STATUS)
    (begin, options), (what, numbers, step), (end,) = package.calls
    assert (begin, what, end) == ("init", "log", "finish")
    assert options["project"] == "phema"
    assert options["config"] == {"seed": 3}
    assert options["resume"] == "allow"
    assert {key: options[key] for key in told} == told
    assert numbers | {"nimg": 64} == EXPECTED | {"nimg": 64}
    assert step == 64
    assert capsys.readouterr().out == ""  # stdout is for results


def test_a_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--log wandb needs wandb, .*: pip install wandb\.$"):
        check_loggers(["wandb"])


def test_a_logger_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="one of tensorboard, wandb, trackio, got 'paper'"):
        check_loggers(["paper"])
