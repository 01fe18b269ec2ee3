"""What the files of a --save folder say of a run: metrics, attempts, settings, the best checkpoint, samples, scores.

Any of them but metrics.jsonl may be missing or damaged: what cannot be read is not shown. Not here: how it looks (page.py).
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from megatron_sft.attempts import ATTEMPTS, END, START, json_lines
from megatron_sft.errors import ConfigError

METRICS, SAMPLES, BEST, RUN_CONFIG = "metrics.jsonl", "samples.jsonl", "best_checkpoint.json", "run_config.json"
MOST_METRICS = 1 << 30
MOST_RUNS = 8
MOST_SCORES = 1 << 26
"""Bytes of one file of scores: each question has a number in it."""
Points = tuple[list[int], list[float]]
"""Iterations and values."""


@dataclass(frozen=True)
class Attempt:
    """A start of training and what became of it."""

    start: Mapping[str, Any]
    end: Mapping[str, Any] | None
    """None: none was written."""

    @property
    def outcome(self) -> str:
        """In words."""
        if self.end is None:
            return "has no end written: it still runs, or was killed, or the machine stopped"
        status, error = self.end.get("status"), self.end.get("error")
        if not isinstance(status, int):
            return "ended in a way that its line does not say"
        if error:
            return f"failed (status {status}): {error}"
        begun, ended = self.start.get("last_iteration"), self.end.get("iteration")
        if status == 0 and is_number(begun) and is_number(ended) and ended < begun:
            return f"ended early, at iteration {ended:,} of {begun:,} (--early-stop-patience)"
        if status > 128:
            return f"stopped by signal {status - 128}"
        return {0: "trained to the end", 4: "stopped by --exit-interval or --exit-duration-in-mins"}.get(
            status, f"status {status}"
        )

    @property
    def is_fault(self) -> bool:
        return self.end is None or bool(self.end.get("error"))


@dataclass(frozen=True)
class Scores:
    """A file of `megatron-sft eval --output`."""

    name: str
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run, as its files have it."""

    name: str
    steps: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl by iteration, each iteration once."""
    attempts: Sequence[Attempt] = ()
    config: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[Scores] = ()

    def names(self, prefix: str) -> list[str]:
        """Names of numbers with this prefix, in the order in which they come up."""
        return list(dict.fromkeys(name for step in self.steps for name, _ in numbers(step) if name.startswith(prefix)))

    def points(self, name: str) -> Points:
        """A number's iterations and values."""
        pairs = [(step["iteration"], step[name]) for step in self.steps if is_number(step.get(name))]
        return [x for x, _ in pairs], [float(y) for _, y in pairs]

    def said(self, name: str) -> Any:
        """What the newest start says under this name."""
        return self.attempts[-1].start.get(name) if self.attempts else None

    def skipped(self) -> list[int]:
        """Iterations without an update."""
        told = [
            (step["iteration"], step["skipped_iterations"]) for step in self.steps if is_number(step.get("skipped_iterations"))
        ]
        counts = [0, *(count for _, count in told)]
        return [iteration for (iteration, count), before in zip(told, counts, strict=False) if count > before]


