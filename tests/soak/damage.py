"""Random damage to every file that a run reads; what the run makes of it.

    python tests/soak/damage.py [--trials 300] [--seed 1]

A tiny model trains five steps and saves after each; its token store, checkpoints, companions and HF folder are the undamaged
state. Each trial copies that state, set back to iteration 3 or (a fifth of the trials) to before the first step, damages one file
(a byte, the end, the whole file, or its content exchanged with another's), and gives the same command again. Checked:

    no traceback, no hang, and an exit status of 0, 2 or 3;
    status 0 means the undamaged run's losses, norms and final weights, bit for bit;
    where the damage is in a checkpoint, its companions or the token store, the status is 0: what is before it or what can be
    built again serves.

Weights and tokenizers of an HF folder carry no checksum: before the first step, other bytes there are other weights, which
nobody can tell from the right ones. Such trials must end without a traceback and are counted apart ("unknowable").
Exits with 1 if any of this fails.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gloo import run_script
from tests.text_models import text_model

STEPS, RESUMED = 5, 3
KINDS = ("byte", "cut", "delete", "swap", "empty")


def write_rows(path: Path) -> None:
    """14 short conversations."""
    with path.open("w") as file:
        for number in range(14):
            question = {"role": "user", "content": f"What is {number} plus {number % 5}?"}
            answer = {"role": "assistant", "content": f"It is {number + number % 5}." + " Really." * (number % 3)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


def run(state: Path) -> tuple[int, str]:
    """The command on a state's files; (exit status, what it wrote)."""
    flags = ["--load", state / "hf", "--tokenizer-model", state / "hf", "--finetune-hf-dataset", state / "rows.jsonl"]
    flags += ["--data-cache-path", state / "cache", "--save", state / "out", "--save-hf", state / "final", "--num-workers", 1]
    flags += [
        "--seq-length",
        256,
        "--global-batch-size",
        1,
        "--train-iters",
        STEPS,
        "--save-interval",
        1,
        "--lr",
        "1e-3",
        "--fp32",
    ]
    done = run_script("finetune.py", flags, timeout_s=600)
    return done.returncode, done.stdout + done.stderr


def numbers(state: Path) -> tuple[list[tuple], str]:
    """Losses, norms and rates of the last steps, which every trial trains, and the digest of the final weights."""
    last = (state / "out" / "metrics.jsonl").read_text(errors="replace").splitlines()[RESUMED - STEPS :]
    lines = [json.loads(line) for line in last]
    return [(line["iteration"], line["sft/loss"], line["grad_norm"], line["lr"]) for line in lines], sha256(
        (state / "final" / "model.safetensors").read_bytes()
    ).hexdigest()


def undamaged(folder: Path) -> tuple[Path, tuple[list[tuple], str]]:
    """(the state before the resumed steps, the numbers of the unbroken run)."""
    state = folder / "whole"
    state.mkdir()
    text_model("qwen3", state / "hf")
    write_rows(state / "rows.jsonl")
    status, text = run(state)
    assert status == 0, text
    expected = numbers(state)
    for iteration in range(RESUMED + 1, STEPS + 1):
        shutil.rmtree(state / "out" / f"iter_{iteration:07d}")
    (state / "out" / "latest_checkpointed_iteration.txt").write_text(str(RESUMED))
    lines = (state / "out" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (state / "out" / "metrics.jsonl").write_text("".join(lines[:RESUMED]))
    shutil.rmtree(state / "final")
    return state, expected


def files_read(state: Path) -> list[Path]:
    """The files below a folder that a run reads."""
    return [path for path in sorted(state.rglob("*")) if path.is_file() and "tensorboard" not in path.parts]


def damage(path: Path, kind: str, other: Path, chance: random.Random) -> str:
    """Spoils one file; returns what was done."""
    data = path.read_bytes()
    if kind == "byte" and data:
        place = chance.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ chance.randrange(1, 256)]) + data[place + 1 :])
        return f"byte {place} of {len(data)}"
    if kind == "cut" and data:
        path.write_bytes(data[: chance.randrange(len(data))])
        return f"cut to {path.stat().st_size} of {len(data)}"
    if kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"exchanged with {other.name}"
    if kind == "delete":
        path.unlink()
        return "deleted"
    path.write_bytes(b"")
    return "emptied"


def trial(state: Path, expected: tuple[list[tuple], str], chance: random.Random, fresh: bool) -> tuple[str, str]:
    """(outcome, description); outcomes other than ok, refused and unknowable are failures."""
    if fresh:
        shutil.rmtree(state / "out")
    area = chance.choice(["hf", "cache"] if fresh else ["hf", "cache", "out"])
    inside = files_read(state / area)
    path = chance.choice(inside)
    alike = [file for file in inside if file != path and file.suffix == path.suffix] or [file for file in inside if file != path]
    done = damage(path, chance.choice(KINDS), chance.choice(alike), chance)
    status, text = run(state)
    what = f"{path.relative_to(state)}: {done}, status {status}"
    if "Traceback" in text:
        return "traceback", f"{what}\n{text[-1500:]}"
    if status not in (0, 2, 3):
        return "status", f"{what}\n{text[-1500:]}"
    if status == 0:
        try:
            found = numbers(state)
        except (ValueError, KeyError, OSError) as error:
            return "history", f"{what}: {error}"
        if found == expected:
            return "ok", what
        if fresh and area == "hf":
            return "unknowable", what
        return "other numbers", f"{what}: {found} expected {expected}\n{text[-1500:]}"
    if area == "hf":
        return "refused", what
    return "no way back", f"{what}\n{text[-1500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, expected = undamaged(Path(folder))
        keep, state = Path(folder, "keep"), Path(folder, "whole")  # the same path: it stands in the fingerprint of the data
        whole.rename(keep)
        for number in range(options.trials):
            chance = random.Random(f"{options.seed} {number}")
            shutil.rmtree(state, ignore_errors=True)
            shutil.copytree(keep, state)
            outcome, what = trial(state, expected, chance, fresh=number % 5 == 4)
            outcomes[outcome] += 1
            if outcome not in ("ok", "refused", "unknowable"):
                print(f"trial {number}: {outcome}: {what}", flush=True)
    bad = sum(count for outcome, count in outcomes.items() if outcome not in ("ok", "refused", "unknowable"))
    print(f"{options.trials} trials: {dict(outcomes)}, {bad} bad, {time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
