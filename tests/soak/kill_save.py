"""kill -9 at random moments while a training saves every step; what the next start finds.

    python tests/soak/kill_save.py --kills 200 [--seed 1] [--cases sync-1,async-1,sync-2,async-2]

Each case trains the tiny model of tests/distributed/checkpoint_rig.py in 1 or 2 gloo processes, saves after every step
and is killed (all processes, or one of two) at a random moment; the next start resumes and goes on. Checked each time:
the newest checkpoint loads, all its checksums match, its weights are those of its iteration, it is not a start from
nothing once there was a checkpoint, and at most one save interval is lost. Exits with 1 if any of this fails.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gloo import environments, process_context

STEPS = 100000


def work(root: Path, asynchronous: bool, environment: dict[str, str], log: str) -> None:
    """One training process: resumes, then trains and saves until it is killed. Prints what it did, one JSON a line."""
    os.environ.update(environment)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    from megatron_sft.checkpoint.distributed import CheckpointSaver, latest_iteration, load_checkpoint
    from megatron_sft.config.run import CheckpointConfig, ParallelConfig
    from tests.distributed.checkpoint_rig import build

    parallel = ParallelConfig(tensor_model_parallel_size=int(environment["WORLD_SIZE"]))
    rig = build(parallel, CheckpointConfig(async_save=asynchronous, save_retain=3))

    def say(**event: object) -> None:
        if rig.ranks.rank == 0:
            print(json.dumps(event), flush=True)

    saver = CheckpointSaver(root, rig.run, rig.ranks)
    first = 0
    if latest_iteration(root) is not None:
        first = load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)["iteration"]
    say(event="start", iteration=first, digest=rig.digest())
    for iteration in range(first + 1, STEPS):
        rig.train(iteration, iteration)
        say(event="step", iteration=iteration, digest=rig.digest())
        saver.save(iteration, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": iteration})
        say(event="saved", iteration=iteration)


def launch(root: Path, case: str) -> list[Any]:
    mode, _, processes = case.partition("-")
    started = []
    for rank, environment in enumerate(environments(int(processes))):
        log = root.parent / f"{root.name}.rank{rank}.log"
        log.write_text("")
        started.append(process_context().Process(target=work, args=(root, mode == "async", environment, str(log))))
        started[-1].start()
    return started


def events(root: Path) -> list[dict]:
    lines = (root.parent / f"{root.name}.rank0.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"event"')]


def one_kill(root: Path, case: str, chance: random.Random) -> None:
    """Starts, waits for training and up to 3 saves, waits a random time of up to a step and a save more, kills."""
    processes = launch(root, case)
    deadline = time.monotonic() + 120
    while not any(event["event"] == "start" for event in events(root)):
        if time.monotonic() > deadline or not all(process.is_alive() for process in processes):
            break
        time.sleep(0.02)
    begun, saves = time.monotonic(), chance.randrange(4)
    while sum(event["event"] == "saved" for event in events(root)) < saves and time.monotonic() < deadline:
        time.sleep(0.01)
    step_s = (time.monotonic() - begun) / saves if saves else 0.3
    time.sleep(chance.uniform(0.0, 1.2 * step_s))
    victims = processes if chance.random() < 0.7 else [chance.choice(processes)]
    for process in victims:
        process.kill()
    time.sleep(0.0 if len(victims) == len(processes) else 0.2)
    for process in processes:
        process.kill()
        process.join()


def check(case: str, before: list[dict], after: list[dict], digests: dict[int, str], log: str) -> list[str]:
    """What is wrong with a start, given the events of the run that was killed before it."""
    starts = [event for event in after if event["event"] == "start"]
    if not starts:
        return [f"unloadable: {log[-1500:]}"]
    found, start = [], starts[0]
    saved = [event["iteration"] for event in before if event["event"] == "saved"]
    begun = [event["iteration"] for event in before if event["event"] in ("start", "step")]
    known = max([*saved, *(event["iteration"] for event in before if event["event"] == "start")], default=0)
    durable = known - 1 if case.startswith("async") and saved else known  # the newest may still have been in the air
    if start["iteration"] == 0 and durable > 0:
        found.append("silent restart from nothing")
    elif begun and start["iteration"] < durable:
        found.append(f"lost more than one interval: resumed at {start['iteration']}, {durable} was saved")
    expected = digests.get(start["iteration"])
    if expected and start["digest"] != expected:
        found.append(f"other weights at iteration {start['iteration']}")
    return found


def soak(case: str, kills: int, seed: int, folder: Path) -> dict[str, object]:
    root, chance = folder / case, random.Random(f"{case} {seed}")
    root.mkdir()
    before: list[dict] = []
    digests: dict[int, str] = {}
    bad: list[str] = []
    leftovers = resumed = 0
    started = time.monotonic()
    for number in range(kills + 1):  # the last start is there for the kill before it
        leftovers += any(entry.name.startswith(".saving") for entry in root.iterdir())
        one_kill(root, case, chance)
        after = events(root)
        problems = check(case, before, after, digests, (folder / f"{case}.rank0.log").read_text())
        bad += [f"{case} start {number}: {problem}" for problem in problems]
        digests |= {event["iteration"]: event["digest"] for event in after if event["event"] == "step"}
        resumed += any(event["event"] == "start" and event["iteration"] for event in after)
        before = after
    return {
        "case": case,
        "kills": kills,
        "mid-save": leftovers,
        "resumed": resumed,
        "reached": max(digests, default=0),
        "bad": len(bad),
        "seconds": round(time.monotonic() - started),
        "problems": bad,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default="sync-1,async-1,sync-2,async-2")
    options = parser.parse_args()
    cases = options.cases.split(",")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'case':10}{'kills':>7}{'mid-save':>10}{'resumed':>9}{'reached':>9}{'bad':>5}{'s':>6}")
        for case in cases:
            row = soak(case, options.kills // len(cases), options.seed, Path(folder))
            print(
                f"{row['case']:10}{row['kills']:>7}{row['mid-save']:>10}{row['resumed']:>9}{row['reached']:>9}"
                f"{row['bad']:>5}{row['seconds']:>6}",
                flush=True,
            )
            for problem in row["problems"]:
                print(" ", problem)
            worst |= int(row["bad"] > 0)
    return worst


if __name__ == "__main__":
    sys.exit(main())
