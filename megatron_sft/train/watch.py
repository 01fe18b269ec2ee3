"""Ends a run of several processes within seconds when one of them dies, stalls or fails, and says which one and why.

A thread on every rank writes a heartbeat to the process group's key-value store once per second, whatever the main thread
computes, tokenises or waits for: only a process that is stopped, dead or cut off falls silent. Ranks watch the next rank's
heartbeat, and the processes of their own machine through /proc. The first to notice writes down the failure; everybody
reads it, gives the main thread GRACE_S to end by itself, and ends.

Until the loop answers SIGTERM itself, by a save, another thread does: it calls all of `before_end` and ends the process, while
the main thread may wait inside of C.

Not here: what a collective's own time-out does (--distributed-timeout-minutes).
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_sft.checkpoint.lock import start_of
from megatron_sft.errors import TrainingError, UserError
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks, gather

POLL_S = 1.0
GRACE_S = 3.0
_FAILURE = "watch/failure"
_SAID = "watch/said"
"""Who prints the failure."""


@dataclass(frozen=True)
class Process:
    """A rank's operating-system process."""

    host: str
    pid: int
    identity: str
    """start_of(pid)."""

    @classmethod
    def own(cls) -> "Process":
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()) or "")


@dataclass(frozen=True)
class Failure:
    """Why a run ends: what is written into the store."""

    rank: int
    message: str
    exit_status: int = TrainingError.exit_status
    is_stalled: bool = False


