"""A rank that is killed, stopped or raises alone, under the real launcher: all end within 30 s, and the log says why.

Each case starts finetune.py with torchrun, waits for a moment of the run, and does the harm to rank 1.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.text_models import text_model

ROOT = Path(__file__).parents[2]
BAR_S = 30
SLOW_SOURCE = """
import time
from pathlib import Path

class Slow:
    def __init__(self, path):
        pass

    def __iter__(self):
        Path(__file__).with_name("reading").touch()
        time.sleep(300)
        yield {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 8 rows and a row source that takes minutes."""
    folder = tmp_path_factory.mktemp("faults")
    text_model("llama", folder / "model")
    row = {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes, yes."}]}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return folder


def start(folder: Path, save: Path, *flags: str) -> subprocess.Popen:
    """Two ranks that train for ever, or until they are hindered."""
    command = [sys.executable, "-m", "megatron_sft.launch", "--standalone", "--nproc_per_node=2", "finetune.py"]
    command += ["--load", folder / "model", "--finetune-hf-dataset", folder / "rows.jsonl", "--seq-length", "64"]
    command += ["--train-iters", "100000", "--save", save, "--data-cache-path", save / "cache", "--num-workers", "1", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = (save.parent / f"{save.name}.log").open("w")
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log, env=environment)


def pid_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    """The process that the launcher gave this rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"rank {rank} is not among {children}")


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, "the run did not reach the moment to harm it"
        time.sleep(0.01)


def trains(save: Path) -> bool:
    return "iteration        3/" in (save.parent / f"{save.name}.log").read_text()


def saves(save: Path) -> bool:
    return trains(save) and any(save.glob(".saving_*"))


def reads(save: Path) -> bool:
    return save.with_name(f"{save.name}.source").joinpath("reading").exists()


WHO = f"rank 1 (process {{pid}} on {socket.gethostname()}) "
DIED, SILENT = WHO + "died while ", WHO + "has been silent for 4 s while "
CASES = {
    "killed-training": (signal.SIGKILL, trains, [], DIED + "training."),
    # stopped while saving, or in the step after it
    "stopped-saving": (
        signal.SIGSTOP,
        saves,
        ["--save-interval", "1", "--async-save"],
        SILENT,
    ),  # while saving, or in the step after it
    # before training a launcher's SIGTERM ends the others at once, and the launcher names the rank
    "killed-reading": (signal.SIGKILL, reads, ["--custom-dataset"], "launch: rank 1 (process {pid}) was ended by SIGKILL."),
    "stopped-reading": (signal.SIGSTOP, reads, ["--custom-dataset"], SILENT + "reading the data, and is ended."),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_ends_and_the_log_names_the_one_to_blame(name, folder, tmp_path):
    harm, moment, flags, expected = CASES[name]
    save = tmp_path / "out"
    if flags == ["--custom-dataset"]:
        source = tmp_path / "out.source"
        source.mkdir()
        (source / "slow.py").write_text(SLOW_SOURCE)
        flags = ["--custom-dataset", f"{source / 'slow.py'}:Slow"]
    launcher = start(folder, save, "--stall-timeout-s", "4", *flags)
    try:
        wait_for(lambda: moment(save), launcher)
        pids = [pid_of_rank(launcher, rank) for rank in (0, 1)]
        os.kill(pids[1], harm)
        launcher.wait(timeout=BAR_S)
    finally:
        launcher.kill()
    log = (tmp_path / "out.log").read_text()
    assert launcher.returncode == 3, log
    assert log.count(expected.format(pid=pids[1])) == 1, log
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), log
