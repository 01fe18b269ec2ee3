"""Figures of a run in a few words, and what they mean for the person who trained it."""

import math
import statistics
from typing import Any

from megatron_sft.report.runs import Run, is_number, mean_loss

SLOW_LOADER = 0.1
"""Of a step's time spent waiting for rows is worth a word."""
WORSE = 1.01
"""Of the best held-out loss: by so much the last one must be above it to be called worse."""


def summary(run: Run) -> dict[str, str]:
    """{what: value with its unit}, without what the run does not say."""
    last = run.steps[-1]
    tenth = max(1, len(run.steps) // 10)
    x, valid = run.points("valid/loss")
    lowest = min(range(len(valid)), key=valid.__getitem__) if valid else 0
    total = run.said("last_iteration")
    memory = run.points("perf/peak_memory_gb")[1]
    facts = {
        "steps": f"{last['iteration']:,}" + (f" of {total:,}" if isinstance(total, int) else ""),
        "epochs": _number(last.get("sft/epoch"), ".2f"),
        "tokens seen": _number(last.get("sft/tokens_seen"), ",.0f"),
        "loss, first tenth": _number(mean_loss(run.steps[:tenth]), ".4f"),
        "loss, last tenth": _number(mean_loss(run.steps[-tenth:]), ".4f"),
        "held-out, last": _number(valid[-1], ".4f") if valid else "",
        "held-out, lowest": f"{valid[lowest]:.4f} at {x[lowest]:,}" if valid else "",
        "tokens per second": _number(_median(run, "perf/tokens_per_s"), ",.0f"),
        "TFLOP/s per GPU": _number(_median(run, "perf/tflops_per_gpu"), ".3g"),
        "peak memory": f"{max(memory):.3g} GB" if memory else "",
        "time in steps": _duration(sum(run.points("perf/step_ms")[1]) / 1000),
        "skipped steps": _number(last.get("skipped_iterations"), ",.0f"),
    }
    return {name: value for name, value in facts.items() if value}


def findings(run: Run) -> list[str]:
    """Sentences, the most important first; none where all is as it should be."""
    sentences = [f"The last attempt {attempt.outcome.rstrip('.')}." for attempt in run.attempts[-1:] if attempt.is_fault]
    return [*sentences, *_of_loss(run), *_of_speed(run)]


def _of_loss(run: Run) -> list[str]:
    sentences = []
    tenth = max(1, len(run.steps) // 10)
    first, last = mean_loss(run.steps[:tenth]), mean_loss(run.steps[-tenth:])
    broken = [step["iteration"] for step in run.steps if is_number(step.get("sft/loss")) and not math.isfinite(step["sft/loss"])]
    if broken:
        sentences.append(f"The loss was no finite number at {len(broken):,} steps, first at iteration {broken[0]:,}.")
    if len(run.steps) >= 10 and last >= first:
        sentences.append(f"The training loss did not fall: {first:.4f} in the first tenth of the steps, {last:.4f} in the last.")
    x, valid = run.points("valid/loss")
    if len(valid) > 1:
        lowest = min(range(len(valid)), key=valid.__getitem__)
        if valid[-1] > WORSE * valid[lowest]:
            kept = run.best if run.best and run.best.get("iteration") == x[lowest] else None
            where = " That checkpoint is kept." if kept else ""
            sentences.append(
                f"The held-out loss was lowest at iteration {x[lowest]:,} ({valid[lowest]:.4f}) and rose to {valid[-1]:.4f} by "
                f"iteration {x[-1]:,}: the later steps fit the training rows alone.{where}"
            )
    if skipped := run.skipped():
        sentences.append(f"{len(skipped):,} of {len(run.steps):,} steps were skipped for their loss.")
    return sentences


def _of_speed(run: Run) -> list[str]:
    waits, steps = run.points("data/wait_ms")[1], run.points("perf/step_ms")[1]
    share = sum(waits[1:]) / sum(steps[1:]) if sum(steps[1:]) > 0 else 0.0
    if share <= SLOW_LOADER:
        return []
    return [f"{share:.0%} of the time went into waiting for rows: try more --prefetch, or `megatron-sft prepare` first."]


def _median(run: Run, name: str) -> float:
    values = [value for value in run.points(name)[1] if math.isfinite(value)]
    return statistics.median(values) if values else float("nan")


def _number(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) and math.isfinite(value) else ""


def _duration(seconds: float) -> str:
    """75 -> 1 min 15 s"""
    if not math.isfinite(seconds) or seconds <= 0:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds % 60:.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