class Watch:
    """Context of a run: within it, no rank outlives another's failure by more than seconds.

    Args:
        ranks: of this process.
        stall_timeout_s: silence after which a rank counts as stalled; 0: nothing is watched.
    """

    def __init__(self, ranks: Ranks, stall_timeout_s: float):
        self._activity = "starting"
        self._ranks, self._timeout_s = ranks, stall_timeout_s
        self._active = ranks.world_size > 1 and stall_timeout_s > 0
        self._stop = threading.Event()
        self._beats = 0
        self._pipe: int | None = None
        self.before_end: list[Callable[[], None]] = []
        """Called, for at most 2 s together, before the process is ended in place of its main thread."""

    def tell(self, activity: str) -> None:
        """Says what this rank does from now on, for the messages of the others."""
        self._activity = activity
        if self._active:
            with contextlib.suppress(RuntimeError):  # the thread finds out that the store is gone
                self._beat()

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._listen()
        if self._active:
            default: Any = dist.distributed_c10d._get_default_store()
            self._store = default.clone()  # a connection of its own: never waits in turn
            self._processes = gather(Process.own())
            self._local = [rank for rank in range(self._ranks.world_size) if self._is_visible(rank)]
            self._beat()
            threading.Thread(target=self._run, name="sft-watch", daemon=True).start()
        return self

    def _listen(self) -> None:
        """Python's own handlers wait for the main thread; the number of a signal is written into a pipe at once."""
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.signal(signal.SIGTERM, _ended)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reader,), name="sft-sigterm", daemon=True).start()

    def _hear(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _ended:
                if self._ranks.rank == 0:
                    logger.error("ended by SIGTERM while %s; nothing half-written is kept.", self._activity)
                self._leave(128 + signal.SIGTERM)
        os.close(reader)

    def _close_ears(self) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            if signal.getsignal(signal.SIGTERM) is _ended:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(self._pipe)
            self._pipe = None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._close_ears()
        if not self._active:
            return
        if error is None:
            dist.barrier()  # nobody falls silent before everybody is done
            self._stop.set()
            return
        failure = self._cause(error)
        if failure is not None:
            followed = TrainingError(failure.message)
            followed.exit_status = failure.exit_status
            self._leave_to_one(followed)
            raise followed from None
        if isinstance(error, UserError) and not error.is_said:
            self._leave_to_one(error)
        if self._ranks.rank == 0:
            time.sleep(1.5 * POLL_S)  # this process may hold the store, where the others look for the reason

    def _cause(self, error: BaseException) -> Failure | None:
        """The failure of another rank that this rank's error follows from; None where it is this rank's own."""
        may_follow = not isinstance(error, UserError) or "onnection" in str(error)
        deadline = time.monotonic() + 2 * POLL_S * may_follow
        while True:
            with contextlib.suppress(RuntimeError):
                failure = self._found_dead() or self._published()
                if failure is not None and failure.rank != self._ranks.rank and may_follow:
                    return failure
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        status = error.exit_status if isinstance(error, UserError) else 1
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            self._publish(Failure(self._ranks.rank, f"rank {self._ranks.rank} failed while {self._activity}: {text}", status))
        return None

    def _leave_to_one(self, error: UserError) -> None:
        """Where the failure that ends the run is this error, one process prints it: rank 0 unless that does not come to it."""
        deadline = time.monotonic() + (POLL_S + GRACE_S + 1.0) * (self._ranks.rank != 0)
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            first = self._published()
            if first is None or str(error) not in first.message:
                return
            while not self._store.check([_SAID]) and time.monotonic() < deadline:
                time.sleep(0.1)
            error.is_said = not self._is_mine_to_say()

    def _is_mine_to_say(self) -> bool:
        """True for whoever asks first, once."""
        own = f"{self._ranks.rank} {time.monotonic_ns()}"
        return self._store.compare_set(_SAID, "", own) == own.encode()

    def _run(self) -> None:
        heard, since, last = b"", time.monotonic(), time.monotonic()
        following = (self._ranks.rank + 1) % self._ranks.world_size
        while not self._stop.wait(POLL_S):
            now = time.monotonic()
            if now - last > 5 * POLL_S:  # this process itself was stopped, perhaps the whole job
                since = now
            last = now
            try:
                self._beat()
                beat = self._store.get(_beat_of(following))
                if beat != heard:
                    heard, since = beat, now
                failure = self._published() or self._found_dead()
                if failure is None and now - since > self._timeout_s:
                    failure = self._publish(Failure(following, self._stalled(following), is_stalled=True))
                    if self._is_mine_to_say():  # now: a launcher may end this process once that one is gone
                        logger.error("%s", failure.message)
            except RuntimeError as error:
                failure = Failure(0, f"the key-value store of the run (of rank 0 or the launcher) does not answer: {error}")
            if failure is not None:
                self._end(failure)
                return

    def _end(self, failure: Failure) -> None:
        """Ends this process, unless its main thread ends it first."""
        if failure.is_stalled and failure.rank in self._local and self._is_visible(failure.rank):
            os.kill(self._processes[failure.rank].pid, signal.SIGKILL)  # a stopped process does not answer to less
        if self._stop.wait(GRACE_S):
            return
        is_mine = True
        with contextlib.suppress(RuntimeError):
            is_mine = self._is_mine_to_say()
        if is_mine:
            logger.error("%s", failure.message)
        self._leave(failure.exit_status)

    def _leave(self, status: int) -> None:
        sys.stdout.flush()
        calls = list(self.before_end)
        last = threading.Thread(target=lambda: [call() for call in calls], daemon=True)  # may wait for a file server
        last.start()
        last.join(2.0)
        os._exit(status)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(_beat_of(self._ranks.rank), f"{self._beats} {self._activity}")

    def _published(self) -> Failure | None:
        return Failure(**json.loads(self._store.get(_FAILURE))) if self._store.check([_FAILURE]) else None

    def _publish(self, failure: Failure) -> Failure:
        """Writes a failure down; returns the first one that anybody wrote."""
        return Failure(**json.loads(self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))

    def _found_dead(self) -> Failure | None:
        for rank in self._local:
            if not self._is_visible(rank):
                message = (
                    f"{self._name(rank)} died while {self._activity_of(rank)}. Expected every rank to go on to the end. Look "
                    "into the launcher's output for its signal, and for the kernel's out-of-memory killer (dmesg). The same "
                    "command resumes from the last checkpoint."
                )
                return self._publish(Failure(rank, message))
        return None

    def _stalled(self, rank: int) -> str:
        return (
            f"{self._name(rank)} has been silent for {self._timeout_s:g} s while {self._activity_of(rank)}, and is ended. "
            "Expected a sign of life every second, whatever it computes. Look for a stopped process, a frozen machine or a lost "
            "network. The same command resumes from the last checkpoint; --stall-timeout-s waits longer."
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._processes[rank].pid} on {self._processes[rank].host})"

    def _activity_of(self, rank: int) -> str:
        return self._store.get(_beat_of(rank)).decode().partition(" ")[2]

    def _is_visible(self, rank: int) -> bool:
        """Whether a rank's process runs (or is stopped) on this machine, in this container."""
        process = self._processes[rank]
        return process.host == socket.gethostname() and bool(process.identity) and start_of(process.pid) == process.identity


def _ended(*_: Any) -> None:
    """SIGTERM's handler until the loop has its own: the thread that hears of it acts."""


def _beat_of(rank: int) -> str:
    return f"watch/beat/{rank}"
