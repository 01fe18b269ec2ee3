"""Runs a function in real gloo processes, for tests of distributed behaviour."""

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


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
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world_size, port, results)) for rank in range(world_size)
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


def _rank(function: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put(pickle.dumps((rank, None, function(*args))))  # by value: the process may end before it is read
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc(), None)))
        raise
