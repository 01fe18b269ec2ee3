"""Starts real processes for tests: a function on several ranks over gloo, or a script with its command line.

They are forked from a process that has only imported (tests/preloaded.py): 0.1 s each instead of 5 s of imports.
"""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def process_context() -> Any:
    """How processes are started; CUDA does not survive a fork."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180) -> list[Any]:
    """Calls function(*args) in `world_size` processes that have a launcher's environment variables.

    Args:
        function: at module level of a test file (it is pickled by name); it calls parallel.initialize itself.
        world_size: processes.
        args: passed on.
        timeout_s: all processes are killed after it.

    Returns:
        What each rank returned, in rank order.

    Raises:
        AssertionError: a rank raised; the message is its traceback.
    """
    context = process_context()
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(function, args, environment, results)) for environment in environments(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < world_size and time.monotonic() < deadline:
            if results.empty():  # read while they run: a full pipe would block them
                assert any(p.is_alive() for p in processes), f"only ranks {sorted(answers)} answered, the others died"
                time.sleep(0.01)
                continue
            rank, error, value = pickle.loads(results.get())
            assert error is None, f"rank {rank}:\n{error}"
            answers[rank] = value
    finally:
        for process in processes:
            process.join(5 if len(answers) == world_size else 0)
            process.kill()
    assert len(answers) == world_size, f"only ranks {sorted(answers)} answered in {timeout_s} s"
    return [answers[rank] for rank in range(world_size)]


def environments(world_size: int) -> list[dict[str, str]]:
    """What a launcher would set for each rank, beside this process's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [{**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _rank(function: Callable[..., Any], args: tuple, environment: Mapping[str, str], results: Any) -> None:
    os.environ.update(environment)  # a forked process has the environment of the first test
    torch.set_num_threads(1)
    rank = int(environment["RANK"])
    try:
        results.put(pickle.dumps((rank, None, function(*args))))  # by value: the process may end before it is read
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc(), None)))
        raise


def run_script(script: str, flags: Sequence[Any], processes: int = 1, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder as `python script flags` does, or as torchrun does on several ranks.

    Returns:
        The exit status (of the first rank that failed) and what all ranks wrote. The others are ended 30 s after a failure.
    """
    return RunningScript(script, flags, processes).result(timeout_s)


class RunningScript:
    """A script of this folder on one or several ranks, beside whatever the test does meanwhile. Arguments as run_script's.

    Args:
        terminal: what all ranks read from and write to, as /dev/pts/5; None: their output is kept for `result`.
    """

    def __init__(self, script: str, flags: Sequence[Any], processes: int = 1, terminal: str | None = None):
        self._command = [script, *(str(flag) for flag in flags)]
        self._files = [tempfile.TemporaryFile() for _ in range(2)]
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        places = {0: terminal, 1: terminal, 2: terminal} if terminal else {1: files[0], 2: files[1]}
        worlds = environments(processes) if processes > 1 else [{**os.environ, "OMP_NUM_THREADS": "1"}]
        make = process_context().Process
        self.ranks = [make(target=_script, args=(script, self._command[1:], world, places)) for world in worlds]
        for rank in self.ranks:
            rank.start()

    def result(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Waits for the end; as run_script."""
        deadline = time.monotonic() + timeout_s
        try:
            while any(rank.is_alive() for rank in self.ranks):
                if any(rank.exitcode for rank in self.ranks):
                    deadline = min(deadline, time.monotonic() + 30)
                assert time.monotonic() < deadline, f"{self._command} did not end"
                time.sleep(0.02)
        finally:
            for rank in self.ranks:
                rank.kill()
                rank.join()
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read().decode())
        status = next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
        return subprocess.CompletedProcess(self._command, status, *texts)


def _script(script: str, flags: list[str], environment: Mapping[str, str], places: Mapping[int, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for number, place in places.items():
        os.dup2(os.open(place, (os.O_RDWR if number == 0 else os.O_WRONLY | os.O_APPEND) | os.O_NOCTTY), number)
    if 0 in places:  # multiprocessing closes what a process reads from
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", closefd=False)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / script), run_name="__main__")
