"""Ctrl-C, once, twice and three times, at random moments of `megatron-sft prepare`; the next one must build the right store.

    PYTHONPATH=. python tests/soak/interrupt_prepare.py [TRIES]      12 by default; prints one line a try

Every try must end within a minute, without a traceback and without a process left; interrupted before it was finished, with a
sentence and status 130, or by the signal where a second one came. Exits with 1 if one did otherwise.
"""

import json
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


def interrupt(process: "subprocess.Popen[str]", pauses_s: list[float]) -> None:
    for pause_s in pauses_s:
        time.sleep(pause_s)
        try:
            os.killpg(process.pid, signal.SIGINT)
        except ProcessLookupError:
            return


def is_left(session: int) -> bool:
    """Whether a process of the session is still there."""
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found = place.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(found) == session and state != "Z":
            return True
    return False


def fate(process: "subprocess.Popen[str]", output: str, presses: int) -> str:
    """What is wrong with how it ended, or nothing."""
    if "Traceback" in output:
        return f"traceback: {output[-300:]}"
    if process.returncode == 0:
        return ""
    if is_left(process.pid):
        time.sleep(1)
        if is_left(process.pid):
            return "a process is left"
    if process.returncode == 130:
        return "" if "interrupted" in output.splitlines()[-1] else f"no sentence: {output[-300:]}"
    return "" if process.returncode == -signal.SIGINT and presses > 1 else f"status {process.returncode}: {output[-300:]}"


def main() -> int:
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    work, choice, wrong = Path(tempfile.mkdtemp(prefix="interrupt_prepare.")), random.Random(0), 0
    folder_of_data(work)
    begin = time.monotonic()
    assert start(work, work / "whole").wait() == 0, (work / "output").read_text()
    whole_s = time.monotonic() - begin
    (expected,) = (work / "whole" / "tokens").glob("*/tokens.bin")
    for number in range(1, tries + 1):
        presses = number % 3 + 1
        pauses_s = [choice.uniform(0.3, 1.0) * whole_s, *(choice.choice([0.0, 0.01, 0.05, 0.3]) for _ in range(presses - 1))]
        process = start(work, work / "cache")
        interrupt(process, pauses_s)
        try:
            process.wait(LIMIT_S)
            found = fate(process, (work / "output").read_text(), presses)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found = "hung"
        if not found and (start(work, work / "cache").wait() or not is_right(work / "cache", expected)):
            found = "the next build is wrong"
        wrong += bool(found)
        presses_at = ", ".join(f"{pause:.2f}" for pause in pauses_s)
        print(f"try {number}, Ctrl-C after {presses_at} s: status {process.returncode} {found or 'right'}", flush=True)
        shutil.rmtree(work / "cache", ignore_errors=True)
    print(f"{tries - wrong} of {tries} right (a build takes {whole_s:.1f} s)")
    shutil.rmtree(work)
    return 1 if wrong else 0


def is_right(cache: Path, expected: Path) -> bool:
    folders = [path for path in (cache / "tokens").iterdir() if path.is_dir() and path.name != HASHES]
    return [folder.suffix for folder in folders] == [""] and (folders[0] / "tokens.bin").read_bytes() == expected.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
