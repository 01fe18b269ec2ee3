"""Programs that a model wrote, run where they can do no harm: in jail.py's namespaces, or not at all (--unsafe-code).

A program is text; it has passed when it came to its end without an exception within the limits. What it prints is thrown away.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sft.errors import ConfigError

LIMITS: Mapping[str, float] = {"seconds": 8.0, "cpu_seconds": 4, "memory_bytes": 2**29, "file_bytes": 2**22, "processes": 8}
"""Of one program: by the clock, of the processor, of address space a process, of one file, of processes and threads."""
GRACE_S = 1.5
"""The jail itself ends so long after its program at the latest."""


UNSAFE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("jail", sys.argv[1])
jail = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jail)
asked = json.load(sys.stdin)
print(json.dumps(jail.run(asked, {**asked["limits"], "processes": 0})))
"""
"""jail.py without its namespaces."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    why: str
    """Of a program that failed: its exception, or how it ended."""


def run_program(program: str, is_unsafe: bool = False, limits: Mapping[str, float] = LIMITS) -> Outcome:
    """Runs a program; takes up to 10 seconds.

    Args:
        program: Python.
        is_unsafe: without namespaces, as the user that runs this process, with limits and in a folder of its own alone.
        limits: LIMITS, or others by their names.
    """
    asked: dict[str, Any] = {"program": program, "word": secrets.token_hex(16), "limits": dict(limits), "prefix": sys.base_prefix}
    asked["python"] = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    jail = str(Path(__file__).with_name("jail.py"))
    words = [asked["python"], "-I", "-S", *(["-c", UNSAFE, jail] if is_unsafe else [jail])]
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:  # a Python in another user's home
            return Outcome(False, f"{words[0]} cannot be run: {error.strerror}")
        try:
            said, _ = process.communicate(json.dumps(asked).encode(), timeout=limits["seconds"] + GRACE_S)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            end_group(process)
    try:
        verdict = json.loads(said)
    except ValueError:
        return Outcome(False, "no answer of the sandbox")
    return Outcome(bool(verdict["passed"]), str(verdict["why"]))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process with all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why_no_sandbox() -> str:
    """Why programs cannot be run here; "" where a program of one line passes."""
    outcome = run_program("assert __name__ == '__main__'")
    return "" if outcome.passed else outcome.why


def require_sandbox() -> None:
    """Raises ConfigError where there is none."""
    if reason := why_no_sandbox():
        found = f"HumanEval runs programs that the model wrote, and this machine gives no sandbox ({reason})"
        expected = "expected user, pid, network and mount namespaces (Linux 5.12 or newer, root or unprivileged ones)"
        todo = "Run it elsewhere, or pass --unsafe-code, which runs them as you are: only where nothing can come to harm."
        raise ConfigError([f"{found}; {expected}. {todo}"])
