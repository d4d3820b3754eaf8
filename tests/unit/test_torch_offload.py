from __future__ import annotations

import gc
import os
import threading
import time
import warnings

import pytest
import torch

from posthoc_ema import TrackingError
from posthoc_ema.torch.averaging import Averages, eager

from .averaging_cases import WEIGHTS, changed, parameters, run


def threads():
    return [t for t in threading.enumerate() if t.name == "posthoc_ema averages"]


@pytest.fixture
def gate(monkeypatch):
    """Updates wait in the thread until the gate is set; `gate.begun` counts those that have begun."""
    event, update = threading.Event(), eager.EagerKernel.update
    event.begun = 0

    def gated(self, *args):
        event.begun += 1
        assert event.wait(20)
        update(self, *args)

    monkeypatch.setattr(eager.EagerKernel, "update", gated)
    yield event
    event.set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_on_the_host_have_the_bits_of_those_beside_the_parameters(dtype):
    values = parameters()
    beside, offloaded = (
        Averages(values, 3, dtype=dtype),
        Averages(values, 3, dtype=dtype, device="cpu"),
    )
    run(beside, values)
    run(offloaded, values)
    assert all(torch.equal(beside.stack(name), offloaded.stack(name)) for name in values)
    offloaded.close()


def test_training_goes_on_while_the_thread_works_and_cannot_change_what_is_averaged(gate):
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")
    averages.update(value, [1.0])  # returns though the thread stands at the gate
    value["w"].fill_(7)
    gate.set()
    assert averages.average("w", 0).tolist() == [1, 1, 1]
    averages.close()


def test_a_third_update_waits_for_the_first(gate):
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")
    averages.update(value, [1.0])
    averages.update(value, [1.0])
    third = threading.Thread(target=averages.update, args=(value, [1.0]))
    third.start()
    third.join(0.3)
    assert third.is_alive()
    gate.set()
    third.join(20)
    assert not third.is_alive()
    averages.wait()
    assert gate.begun == 3
    averages.close()


def test_an_error_in_the_thread_comes_out_at_the_next_call(monkeypatch):
    values = parameters()
    averages = Averages(values, 1, device="cpu")

    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(eager.EagerKernel, "update", fail)
        averages.update(values, [1.0])
        with pytest.raises(TrackingError, match="MemoryError: no room"):
            averages.wait()
    for call in (
        lambda: averages.update(values, [1.0]),
        lambda: averages.stack("cube"),
        averages.wait,
    ):
        with pytest.raises(TrackingError, match="not whole any more"):
            call()
    averages.close()
    assert not threads()


def test_errors_do_not_leave_updates_waiting_for_ever(monkeypatch):
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")

    def fail(*args):
        time.sleep(0.05)
        raise ValueError("broken")

    monkeypatch.setattr(eager.EagerKernel, "update", fail)

    def go_on():
        for _ in range(5):
            averages.update(value, [1.0])

    with pytest.raises(TrackingError, match="ValueError: broken"):
        go_on()
    averages.close()


def test_an_interrupted_copy_loses_nothing(monkeypatch):
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")
    averages.update(value, [1.0])
    copy_ = torch.Tensor.copy_

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", interrupt)
            with pytest.raises(KeyboardInterrupt):
                averages.update(value, [1.0])
    assert torch.Tensor.copy_ is copy_
    value["w"].fill_(5)
    averages.update(value, [0.5])
    assert averages.average("w", 0).tolist() == [3, 3, 3]
    averages.close()


def test_changed_memory_order_and_dtype_are_followed():
    value = torch.randn(20, 20)
    averages, expected = Averages({"w": value}, 1, device="cpu"), torch.zeros(20, 20)
    for version in (value, value.t(), value.double(), value.bfloat16(), value[:1].expand(20, 20)):
        averages.update({"w": version}, [0.5])
        expected.lerp_(version.float(), 0.5)
    assert torch.equal(averages.average("w", 0), expected)
    averages.close()


def test_close_finishes_and_ends_the_thread_and_averages_stay_readable():
    values = parameters()
    averages = Averages(values, 3, device="cpu")
    assert not threads()  # it begins with the first update
    for number, row in enumerate(WEIGHTS):
        averages.update(changed(values, number), row)
    assert threads()
    averages.close()
    assert not threads()
    assert averages.average("cube", 0).any()
    averages.close()


def test_forgotten_averages_end_their_thread():
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")
    averages.update(value, [1.0])
    averages.wait()
    del averages
    gc.collect()
    assert not threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_is_told_that_the_averages_are_not_its_own():
    value = {"w": torch.ones(3)}
    averages = Averages(value, 1, device="cpu")
    averages.update(value, [1.0])
    averages.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            averages.update(value, [1.0])
        except TrackingError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    averages.update(value, [1.0])
    averages.close()
