"""Programs that mean harm: each is contained and fails, as root and as a user; good ones pass."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.tasks import jail, sandbox

QUICK = {**sandbox.LIMITS, "seconds": 1.0, "cpu_seconds": 1}
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "file outside": "import sys\nfor path in (OUTSIDE, '/marker', sys.prefix + '/marker', '/usr/marker'):\n"
    "    try: open(path, 'w').write('x')\n    except OSError: pass\nsys.exit(0)",
    "full disk": "import os\nfor n in range(1000): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
    "huge file": "file = open('/tmp/huge', 'wb')\nfor n in range(10**6): file.write(bytes(1 << 20))",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).send(b'x')",
    "kill of the parent": "import os, sys\nos.kill(os.getppid(), 9)\nsys.exit(0)",
    "kill of all": "import os, sys\nos.kill(-1, 9)\nsys.exit(0)",
    "deaf to signals": "import signal\nfor n in set(signal.valid_signals()) - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\n"
    "while True: pass",
    "/proc": "print(open('/proc/1/environ').read(), open('/proc/self/mem', 'wb'))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "huge output": "import sys\nwhile True: print('x' * 10**6); print('x' * 10**6, file=sys.stderr)",
    "early end": "import os\nos._exit(0)",
    "what stays behind": "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['MARKER', '99'])\n"
    "sys.exit(0)",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/usr', b'tmpfs', 0, b'') == 0",
    "memory of no process": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.shmget(0, 1 << 26, 0o1600) >= 0, 'refused'",
    "namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'",
    "namespaces by clone": "import ctypes, os\nclone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
    "assert ctypes.CDLL(None).syscall(clone, 0x10000011, 0, 0, 0, 0) >= 0, 'refused'",
    "memory in a file of no folder": "import os\ntry: os.memfd_create('x')\nexcept PermissionError: raise SystemExit('refused')",
    "forged word": "import os\nos.write(3, b'0' * 32)\nos._exit(0)",
}
UID = "import os\nassert (os.getuid(), os.getgid()) == (65534, 65534)\nassert set(os.environ) <= {'HOME', 'PATH', 'LC_CTYPE'}"
needs_sandbox = pytest.mark.skipif(bool(sandbox.why_no_sandbox()), reason="no user namespaces here")


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained_and_fails(name: str, tmp_path: Path) -> None:
    marker = f"sleeper-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        words = {"OUTSIDE": repr(str(tmp_path / "marker")), "PORT": str(server.getsockname()[1]), "MARKER": marker}
        program = HOSTILE[name]
        for word, value in words.items():
            program = program.replace(word, value)
        found = sandbox.run_program(program, limits=QUICK)
        assert not found.passed and "sandbox" not in found.why
        assert "refused" in found.why or "refused" not in program
        with pytest.raises(TimeoutError):
            server.accept()
    assert not (tmp_path / "marker").exists() and not Path("/marker").exists() and not Path("/usr/marker").exists()
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(marker.encode() in line for line in lines)


@needs_sandbox
def test_a_program_is_nobody_with_nothing_of_ours_in_sight() -> None:
    assert sandbox.run_program(UID) == sandbox.Outcome(True, "")
    seen = "import os\nassert sorted(os.listdir('/dev')) == ['null', 'random', 'urandom', 'zero'] and os.listdir('/tmp') == []"
    assert sandbox.run_program(f"{seen}\nassert not os.path.exists('/proc/self') and not os.path.exists({__file__!r})").passed
    opened = "for number in range(4, 64):\n    try: os.fstat(number)\n    except OSError: continue\n    raise ValueError(number)"
    assert sandbox.run_program(f"import os\n{opened}") == sandbox.Outcome(True, "")
    assert sandbox.run_program("raise KeyError('k')").why == "KeyError: 'k'"
    assert sandbox.run_program("def f(:").why.startswith("SyntaxError")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root becomes another user")
@pytest.mark.parametrize("name", ["uid", "file outside", "fork bomb"])
def test_as_a_user(name: str) -> None:
    """The user's own python3, which the user can reach, with jail.py as text."""
    program = {"uid": UID, **HOSTILE}[name].replace("OUTSIDE", "'/tmp/marker-of-a-user'")
    python = os.path.realpath("/usr/bin/python3")
    asked: dict[str, Any] = {"program": program, "word": "w" * 32, "limits": QUICK, "prefix": "/usr", "python": python}
    words = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", python, "-I", "-S", "-c"]
    source = Path(jail.__file__).read_text(encoding="utf-8")
    done = subprocess.run([*words, source], input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    assert found["passed"] == (name == "uid") and "no sandbox" not in found["why"], found
    assert not Path("/tmp/marker-of-a-user").exists()


def test_a_python_that_cannot_be_run_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys._base_executable", str(tmp_path))
    assert sandbox.why_no_sandbox() == f"{tmp_path} cannot be run: Permission denied"


@needs_sandbox
def test_a_program_may_start_threads_and_processes() -> None:
    forks = "pid = os.fork()\nif pid == 0: os._exit(0)\nassert os.waitpid(pid, 0)[1] == 0"
    runs = "assert subprocess.run(['/bin/echo', 'a'], capture_output=True).stdout == b'a\\n'"
    threads = "thread = threading.Thread(target=print)\nthread.start()\nthread.join()"
    found = sandbox.run_program(f"import os, subprocess, threading\n{forks}\n{runs}\n{threads}")
    assert found == sandbox.Outcome(True, "")


def test_without_a_sandbox_programs_have_limits_all_the_same() -> None:
    for name in ("memory", "endless loop", "early end", "sleep"):
        assert not sandbox.run_program(HOSTILE[name], is_unsafe=True, limits=QUICK).passed
    assert sandbox.run_program("x = 1", is_unsafe=True).passed
