"""First contact with a GPU (docs/gpu.md): smoke tests and microbenchmarks, the most informative first.

    python bench/gpu_first.py --out FOLDER [--cpu] [--budget-seconds 540] [--parts smoke,loss]

A part (bench/gpu_parts.py) is one result file. A part that is done is skipped, so that the same command goes on where the last
one was cut off; one that crashes or takes too long is marked as failed, and the next begins in a new process; one during which
this program itself was ended is tried once more. To repeat a part delete its file. FOLDER/first.json is all of them in one.
Exit status: 0 all parts are there, 1 some failed, 3 some are left: call again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu_parts  # noqa: E402

LEAST_S = 20
"""With less of the budget left no part is begun."""


def row_of(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a part; None: it is still to be done."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text())
    if row["status"] == "begun" and row["attempts"] >= 2:
        row["status"] = "failed: begun twice, never ended"
        gpu_parts.write(file, row)
    return None if row["status"] == "begun" else row


def work(folder: Path, names: list[str], seconds: float) -> None:
    """The parts in one process, until its end or that of the budget; what ended it is written where it was."""
    command = [sys.executable, "-m", "bench.gpu_parts", "--out", str(folder), *names]
    before = {name: gpu_parts.attempts(folder / f"{name}.json") for name in names}
    with (folder / "first.log").open("a+") as log:
        first = log.tell()
        try:
            status = subprocess.run(command, cwd=ROOT, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            print("the budget's end: the part that was begun is tried again", flush=True)
            return
        log.seek(first)
        lines = log.read().strip().splitlines() or ["no message"]
    if status == 0:
        return
    begun = [name for name in names if gpu_parts.attempts(folder / f"{name}.json") > before[name]]
    name = begun[-1] if begun else names[0]  # the process did not even begin one
    row = {"part": name, "status": f"failed: status {status}: {lines[-1][:300]}", "attempts": before[name] + 1}
    gpu_parts.write(folder / f"{name}.json", {**row, "stderr": lines[-40:]})
    print(f"{name}: {row['status']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for one JSON file a part, first.json and first.log")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--cpu", action="store_true", help="the parts that have a CPU form")
    parser.add_argument("--parts", help=f"of {','.join(gpu_parts.PARTS)}; default: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.time() + options.budget_seconds
    names = options.parts.split(",") if options.parts else gpu_parts.wanted(options.cpu)
    while left := [name for name in names if row_of(options.out, name) is None]:
        if time.time() > until - LEAST_S:
            break
        work(options.out, left, until - time.time())
    rows = [row for name in names if (row := row_of(options.out, name)) is not None]
    gpu_parts.write(options.out / "first.json", {"parts": rows, "left": left})
    failed = [row for row in rows if row["status"] != "ok"]
    print(f"{len(rows)} of {len(names)} parts are there, {len(failed)} failed, {len(left)} left", flush=True)
    for row in failed:
        print(f"  {row['part']}: {row['status']}", flush=True)
    return 3 if left else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
