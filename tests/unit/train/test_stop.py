"""StopRequest: the first signal asks for a save, a later one ends the process."""

import os
import signal
import time

import pytest

from megatron_sft.config.run import RunConfig
from megatron_sft.train import loop
from tests.gloo import process_context


def signalled(pauses: list[float]) -> None:
    """A process that gets SIGTERM, and again after each pause; it ends with status 0 if it is still there."""
    loop.StopRequest(RunConfig())
    os.kill(os.getpid(), signal.SIGTERM)
    for pause in pauses:
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.parametrize(("pauses", "status"), [([], 0), ([0.0, 0.1, 0.1], 0), ([loop.SAME_SIGNAL_S + 0.1], -signal.SIGTERM)])
def test_a_second_signal_ends_the_process_unless_it_is_the_first_ones_echo(pauses: list[float], status: int) -> None:
    process = process_context().Process(target=signalled, args=(pauses,))
    process.start()
    process.join(60)
    assert process.exitcode == status
