"""Random damage to every file that a run reads; what the run makes of it.

    python tests/soak/damage.py [--damages 300] [--seed 1] [--seconds 3600]

A tiny model trains five steps and saves after each; its token store, checkpoints, companions and HF folder are the undamaged
state. Each run copies that state, set back to iteration 3 or to before the first step, damages files (a byte, the end, the whole
file, or its content exchanged with another's), and gives the same command again. Damage that a run must survive is done to one
file of the token store, of the newest checkpoint (and often of the one before it) and of the companions at once: status 0 with
the undamaged run's numbers shows it for each. HF folders, where damage may be refused, are damaged alone. Checked:

    no traceback, no hang, and an exit status of 0, 2 or 3;
    status 0 means the undamaged run's losses, norms and final weights, bit for bit;
    where the damage is in a checkpoint, its companions or the token store, the status is 0: what is before it or what can be
    built again serves.

Weights and tokenizers of an HF folder carry no checksum: before the first step, other bytes there are other weights, which
nobody can tell from the right ones. Such runs must end without a traceback and are counted apart ("unknowable").
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
RUNS = ("resume", "resume", "resume hf", "resume", "fresh store", "fresh hf")


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


def places(state: Path, kind: str, chance: random.Random) -> list[list[Path]]:
    """Groups of files; one file of each is damaged, and only exchanged with another of its group."""
    store = files_read(state / "cache")
    if kind != "resume":
        if kind != "resume hf":
            shutil.rmtree(state / "out")
        return [store if kind == "fresh store" else files_read(state / "hf")]
    files = files_read(state / "out")
    newest, before = ([file for file in files if file.parent.name == f"iter_{RESUMED - back:07d}"] for back in (0, 1))
    companions = [file for file in files if file.parent.name == "out"]
    checkpoints = chance.choice([[newest], [newest, before], [newest + before]])
    return [store, companions, *checkpoints]


def trial(state: Path, expected: tuple[list[tuple], str], chance: random.Random, kind: str) -> tuple[str, int, str]:
    """(outcome, damages, description); outcomes other than ok, refused and unknowable are failures."""
    done = []
    for group in places(state, kind, chance):
        path = chance.choice(group)
        alike = [file for file in group if file != path and file.suffix == path.suffix] or [
            file for file in group if file != path
        ]
        done.append(f"{path.relative_to(state)}: {damage(path, chance.choice(KINDS), chance.choice(alike), chance)}")
    status, text = run(state)
    what = f"{kind}: {'; '.join(done)}; status {status}"
    return judged(state, expected, status, text, kind), len(done), f"{what}\n{text[-1500:]}"


def judged(state: Path, expected: tuple[list[tuple], str], status: int, text: str, kind: str) -> str:
    if "Traceback" in text:
        return "traceback"
    if status not in (0, 2, 3):
        return "status"
    if status:
        return "refused" if kind in ("resume hf", "fresh hf") else "no way back"
    try:
        found = numbers(state)
    except (ValueError, KeyError, OSError):
        return "history"
    if found == expected:
        return "ok"
    return "unknowable" if kind == "fresh hf" else "other numbers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="no run starts after them")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    damages = runs = bad = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, expected = undamaged(Path(folder))
        keep, state = Path(folder, "keep"), Path(folder, "whole")  # the same path: it stands in the fingerprint of the data
        whole.rename(keep)
        while damages < options.damages and time.monotonic() - started < options.seconds:
            chance = random.Random(f"{options.seed} {runs}")
            shutil.rmtree(state, ignore_errors=True)
            shutil.copytree(keep, state)
            kind = RUNS[runs % len(RUNS)]
            outcome, number, what = trial(state, expected, chance, kind)
            outcomes[f"{kind}: {outcome}"] += 1
            if outcome not in ("ok", "refused", "unknowable"):
                bad += 1
                print(f"run {runs}: {outcome}: {what}", flush=True)
            damages, runs = damages + number, runs + 1
            if runs % 100 == 0:
                print(f"{damages} damages in {runs} runs, {bad} bad, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{damages} damages in {runs} runs: {dict(outcomes)}, {bad} bad, {time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