def is_number(value: Any) -> TypeGuard[float]:
    """Also NaN and infinity; not what no float holds."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000)


def numbers(step: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in step.items() if is_number(value))


def read_runs(places: Sequence[str]) -> list[Run]:
    """Runs by their --save folders.

    Args:
        places: the folders; a file among them has scores, which are shown beside those in the folders of the runs.

    Raises:
        ConfigError: folders that are none, or that have no metrics.jsonl with a step, files without scores; all at once.
    """
    read, wrong = [], []
    files, places = [place for place in places if os.path.isfile(place)], [place for place in places if not os.path.isfile(place)]
    scores = {place: _scores(Path(place), place) for place in files}
    expected = "expected what megatron-sft eval --output writes. Name another file"
    wrong += [f"{place}: no scores of tasks; {expected}." for place, one in scores.items() if one is None]
    if not places:
        wrong.append(f"report: {', '.join(files)} alone; expected the --save folder of a run too. Name it first.")
    short = [os.path.basename(os.path.abspath(place)) for place in places]
    names = [name if short.count(name) == 1 else place for name, place in zip(short, places, strict=True)]
    if len(places) > MOST_RUNS:
        raise ConfigError([f"report: {len(places)} runs; expected at most {MOST_RUNS}, which one can tell apart. Name fewer."])
    for place, name in zip(places, names, strict=True):
        try:
            run = read_run(Path(place), name)
        except OSError as error:
            wrong.append(f"{place}: cannot be read ({error.strerror or error}). Expected the --save folder of a run.")
            continue
        if not run.steps:
            wrong.append(
                f"{place}: no {METRICS} with a step in it; expected the --save folder of a run that has trained. Check the path."
            )
        read.append(run)
    if wrong:
        raise ConfigError(wrong)
    return [dataclasses.replace(read[0], scores=[*read[0].scores, *filter(None, scores.values())]), *read[1:]]


def read_run(folder: Path, name: str) -> Run:
    """Raises OSError where a file of the folder cannot be read."""
    lines = (line for line in json_lines(folder / METRICS, MOST_METRICS) if _is_step(line))
    steps = {line["iteration"]: line for line in lines}
    attempts = _attempts(json_lines(folder / ATTEMPTS))
    config = attempts[-1].start.get("config") if attempts else None
    if not isinstance(config, dict):
        newest = max(folder.glob(f"iter_*/{RUN_CONFIG}"), default=None)
        config = _json(newest) if newest else None
    samples, best = json_lines(folder / SAMPLES), _json(folder / BEST)
    scores = [_scores(path, path.stem) for path in sorted(folder.glob("*.json"))]
    return Run(name, [steps[number] for number in sorted(steps)], attempts, config, best, samples, list(filter(None, scores)))


def _scores(path: Path, name: str) -> Scores | None:
    """None where the file holds something else."""
    tasks = (_json(path, MOST_SCORES) or {}).get("tasks")
    if not isinstance(tasks, dict):
        return None
    kept = {task: said for task, said in tasks.items() if isinstance(said, dict) and is_number(said.get("score"))}
    return Scores(name, kept) if kept else None


def _is_step(line: Mapping[str, Any]) -> bool:
    iteration = line.get("iteration")
    return isinstance(iteration, int) and not isinstance(iteration, bool) and 0 <= iteration < 1 << 53


def _attempts(lines: Sequence[Mapping[str, Any]]) -> list[Attempt]:
    """An end belongs to the start before it: one run at a time writes into a folder."""
    attempts: list[Attempt] = []
    for line in lines:
        if line.get("event") == START:
            attempts.append(Attempt(line, None))
        elif line.get("event") == END and attempts and attempts[-1].end is None:
            attempts[-1] = Attempt(attempts[-1].start, line)
    return attempts


def _json(path: Path, most_bytes: int = 1 << 20) -> Mapping[str, Any] | None:
    """A small JSON object; None where there is none."""
    if not path.is_file() or path.stat().st_size > most_bytes:
        return None
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def mean_loss(steps: Sequence[Mapping[str, Any]]) -> float:
    """The mean over the trained tokens of these steps; NaN where there are none."""
    pairs = [(step["sft/loss"], step.get("sft/trained_tokens", 1)) for step in steps if is_number(step.get("sft/loss"))]
    pairs = [(loss, tokens) for loss, tokens in pairs if math.isfinite(loss) and is_number(tokens) and tokens > 0]
    total = sum(tokens for _, tokens in pairs)
    return sum(loss * tokens for loss, tokens in pairs) / total if total else float("nan")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.seed": 1234} of {"train": {"seed": 1234}}."""
    flattened: dict[str, Any] = {}
    for name, value in config.items():
        flattened |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return flattened
