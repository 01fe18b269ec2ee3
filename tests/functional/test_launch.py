"""`python -m megatron_sft.launch`: ends as its processes end. The script that it starts here needs no torch."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gloo import ROOT

SCRIPT = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "fails":
    if rank == 0:
        print("rank 0 says why", flush=True)
    sys.exit(2)
if how == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (print(f"saved {rank}", flush=True), sys.exit(128 + signal.SIGTERM)))
    print(f"ready {os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']}", flush=True)
if how != "ends":
    time.sleep(60)
"""


def start(folder: Path, how: str, *flags: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "MASTER_"))}
    command = [sys.executable, "-m", "megatron_sft.launch", *(flags or ("--standalone",)), "--nproc_per_node", "2", script, how]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [("ends", 0, ""), ("fails", 2, "rank 0 says why\n"), ("killed", 3, "launch: rank 1 (process {}) was ended by SIGKILL. Look")],
)
def test_status_and_words_are_the_first_failing_processs(tmp_path: Path, how: str, status: int, said: str) -> None:
    launcher = start(tmp_path, how)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == status, output
    begin, _, end = said.partition("{}")
    assert (output == said) if not end else (output.startswith(begin) and end in output and output.count("\n") == 1)


def test_sigterm_reaches_the_processes_which_have_a_day_to_save(tmp_path: Path) -> None:
    launcher = start(tmp_path, "saves")
    assert launcher.stdout is not None
    said = ""
    while said.count("\n") < 2:  # the lines of two processes may run into one another
        said += launcher.stdout.readline()
    assert said.replace("\n", "") == "ready 86400" * 2
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert sorted(re.findall("saved [01]", output)) == ["saved 0", "saved 1"] and len(output) == len("saved 0\nsaved 1\n")


def test_what_keeps_it_from_starting_is_one_sentence(tmp_path: Path) -> None:
    launcher = start(tmp_path, "ends", "--nnodes", "2", "--node-rank", "0", "--master-addr", "localhost", "--master-port", "x")
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 2 and "Traceback" not in output
