"""What every command line has in common."""

import signal
import subprocess
import sys
import warnings

import pytest

from megatron_sft import entry
from tests.gloo import ROOT


@pytest.mark.parametrize("text", ["Apex is not installed. Falling back to Torch Norm", "transformer_engine is missing"])
def test_no_command_warns_of_kernels_that_nothing_here_needs(text: str) -> None:
    """megatron-core does, where it is imported."""

    def command(argv: object, world_size: int) -> int:
        warnings.warn(text, UserWarning, stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert entry.run(command, []) == 0
    assert seen == []


CTRL_C = """
import os, signal, sys, time, weakref
from megatron_sft import entry
from tests.gloo import ROOT

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background job ignores it

def press(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)

class Doomed:
    pass

Doomed.__del__ = press if sys.argv[1] == "__del__" else lambda self: None

def command(argv, world_size):
    doomed = Doomed()
    kept = weakref.ref(doomed, press if sys.argv[1] == "weakref" else None)
    del doomed
    time.sleep(60)
    return 0

entry.leave(entry.run(command, []))
"""


@pytest.mark.parametrize("place", ["__del__", "weakref"])
def test_ctrl_c_counts_where_python_drops_exceptions(place: str) -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C, place], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGINT
    assert "interrupted: nothing half-written" in done.stdout and "Traceback" not in done.stdout + done.stderr


STREAMS = """
import os, sys
from megatron_sft import entry, log

def command(argv, world_size):
    log.logger.info("said")
    print(sys.stdin.isatty(), sys.stdout.isatty(), [os.fstat(number).st_rdev != 0 for number in range(3)], file=sys.stderr)
    return 7

os._exit(entry.run(command, []))
"""


@pytest.mark.parametrize("redirection", ["<&- >&-", "</dev/null >/dev/full"])
def test_a_command_goes_on_without_its_standard_output(redirection: str) -> None:
    words = ["bash", "-c", f'"$1" -c "$0" {redirection}', STREAMS, sys.executable]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "False False [True, True, False]\n")
