"""Folders of runs as training leaves them, without training."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_sft.attempts import append

SOURCES = ("maths", "<script>alert(1)</script> $\\frac{1}$ \u202e")


def step(iteration: int, **more: Any) -> dict[str, Any]:
    loss = 2 + 3 * math.exp(-iteration / 9)
    return {
        "iteration": iteration,
        "sft/loss": loss,
        **{f"sft/loss/{name}": loss + number for number, name in enumerate(SOURCES)},
        "sft/trained_tokens": 100,
        "sft/tokens_seen": 150 * iteration,
        "sft/epoch": iteration / 15,
        "grad_norm": 1 + 50 / iteration,
        "lr": 1e-4 / iteration,
        "lr/embedding": 2e-4 / iteration,
        "lr/matrices": 1e-4 / iteration,
        "perf/step_ms": 100.0 + iteration % 3,
        "perf/tokens_per_s": 1500.0,
        "perf/tflops_per_gpu": 0.5,
        "perf/peak_memory_gb": 1.5,
        "data/wait_ms": 1.0,
        "data/prefetch_queue_depth": 2,
        "skipped_iterations": int(iteration >= 17),
        **({"valid/loss": loss + 0.1, "eval/arc/acc": iteration / 40} if iteration % 10 == 0 else {}),
        **more,
    }


REPORT = {
    "seq_length": 16,
    "sources": {
        name: {
            "rows": 4,
            "kept": 3,
            "truncated": 0,
            "split": 0,
            "dropped": {"no trained token": 1},
            "schemas": {"messages": 4},
            "routes": {"plain": 4},
            "notes": {},
            "documents": 3,
            "tokens": 30,
            "trained_tokens": 12,
        }
        for name in SOURCES
    },
    "total": {
        "rows": 8,
        "kept": 6,
        "truncated": 0,
        "split": 0,
        "dropped": {"no trained token": 2},
        "schemas": {"messages": 8},
        "routes": {"plain": 8},
        "notes": {},
        "documents": 6,
        "tokens": 60,
        "trained_tokens": 24,
    },
    "packing": {"packs": 5, "efficiency": 0.75, "documents_per_pack": 1.2},
    "mixture": {name: {"documents": 3, "tokens": 30, "share": 0.5} for name in SOURCES},
    "lengths": {"edges": [8, 10, 14], "counts": [4, 2]},
    "fill": {"share": [0, 0.5, 1], "tokens": [10, 12, 16]},
}


def write_run(folder: Path, steps: int = 30, **start: Any) -> Path:
    """A run of 30 steps that failed once, whose 17th step was skipped."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step(number)) + "\n" for number in range(1, steps + 1)))
    facts = {"command": "python finetune.py --lr 1e-4 <b>", "processes": 2, "device": "CPU", "versions": {"torch": "2.13.0"}}
    settings = {"config": {"optim": {"lr": 1e-4}, "checkpoint": {"load": "models/<b>tiny"}}, "last_iteration": steps}
    rows = [{"title": "rows.jsonl:1 (maths, document 0)", "runs": [["Well? <b>", 0.0], ["Yes.\n", 1.0], ["Or no.", 0.5]]}]
    save = str(folder)
    append(save, {"event": "start", "time": "2026-11-24T20:00:00+00:00", "iteration": 0, **facts, **settings})
    append(save, {"event": "end", "time": "2026-11-24T20:01:00+00:00", "status": 3, "error": "TrainingError: rank 1 </pre>"})
    begun = {"event": "start", "time": "2026-11-24T20:05:00+00:00", "iteration": 10}
    append(save, {**begun, **facts, **settings, "data": REPORT, "rows": rows, **start})
    append(save, {"event": "end", "time": "2026-11-24T20:09:00+00:00", "status": 0, "iteration": steps})
    answers = [{"iteration": at, "prompt": "Well?", "response": f"answer <i> at {at}"} for at in (0, 10, steps)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder
