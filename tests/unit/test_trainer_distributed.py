"""Processes of a job: what torchrun says, agreement, and what a lost one is called (one process here)."""

import signal

import pytest
import torch

from posthoc_ema import ConfigError, PhemaError
from reference_trainer.distributed import (
    DistributedContext,
    OtherRankError,
    RankError,
    brief,
    context,
    started,
)
from reference_trainer.distributed import _lost_ranks as lost_ranks

CPU = torch.device("cpu")
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}


def under_torchrun(monkeypatch, **more):
    for name, value in {**TORCHRUN, **more}.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one_process_and_nothing_is_initialised():
    with started("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        tensor = torch.ones(2)
        assert ranks.sum_(tensor) is tensor
        assert tensor.tolist() == [1, 1]
        assert ranks.gather("a") == ["a"]
        assert ranks.broadcast("a") == "a"
        assert ranks.agree(lambda: 5) == 5
        ranks.barrier()


def test_the_environment_of_torchrun_is_read(monkeypatch):
    under_torchrun(monkeypatch)
    assert context("cpu") == DistributedContext(3, 4, CPU)
    assert not context("cpu").is_main


def test_each_process_takes_its_gpu(monkeypatch):
    under_torchrun(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert context("auto").device == torch.device("cuda:1")
    assert context("cuda").device == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="'cuda:0' is one GPU, and there are 4 processes"):
        context("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="'cuda:2' does not exist: this machine has 2"):
        context("auto")


def test_an_error_of_the_action_is_raised_as_it_is():
    def fail():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        DistributedContext(0, 1, CPU).agree(fail)


def test_other_errors_than_ours_are_bugs_and_pass():
    with pytest.raises(ZeroDivisionError):
        DistributedContext(0, 1, CPU).agree(lambda: 1 / 0)


def test_processes_hear_that_another_one_has_failed(monkeypatch):
    ranks = DistributedContext(1, 2, CPU)

    class Summed:
        def __init__(self, tensor, async_op):
            tensor[0] += 1  # the first process has failed

        def wait(self):
            pass

    monkeypatch.setattr(torch.distributed, "all_reduce", Summed)
    with pytest.raises(OtherRankError, match="process 0 of 2 has failed"):
        ranks.agree(lambda: 5)
    assert issubclass(OtherRankError, RankError)
    assert issubclass(RankError, PhemaError)


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9"
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"),
        PhemaError("another rank has ended or does not answer (waiting for ranks [1]: x)."),
    ],
)
def test_a_lost_process_is_one_sentence_with_what_to_do(error):
    ranks = DistributedContext(1, 2, CPU)
    with pytest.raises(RankError) as caught, lost_ranks(ranks, "Start again."):
        raise error
    text = str(caught.value)
    assert text.startswith("another process of this job has ended, so process 1 of 2 stops too (")
    assert text.endswith("). Start again.")
    assert "\n" not in text
    assert "pair.cc" not in text


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ConfigError("seed"), OtherRankError("process 0")]
)
def test_what_has_nothing_to_do_with_processes_stays_what_it_is(error):
    with (
        pytest.raises(type(error)) as caught,
        lost_ranks(DistributedContext(1, 2, CPU), "Start again."),
    ):
        raise error
    assert caught.value is error


def test_the_launchers_signal_is_that_sentence_too_and_the_handler_goes_again():
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(RankError, match="the launcher ends the job"),
        lost_ranks(DistributedContext(0, 2, CPU), "Start again."),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_brief_is_the_first_sentence_without_places_in_the_source():
    assert brief(RuntimeError(GLOO)) == "Connection closed by peer [::1]:9"
    assert brief(RuntimeError("")) == "RuntimeError"
    assert len(brief(RuntimeError("x" * 500))) == 120
