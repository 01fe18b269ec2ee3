"""Clocks and limited processes end what runs away, by processor time."""

import os
import resource
import signal
import time
from contextlib import suppress

import pytest

from megatron_sft.data import trial
from megatron_sft.data.trial import TimeIsUp, TrialError, clock, limited, limited_memory
from megatron_sft.errors import DataError


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def long_step() -> None:
    sum([[0] * 10] * 1_000_000, start=[])  # noqa: RUF017


def test_a_clock_interrupts_python_and_leaves_nothing_behind() -> None:
    with pytest.raises(TimeIsUp), clock(0.05):
        spin(5)
    with clock(0.05):
        time.sleep(0.2)  # takes no processor time
    spin(0.1)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_long_step_of_c_code_ends_an_expendable_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "STEP_S", 0.1)

    def work() -> None:
        with clock(0.1, is_expendable=True):
            long_step()

    with pytest.raises(TrialError, match=r"^takes too long$"):
        limited(work, None)


def test_memory_is_limited_below_what_the_session_allows() -> None:
    def within() -> bool:
        most = 2**36
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with limited_memory(2**37):
            inside = resource.getrlimit(resource.RLIMIT_AS)
        return inside == resource.getrlimit(resource.RLIMIT_AS) == (most, most)

    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os._exit(0 if within() else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_limited_process_answers_or_says_why_not() -> None:
    assert limited(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(TrialError, match=r"^takes too long$"):
        limited(long_step, 1)
    with pytest.raises(TrialError, match=r"^ended its process \(exit code 7\)$"):
        limited(lambda: os._exit(7))
    with pytest.raises(TrialError, match=r"^needs more than 1 GiB$"):
        limited(lambda: bytearray(2**31))

    def bad() -> None:
        raise DataError("a:1: bad")

    with pytest.raises(DataError, match=r"^a:1: bad$"):
        limited(bad)
