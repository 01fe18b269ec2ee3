"""Resumes a run from every one of its steps and compares all that follows, bit by bit, with the unbroken run.

    python tests/soak/resume_every_step.py [--cases plain,stopped,sharded,cli]

40 steps of 4 micro-batches over more than one epoch with --rollout-shuffle, a checkpoint after each. Compared after every
step: loss, gradient norm, learning rate, and the sha256 of weights, optimizer states, scheduler, progress and generators.
plain: from the checkpoint of each step k, what was loaded included (of step 40 that alone); stopped: SIGTERM in the middle
of step k's micro-batches, then resumed (each of the two in one process); sharded: as plain, 2 processes with --bf16, the
distributed optimizer, its overlaps and --async-save; cli: finetune.py started again and again, SIGTERM at random times.
Exits with 1 unless all are identical.
"""

import argparse
import dataclasses
import hashlib
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
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sft.config.arguments import parse
from megatron_sft.train.loop import Job
from megatron_sft.train.state import TrainState
from tests.distributed.checkpoint_rig import compacted
from tests.gloo import run_ranks
from tests.text_models import text_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
FLAGS = [
    "--train-iters",
    str(STEPS),
    "--global-batch-size",
    "4",
    "--micro-batch-size",
    "1",
    "--lr",
    "1e-3",
    "--seq-length",
    "128",
    "--lr-warmup-iters",
    "5",
    "--rollout-shuffle",
    "--save-interval",
    "1",
    "--num-workers",
    "1",
]
SHARDED = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--async-save"]
Log = dict[int, tuple[Any, ...]]
"""A step -> loss, gradient norm, learning rate, digest."""


