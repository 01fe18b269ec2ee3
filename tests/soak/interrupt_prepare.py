"""Ctrl-C, once, twice and three times, at random moments of `megatron-sft prepare`; the next one must build the right store.

    PYTHONPATH=. python tests/soak/interrupt_prepare.py [TRIES]      12 by default; prints one line a try

Every try must end within a minute, without a traceback and without a process left; interrupted before it was finished, with a
sentence and status 130, or by the signal where a second one came. Exits with 1 if one did otherwise.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_sft.data.tokens import HASHES
from tests.gloo import ROOT
from tests.text_models import TEMPLATE, byte_tokenizer

ROWS = 6000
LIMIT_S = 60.0


def folder_of_data(work: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(work / "tokenizer")
    with open(work / "rows.jsonl", "w", encoding="ascii") as file:
        for i in range(ROWS):
            turns = [{"role": "user", "content": f"question {i} " * 9}, {"role": "assistant", "content": f"answer {i} " * 60}]
            file.write(json.dumps({"messages": turns}) + "\n")


def start(work: Path, cache: Path) -> "subprocess.Popen[str]":
    """A session of its own: a signal to its group is what a terminal's Ctrl-C is."""
    flags = ["--finetune-hf-dataset", work / "rows.jsonl", "--tokenizer-model", work / "tokenizer", "--seq-length", 4096]
    command = [sys.executable, "-m", "megatron_sft", "prepare", *flags, "--data-cache-path", cache, "--num-workers", 2]
    with open(work / "output", "w", encoding="utf-8") as output:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, start_new_session=True, stdout=output, stderr=output, text=True
        )


def interrupt(process: "subprocess.Popen[str]", at_s: float, pauses_s: list[float]) -> float:
    """Presses when the process has taken so much processor time: wall time says little on a machine that does other things.

    Returns:
        The processor time at which it ended by itself before that; infinity when it did not.
    """
    seen_s = 0.0
    while process.poll() is None and seen_s < at_s:
        seen_s = max(seen_s, cpu_s(process.pid))
        time.sleep(0.002)
    if process.returncode is not None:
        return seen_s
    for pause_s in [0.0, *pauses_s]:
        time.sleep(pause_s)
        try:
            os.killpg(process.pid, signal.SIGINT)
        except ProcessLookupError:
            break
    return math.inf


def cpu_s(number: int) -> float:
    """Processor time of a process without its children; 0 when it is gone."""
    try:
        user, system = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def left(session: int) -> list[str]:
    """The processes of the session that are still there: number, state, what the kernel has them wait in, processor time."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(f"{place.name} {state} {(place / 'wchan').read_text()} {cpu_s(int(place.name)):.2f} s")
        except OSError:
            continue
    return found


def fate(process: "subprocess.Popen[str]", output: str, presses: int) -> str:
    """What is wrong with how it ended, or nothing."""
    if "Traceback" in output:
        return f"traceback: {output[:3000]}"
    if process.returncode == 0:
        return ""
    if left(process.pid):
        time.sleep(1)
        if left(process.pid):
            return f"processes are left: {left(process.pid)}"
    if process.returncode == 130:
        return "" if "interrupted" in output.splitlines()[-1] else f"no sentence: {output[-300:]}"
    is_late = "token store:" in output  # it had said everything, and was on its way out
    return (
        ""
        if process.returncode == -signal.SIGINT and (presses > 1 or is_late)
        else f"status {process.returncode}: {output[-300:]}"
    )


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would what it starts
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    work, choice, wrong = Path(tempfile.mkdtemp(prefix="interrupt_prepare.")), random.Random(0), 0
    folder_of_data(work)
    process, whole_s = start(work, work / "whole"), 0.0
    while process.poll() is None:
        whole_s = max(whole_s, cpu_s(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, (work / "output").read_text()
    (expected,) = (work / "whole" / "tokens").glob("*/tokens.bin")
    for number in range(1, tries + 1):
        presses = number % 3 + 1
        at_s, pauses_s = choice.uniform(0.1, 1.0) * whole_s, [choice.choice([0.0, 0.01, 0.05, 0.3]) for _ in range(presses - 1)]
        process = start(work, work / "cache")
        whole_s = min(whole_s, interrupt(process, at_s, pauses_s))
        try:
            process.wait(LIMIT_S)
            found = fate(process, (work / "output").read_text(), presses)
        except subprocess.TimeoutExpired:
            found = f"hung: {left(process.pid)}: {(work / 'output').read_text()[-300:]}"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not found and (start(work, work / "cache").wait() or not is_right(work / "cache", expected)):
            found = "the next build is wrong"
        wrong += bool(found)
        presses_at = ", ".join(f"{pause:.2f}" for pause in [at_s, *pauses_s])
        print(f"try {number}, Ctrl-C after {presses_at} s: status {process.returncode} {found or 'right'}", flush=True)
        shutil.rmtree(work / "cache", ignore_errors=True)
    print(f"{tries - wrong} of {tries} right (a build takes {whole_s:.1f} s of processor time)")
    shutil.rmtree(work)
    return 1 if wrong else 0


def is_right(cache: Path, expected: Path) -> bool:
    folders = [path for path in (cache / "tokens").iterdir() if path.is_dir() and path.name != HASHES]
    return [folder.suffix for folder in folders] == [""] and (folders[0] / "tokens.bin").read_bytes() == expected.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
