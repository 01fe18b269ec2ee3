"""Work that may run away: under a clock in this process, or in a process of its own with limits of time and memory.

Clocks count processor time: what a row may take does not depend on what else the machine does.
Not here: what is tried (templates.py, chat.py), which row ended a process (workers.py).
"""

import multiprocessing
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_sft.data.fork import forked
from megatron_sft.errors import UserError

TRIAL_S = 4
TRIAL_BYTES = 2**30
ROW_S = 3.5
CHARACTERS_PER_S = 2**18
"""A tenth of what the slowest tokenizer does on ordinary text."""
STEP_S = 1.0
"""Seconds more before an expendable process ends, which one long step of C code keeps from being told."""
WALL_S = 600.0
"""A process that takes no processor time for so long hangs; that would be our bug."""


class TimeIsUp(Exception):
    """Raised in the middle of work under a clock."""


class TrialError(Exception):
    """A limited process came to no answer; the message follows the name of what was tried: "the chat template ..."."""


def row_seconds(num_characters: int) -> float:
    """What a row of so much text may take."""
    return ROW_S + num_characters / CHARACTERS_PER_S


@contextmanager
def clock(seconds: float, is_expendable: bool = False) -> Iterator[None]:
    """Raises TimeIsUp after so much processor time, or STEP_S later ends an expendable process by SIGPROF.

    Only the main thread has the clock, and tokenising runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _time_is_up:  # stays: nothing else here uses this timer
        signal.signal(signal.SIGVTALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    if is_expendable:
        signal.setitimer(signal.ITIMER_PROF, seconds + STEP_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if is_expendable:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _time_is_up(*_: Any) -> None:
    raise TimeIsUp


def limited(work: Callable[[], Any], seconds: int | None = TRIAL_S) -> Any:
    """What `work` returns, done in a process of its own with TRIAL_BYTES more memory.

    Args:
        work: its answer is pickled.
        seconds: of processor time for all of it; None: its parts have clocks.

    Raises:
        TrialError: the process ended at a limit or otherwise; or what `work` raised.
        UserError: what `work` raised.
    """
    connection, theirs = multiprocessing.Pipe(duplex=False)
    process = forked(_answer, theirs, work, seconds)
    theirs.close()
    try:
        answer = connection.recv() if connection.poll(WALL_S) else TrialError(f"does nothing for {WALL_S:g} s")
    except (EOFError, OSError):
        process.join()
        is_late = process.exitcode in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGVTALRM)
        answer = TrialError("takes too long" if is_late else f"ended its process (exit code {process.exitcode})")
    finally:
        process.kill()
        process.join()
        connection.close()
    if isinstance(answer, TrialError | UserError):
        raise answer
    return answer


def _answer(connection: Any, work: Callable[[], Any], seconds: int | None) -> None:
    answer: Any
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        with limited_memory(TRIAL_BYTES):
            answer = work()
    except (TrialError, UserError) as error:
        answer = error
    except MemoryError:
        answer = TrialError(f"needs more than {TRIAL_BYTES / 2**30:g} GiB")
    connection.send(answer)


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Within it, this process (one made for such work) gets MemoryError when it allocates so much more than it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = used + num_bytes if before[1] == resource.RLIM_INFINITY else min(used + num_bytes, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
