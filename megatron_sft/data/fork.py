"""Child processes that end with this one, and to which Ctrl-C means nothing: their owner hears it and ends them."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from typing import Any


def forked(target: Callable[..., None], *args: Any) -> ForkProcess:
    """Starts target(*args) in a copy of this process, within milliseconds.

    Whatever interrupts its owner, the child is ended at the owner's exit, so that nothing waits for it; a child that is asked
    for more through a connection also sees the end of an owner that was killed.
    """
    process = multiprocessing.get_context("fork").Process(target=_body, args=(target, *args), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # the child keeps it blocked
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _body(target: Callable[..., None], *args: Any) -> None:
    """In the child: what the owner does at SIGTERM is not its own, least of all through a descriptor that both have."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    target(*args)