def write_inputs(root: Path) -> list[str]:
    """A tiny model and rows; returns the flags that name them."""
    text_model("llama", root / "model")
    with (root / "rows.jsonl").open("w") as file:
        for number in range(61):
            question = {"role": "user", "content": f"What is {number} plus 1?" + " Tell me." * (number % 3)}
            answer = {"role": "assistant", "content": f"It is {number + 1}." + " Really." * (number % 4)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    model = str(root / "model")
    needed = ["--load", model, "--tokenizer-model", model, "--finetune-hf-dataset", str(root / "rows.jsonl")]
    return [*needed, "--data-cache-path", str(root / "cache")]


def digest(job: Job, state: TrainState) -> str:
    """sha256 of this process's weights, optimizer states, scheduler, progress and generators."""
    from megatron.core import tensor_parallel

    found = hashlib.sha256(repr((state, job.scheduler.state_dict())).encode())
    for chunk in job.chunks:
        for name, parameter in sorted(chunk.named_parameters()):
            found.update(name.encode() + compacted(parameter))
    for part in getattr(job.optimizer, "chained_optimizers", [job.optimizer]):
        for group in part.optimizer.param_groups:
            found.update(repr((group.get("step"), group["lr"])).encode())
            for parameter in group["params"]:
                held = part.optimizer.state[parameter]
                found.update(compacted(parameter))
                for name in sorted(key for key in held if torch.is_tensor(held[key])):
                    found.update(name.encode() + compacted(held[name]))
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()
    found.update(repr(generators).encode())
    for name, held in sorted(tensor_parallel.get_cuda_rng_tracker().get_states().items()):
        found.update(name.encode() + compacted(held))
    return found.hexdigest()


class Runs:
    """Runs of one command in this process, one after another, over the same rows.

    Args:
        flags: of finetune.py, without --save.
    """

    def __init__(self, flags: list[str]):
        self.flags = flags
        self.data: Any = None

    def run(self, save: Path, writes: bool, stop_in: int | None = None) -> tuple[Log, int]:
        """One run, resumed where `save` holds a checkpoint.

        Args:
            save: its --save folder.
            writes: checkpoints are written, not only compared.
            stop_in: SIGTERM comes in the middle of this step's micro-batches.

        Returns:
            What each step gave, and why the run ended (train's second value).
        """
        from megatron.core import parallel_state

        from megatron_sft import parallel
        from megatron_sft.train import setup
        from megatron_sft.train.loop import train
        from megatron_sft.train.watch import Watch

        run, explicit = parse([*self.flags, "--save", str(save)], int(os.environ.get("WORLD_SIZE", 1)))
        run, source = setup.resolved(run, explicit)
        ranks = parallel.initialize(run.parallel, run.train.seed)
        self.data = self.data or setup.build_data(run)
        job, state, saving = setup.build_job(run, ranks, source, self.data, Watch(ranks, 0))
        log: Log = {}

        def save_and_note(state: TrainState, valid_loss: float | None) -> None:
            log[state.iteration] = (digest(job, state),)
            if writes:
                saving.checkpoint(state, valid_loss)

        job = dataclasses.replace(job, save=save_and_note)
        begin = state.iteration
        if source.resumes:
            log[begin] = (digest(job, state),)
        micro_batches = 4 // ranks.dp_size
        calls = 0

        def meet(*unused: Any) -> None:
            """Every micro-batch draws from each generator; one in the middle of a step may end the run."""
            nonlocal calls
            torch.rand(1), np.random.rand(), random.random()
            calls += 1
            if stop_in is not None and (begin * micro_batches + calls) == stop_in * micro_batches - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        job.chunks[0].module.register_forward_pre_hook(meet)
        state, stopped = train(job, state)
        saving.finish()
        parallel_state.destroy_model_parallel()  # the processes stay connected
        if ranks.rank == 0:
            for line in (save / "metrics.jsonl").read_text().splitlines():
                values = json.loads(line)
                step = values["iteration"]
                if begin < step <= state.iteration:
                    log[step] = (values["sft/loss"], values["grad_norm"], values["lr"], int(values["sft/epoch"]), *log[step][-1:])
        return log, stopped


def first_difference(whole: Log, part: Log, begin: int, last: int = STEPS) -> str:
    """Empty when what was loaded at `begin` and the steps begin + 1 .. last are there and identical."""
    if begin and part.pop(begin)[-1] != whole[begin][-1]:
        return f"what was loaded is not the state of step {begin}"
    if sorted(part) != list(range(begin + 1, last + 1)):
        return f"steps {sorted(part)}; expected {begin + 1} to {last}"
    for step in sorted(part):
        if part[step] != whole[step]:
            return f"step {step}: {part[step]}; expected {whole[step]}"
    return ""


def copied(whole: Path, step: int, folder: Path) -> Path:
    """A --save folder that holds the checkpoint of one step (0: none)."""
    shutil.rmtree(folder, ignore_errors=True)
    if step:
        shutil.copytree(whole / f"iter_{step:07d}", folder / f"iter_{step:07d}")
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def resumes(root: str, flags: list[str], steps: list[int], stops: list[int]) -> dict[str, Any]:
    """Called in every process: the unbroken run, then a resume from each of `steps` and a stop in each of `stops`."""
    import torch.distributed as dist

    base, runs, problems = Path(root), Runs(flags), {}
    whole, _ = runs.run(base / "whole", writes=True)

    def at_once(work: Any) -> None:
        """Rank 0 prepares a folder before anybody reads it."""
        if dist.get_rank() == 0:
            work()
        dist.barrier()

    for step in steps:
        folder = base / "again"
        at_once(lambda step=step, folder=folder: copied(base / "whole", step, folder))
        part, _ = runs.run(folder, writes=False)
        problems[f"step {step}"] = first_difference(whole, part, step)
    for step in stops:
        folder = base / "stopped"
        at_once(lambda step=step, folder=folder: copied(base / "whole", max(step - 2, 0), folder))
        before, signalled = runs.run(folder, writes=True, stop_in=step)
        after, _ = runs.run(folder, writes=False)
        begin = max(step - 2, 0)
        problems[f"stop in {step}"] = (
            (f"ended with {signalled}; expected 15" if signalled != signal.SIGTERM else "")
            or first_difference(whole, before, begin, step)
            or first_difference(whole, after, step)
        )
    epochs = [values[3] for values in whole.values() if len(values) > 1]
    return {"problems": problems, "epochs": max(epochs, default=0) + 1, "losses": {k: v[:3] for k, v in whole.items()}}


def through_cli(root: Path, flags: list[str], whole: dict[int, tuple], chance: random.Random) -> tuple[int, str]:
    """finetune.py with SIGTERM at random times until it ends by itself: how often it was stopped, and what differs."""
    save, stops = root / "cli", 0
    command = [sys.executable, "finetune.py", *flags, "--save", str(save)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for _ in range(2 * STEPS):
        with open(root / "cli.log", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        seen, metrics = len(_lines(save)), save / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(_lines(save)) > seen):
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
        if status == 0 or _lines(save)[-1]["iteration"] == STEPS:  # the signal may have met a process that was ending
            break
        stops += 1
        if status != 128 + signal.SIGTERM:
            return stops, f"exit status {status}; expected {128 + signal.SIGTERM}: {(root / 'cli.log').read_text()[-800:]}"
    found = [(line["iteration"], (line["sft/loss"], line["grad_norm"], line["lr"])) for line in _lines(save)]
    expected = [(step, tuple(whole[step])) for step in sorted(whole)]
    return stops, "" if found == expected else f"{len(found)} steps differ from the unbroken run's {len(expected)}"


def _lines(save: Path) -> list[dict[str, Any]]:
    path = save / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(name: str, problems: dict[str, str], total: int, began: float) -> bool:
    bad = {where: problem for where, problem in problems.items() if problem}
    print(f"{name}: {total - len(bad)} of {total} bit-identical ({time.monotonic() - began:.0f} s)", flush=True)
    for where, problem in list(bad.items())[:5]:
        print(f"  {where}: {problem[:600]}")
    return bool(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="plain,stopped,sharded,cli")
    cases, bad = parser.parse_args().cases.split(","), False
    os.environ["PYTHONWARNINGS"] = "ignore"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        flags = [*write_inputs(root), *FLAGS]
        began = time.monotonic()
        steps = list(range(1, STEPS + 1)) if "plain" in cases else []
        stops = [1, 2, *range(5, STEPS + 1, 5)] if "stopped" in cases else []
        one = run_ranks(resumes, 1, str(root / "one"), flags, steps, stops, timeout_s=1500)[0]
        if steps:
            found = {where: problem for where, problem in one["problems"].items() if where.startswith("step")}
            print(f"{STEPS} steps over {one['epochs']} epochs; resumed from each")
            bad |= report("plain", found, len(found), began)
        if stops:
            found = {where: problem for where, problem in one["problems"].items() if where.startswith("stop")}
            bad |= report("stopped", found, len(found), began)
        if "sharded" in cases:
            began, chosen = time.monotonic(), list(range(5, STEPS + 1, 5))
            ranks = run_ranks(resumes, 2, str(root / "two"), [*flags, *SHARDED], chosen, [7, 20], timeout_s=1500)
            found = {f"rank {rank} {k}": v for rank, answer in enumerate(ranks) for k, v in answer["problems"].items()}
            bad |= report("sharded", found, len(found), began)
        if "cli" in cases:
            began = time.monotonic()
            plain = run_ranks(resumes, 1, str(root / "cli"), flags, [], [], timeout_s=600)[0]["losses"]
            count, problem = through_cli(root, flags, plain, random.Random(1))
            bad |= report(f"cli, stopped {count} times", {"cli": problem}, 1, began)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
