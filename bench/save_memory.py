"""Memory and time of saves and resumes with the distributed optimizer: real runs of finetune.py, each process measured.

    python bench/save_memory.py [--model demo/SmolLM2-135M-Instruct] [--processes 1 2] [--seq-length 256]

Runs of four steps: without --save; with a save after each; with them but without --use-distributed-optimizer; and a fifth step
after a resume. Memory is the largest resident set of any process of a run (ru_maxrss). Time is the processor time, user and
system, that a process spends in the shortest of its saves, the slowest process's: on a machine that others use the clock says
less, and one save says little.

Bars, exit status 1 if one is missed: peak with --save <= 1.15 x that without; a save <= 1.3 x the time of one without the
distributed optimizer; peak of the resumed run <= 1.02 x the first run's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "examples" / "data" / "gsm8k_train_400.jsonl"
BARS = {"save peak": 1.15, "save time": 1.3, "resume peak": 1.02}
EVERY_STEP = ["--save-interval", "1", "--save-retain", "1"]
MEASURED = """
import os, sys, time
from megatron_sft.train.saving import Saving

save = Saving.checkpoint

def timed(*arguments):
    cpu, wall = time.process_time(), time.perf_counter()
    save(*arguments)
    print(f"SAVE {os.environ['RANK']} {time.process_time() - cpu:.3f} {time.perf_counter() - wall:.3f}", flush=True)

Saving.checkpoint = timed
import finetune
sys.exit(finetune.main(sys.argv[1:]))
"""


class Run(NamedTuple):
    """What one run took, the most of any process."""

    peak_mb: float
    save_cpu_s: float
    save_wall_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seq-length", type=int, default=256)
    options = parser.parse_args()
    missed = []
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            runs = measured(options, processes, Path(folder))
        rows = ratios(runs)
        for name, ratio in rows.items():
            print(f"{processes} processes  {name:28}{ratio:9.3f} x   (bar {BARS[name]})", flush=True)
        print(json.dumps({"processes": processes, **rows, **{name: run._asdict() for name, run in runs.items()}}), flush=True)
        missed += [f"{processes} processes: {name}" for name, ratio in rows.items() if ratio > BARS[name]]
    print(f"missed: {', '.join(missed) or 'none'}")
    return bool(missed)


def measured(options: argparse.Namespace, processes: int, folder: Path) -> dict[str, Run]:
    """The four runs of one number of processes."""
    flags = ["--load", options.model, "--finetune-hf-dataset", str(ROWS), "--seq-length", str(options.seq_length), "--bf16"]
    flags += ["--global-batch-size", "2", "--num-workers", "1", "--data-cache-path", str(folder / "cache"), "--lr", "1e-5"]
    flags += ["--no-verify-conversion", "--train-iters"]
    distributed, save = ["--use-distributed-optimizer"], [*EVERY_STEP, "--save", str(folder / "out")]
    whole = [*EVERY_STEP, "--save", str(folder / "whole")]
    runs = {}
    for name, iterations, more in (
        ("without --save", "4", distributed),
        ("with --save", "4", [*distributed, *save]),
        ("not distributed", "4", whole),
        ("resumed", "5", [*distributed, *save]),
    ):
        runs[name] = found = run([*flags, iterations, *more], processes)
        seconds = f"{found.save_cpu_s:9.2f} s{found.save_wall_s:9.2f} s by the clock"
        print(f"{processes} processes  {name:28}{found.peak_mb:9.0f} MB{seconds}", flush=True)
    return runs


def ratios(runs: dict[str, Run]) -> dict[str, float]:
    return {
        "save peak": runs["with --save"].peak_mb / runs["without --save"].peak_mb,
        "save time": runs["with --save"].save_cpu_s / runs["not distributed"].save_cpu_s,
        "resume peak": runs["resumed"].peak_mb / runs["with --save"].peak_mb,
    }


def run(flags: list[str], processes: int) -> Run:
    """Starts one process per rank and waits for all of them."""
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **world, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as output:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", MEASURED, *flags],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
            for rank in range(processes)
        ]
        ended = [os.wait4(process.pid, 0) for process in started]
        output.seek(0)
        text = output.read()
    assert all(status == 0 for _, status, _ in ended), text
    saves: dict[str, list[tuple[float, ...]]] = {}
    for line in text.splitlines():
        if line.startswith("SAVE "):
            saves.setdefault(line.split()[1], []).append(tuple(map(float, line.split()[2:])))
    most = max(map(min, saves.values()), default=(0.0, 0.0))
    return Run(max(usage.ru_maxrss for _, _, usage in ended) / 1024, *most)


if __name__ == "__main__":
    sys.exit(main())
