"""Starts a real run for the ends of every number's range, and for the values beside it that have a meaning of their own.

    PYTHONPATH=. python tests/soak/flag_values.py [--all]

A range is right when a run at its ends trains, or says what is wrong with it: no traceback, no hang, no loss that is not
finite. Without --all a part of the flags, another one each day. Prints the figures; exit status 1 on a failure.
"""

import argparse
import datetime
import json
import math
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sft.config.arguments import flag_table
from megatron_sft.config.fields import MOST, Kind, Number, Words
from tests.gloo import run_script
from tests.text_models import text_model

STATUS = {0: "trained", 2: "refused", 3: "stopped", 4: "trained"}
SOME = 24
"""Values without --all."""
TIMEOUT_S = 240
MEMORY_BYTES = 6 * 10**9
NOT_ALONE = {
    "--loss-spike-factor": ["--loss-spike-action", "skip"],
    "--lr-wsd-decay-iters": ["--lr-decay-style", "WSD"],
    "--lr-wsd-decay-samples": ["--lr-decay-style", "WSD"],
    "--recompute-num-layers": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
    "--recompute-modules": ["--recompute-granularity", "selective"],
    "--eval-iters": ["--split", "50,50,0"],
    "--eval-interval": ["--split", "50,50,0", "--eval-iters", "1"],
    "--min-lr": ["--lr", "1"],
    "--lr-warmup-init": ["--lr", "1"],
}
"""What a flag needs to have an effect."""


def ends(kind: Kind) -> list[str]:
    """The ends of a range, and what stands beside it; every word."""
    if isinstance(kind.rule, Words):
        return list(kind.rule.words)
    assert isinstance(kind.rule, Number)
    values = [kind.rule.least, min(kind.rule.most, MOST) if kind.base is int else kind.rule.most, *kind.rule.also]
    return [str(kind.base(value)) for value in dict.fromkeys(values)]


def cases() -> list[tuple[str, str]]:
    """(flag, value) of every flag with a range or words."""
    fields = {item.path: item for item in reversed(flag_table().values()) if item.path and item.words and item.kind.rule}
    return [(item.name, value) for item in fields.values() for value in ends(item.kind)]


def write_inputs(folder: Path) -> list[str]:
    """A tiny model and 20 rows; the flags that every run has."""
    text_model("qwen3", folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(20):
            turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    model = str(folder / "model")
    flags = ["--load", model, "--tokenizer-model", model, "--finetune-hf-dataset", str(folder / "rows.jsonl"), "--fp32"]
    return [
        *flags,
        "--seq-length",
        "512",
        "--exit-interval",
        "2",
        "--data-cache-path",
        str(folder / "cache"),
        "--num-workers",
        "1",
    ]


def losses(save: Path) -> Iterator[float]:
    """Of every iteration that was logged."""
    if (save / "metrics.jsonl").exists():
        for line in (save / "metrics.jsonl").read_text().splitlines():
            yield float(json.loads(line)["sft/loss"])


def fault(done: Any, save: Path) -> str:
    """What is wrong with a run; "" where nothing is."""
    text = done.stdout + done.stderr
    if "Traceback" in text:
        return "a traceback: " + text.strip().splitlines()[-1]
    if done.returncode not in STATUS:
        return f"status {done.returncode}: {text.strip()[-300:]}"
    wrong = [loss for loss in losses(save) if not math.isfinite(loss)]
    return f"losses {wrong} with status {done.returncode}" if wrong else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every value")
    parser.add_argument("--only", default="", help="flags that contain this")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in case[0]]
    if not arguments.all and not arguments.only:
        chosen = random.Random(datetime.date.today().toordinal()).sample(chosen, SOME)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, save = write_inputs(folder), folder / "save"
        for flag, value in chosen:
            flags = [*base, "--save", str(save), *NOT_ALONE.get(flag, []), flag, value]
            try:
                done = run_script("finetune.py", flags, timeout_s=TIMEOUT_S)
                found, outcome = fault(done, save), STATUS.get(done.returncode, "failed")
            except AssertionError as error:
                found, outcome = f"a hang: {error}", "failed"
            counts["failed" if found else outcome] += 1
            if found or arguments.only:
                print(f"{flag} {value}: {outcome}{' with ' + found if found else ''}", flush=True)
            shutil.rmtree(save, ignore_errors=True)
    print(f"{len(chosen)} values: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
