"""Two runs started on one --save folder, at random distances; which of them runs, and what is in the folder afterwards.

    python tests/soak/two_runs.py [--starts 10] [--seed 1]

Two runs of a tiny model with different seeds train 12 steps and save after each. The second one starts up to one and a half
lengths of a run after the first; in a third of the starts the first one is killed (SIGKILL) at a random moment before that.
Checked each time, against the same two trainings alone:

    a run that begins while the other is alive is refused with status 2 and the other's process number, or refuses it;
    a run that begins after the other has ended or died goes on from its last checkpoint, or says that it is not its own;
    every checkpoint is whole, and holds the bytes that one of the two trainings alone wrote at that iteration;
    all checkpoints are of one training, and no lock is left.

50 starts are the full size. Prints counts; exits with 1 if anything else was found.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gloo import RunningScript
from tests.soak.damage import write_rows
from tests.text_models import text_model

STEPS = 12
SEEDS = (1, 2)


def start(folder: Path, save: Path, seed: int) -> RunningScript:
    needed = ["--load", folder / "hf", "--tokenizer-model", folder / "hf", "--finetune-hf-dataset", folder / "rows.jsonl"]
    needed += ["--data-cache-path", folder / "cache", "--num-workers", 1, "--seq-length", 256, "--fp32", "--lr", "1e-3"]
    length = ["--global-batch-size", 2, "--train-iters", STEPS, "--save-interval", 1]
    return RunningScript("finetune.py", [*needed, *length, "--save", save, "--seed", seed])


def tensors(root: Path) -> dict[int, dict[str, str]]:
    """{iteration: {file of tensors: its checksum}}; of a checkpoint that is not whole {"problem": what}."""
    from megatron_sft.checkpoint import manifest, tracker

    found = {}
    for iteration in tracker.iterations(root):
        folder = tracker.checkpoint_folder(root, iteration)
        if problems := manifest.problems(folder, content=True):
            found[iteration] = {"problem": "; ".join(problems)}
            continue
        files = json.loads((folder / manifest.MANIFEST).read_text())["files"]
        found[iteration] = {name: files[name]["crc32"] for name in files if name.endswith(".distcp")}
    return found


def outcome(done: subprocess.CompletedProcess, other: int) -> str:
    """What became of a run, in a word; the whole text where it is nothing that may happen."""
    text = done.stdout + done.stderr
    if done.returncode == 2 and f"another run is using it: process {other} on " in text:
        return "refused"
    if done.returncode == 2 and "another run wrote to it while this one began" in text:
        return "came too late"
    if done.returncode == 2 and "settings differ from the checkpoint's: data.seed: " in text:
        return "not its own"
    if "Traceback" in text or done.returncode not in (0, -signal.SIGKILL):
        return f"status {done.returncode}: {text[-1500:]}"
    return "ran" if done.returncode == 0 else "killed"


def one_start(folder: Path, alone: dict[int, dict], length_s: float, chance: random.Random) -> tuple[str, list[str]]:
    """(what became of the two, what was wrong)."""
    save = folder / "out"
    first = start(folder, save, SEEDS[0])
    distance_s, dies = chance.uniform(0, 1.5 * length_s), chance.random() < 1 / 3
    time.sleep(distance_s)
    if dies:
        first.ranks[0].kill()
    second = start(folder, save, SEEDS[1])
    pids = [run.ranks[0].pid for run in (first, second)]
    ends = [outcome(run.result(), pid) for run, pid in zip((first, second), reversed(pids), strict=True)]
    bad = [end for end in ends if end.startswith("status")]
    if ends.count("ran") == 2:
        bad.append("both ran")
    if "ran" not in ends and "killed" not in ends:
        bad.append(f"nobody ran: {ends}")
    found = tensors(save)
    if (save / "run.lock").exists():
        bad.append("a lock was left")
    shutil.rmtree(save, ignore_errors=True)
    of_one = [seed for seed in SEEDS if all(files == alone[seed][iteration] for iteration, files in found.items())]
    if not of_one:
        bad.append(f"checkpoints that neither training alone wrote: {found}")
    elif "ran" in ends and (SEEDS[ends.index("ran")] not in of_one or set(found) != set(range(1, STEPS + 1))):
        bad.append(f"{ends}, but the checkpoints are {sorted(found)} of seed {of_one}")
    return " / ".join(end if not end.startswith("status") else "wrong" for end in ends), bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance, counts, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text_model("llama", folder / "hf")
        write_rows(folder / "rows.jsonl")
        alone: dict[int, dict] = {}
        for seed in SEEDS:
            began = time.monotonic()
            done = start(folder, folder / "alone", seed).result()
            assert done.returncode == 0, done.stdout + done.stderr
            length_s = time.monotonic() - began
            alone[seed] = tensors(folder / "alone")
            shutil.rmtree(folder / "alone")
        assert alone[SEEDS[0]][1] != alone[SEEDS[1]][1], "the two trainings cannot be told apart"
        for number in range(options.starts):
            ends, bad = one_start(folder, alone, length_s, chance)
            counts[ends] += 1
            wrong += bool(bad)
            for text in bad:
                print(f"start {number}: {text}", flush=True)
    for ends, count in counts.most_common():
        print(f"{count:4} {ends}")
    print(f"{options.starts} starts, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
