"""A script on a pseudo-terminal, driven by a test as by a person."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.gloo import RunningScript

COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02]")


class Screen:
    """What the person types, and sees."""

    def __init__(self, script: RunningScript, keyboard: int):
        self.script, self.text, self._keyboard = script, "", keyboard

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def until(self, wanted: str, timeout_s: float = 180) -> str:
        """What was seen until this appeared, without colours; what came after it is seen next."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.plain:
            assert time.monotonic() < deadline, f"{wanted!r} did not appear:\n{self.plain}"
            if select.select([self._keyboard], [], [], 0.2)[0]:
                self.text += self._read()
            elif not any(rank.is_alive() for rank in self.script.ranks):
                raise AssertionError(f"ended before {wanted!r}:\n{self.plain}")
        seen, _, self.text = self.plain.partition(wanted)
        return seen

    def end(self, timeout_s: float = 180) -> int:
        """The exit status; what is written until then is seen, since nobody can write to a full screen."""
        deadline = time.monotonic() + timeout_s
        while any(rank.is_alive() for rank in self.script.ranks) and time.monotonic() < deadline:
            if select.select([self._keyboard], [], [], 0.2)[0]:
                self.text += self._read()
        status = self.script.result(timeout_s=10).returncode
        while select.select([self._keyboard], [], [], 0)[0] and (more := self._read()):
            self.text += more
        return status

    @property
    def plain(self) -> str:
        return COLOURS.sub("", self.text).replace("\r\n", "\n")

    def _read(self) -> str:
        try:
            return os.read(self._keyboard, 65536).decode("utf-8", "replace")
        except OSError:  # nobody is on the other side
            return ""


@contextmanager
def on_terminal(script: str, flags: Sequence[Any], processes: int = 1) -> Iterator[Screen]:
    """Runs a script whose ranks all have one terminal, as under a launcher."""
    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    running = RunningScript(script, flags, processes, os.ttyname(terminal))
    try:
        yield Screen(running, keyboard)
    finally:
        for rank in running.ranks:
            rank.kill()
        os.close(keyboard)
        os.close(terminal)
