"""Which of two models is better, question by question: megatron-sft eval --compare A.json B.json. No model is asked."""

import json
from pathlib import Path
from typing import Any

from megatron_sft.errors import DataError
from megatron_sft.output import write_output
from megatron_sft.tasks.intervals import paired


def compare(first: str, second: str, output: str | None = None) -> str:
    """The table of differences, second - first, with their 95 % intervals.

    Args:
        first: file that `megatron-sft eval --output` wrote.
        second: another one.
        output: JSON file of the figures.

    Raises:
        DataError: a file is not there or is no such file, or they have no question of a task in common.
    """
    tasks, others = _tasks(first), _tasks(second)
    compared: dict[str, Any] = {}
    for name in tasks.keys() & others.keys():
        before, after = tasks[name]["questions"], others[name]["questions"]
        common = [question for question in before if question in after]
        weights = [float(tasks[name].get("weights", {}).get(question, 1.0)) for question in common]
        if common:
            compared[name] = paired([before[q] for q in common], [after[q] for q in common], weights)
            compared[name]["only_in_one"] = len(before.keys() ^ after.keys())
    if not compared:
        raise DataError(f"{first} and {second} have no question in common; expected scores of the same tasks. Score both alike.")
    if output:
        write_output("--output", output, json.dumps({"first": first, "second": second, "tasks": compared}, indent=1) + "\n")
    lines = [f"{'task':28} {'problems':>8} {'difference':>10} {'95 % interval':>19} {'A higher':>8} {'B higher':>8}"]
    for name, entry in sorted(compared.items()):
        span = f"{entry['low']:+.4f} to {entry['high']:+.4f}"
        higher = f"{entry['first_higher']:8d} {entry['second_higher']:8d}"
        lines.append(f"{name:28} {entry['count']:8d} {entry['difference']:+10.4f} {span:>19} {higher}")
        if entry["only_in_one"]:
            lines.append(f"{'':28} {entry['only_in_one']:8d} questions that only one of them was asked are left out")
    return "\n".join(lines)


def _tasks(file: str) -> dict[str, Any]:
    expected = "expected what megatron-sft eval --output wrote. Name such a file"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {expected}.") from None
    tasks: Any = content.get("tasks") if isinstance(content, dict) else None
    entries = tasks.values() if isinstance(tasks, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("questions"), dict) for entry in entries):
        raise DataError(f"{file}: has no tasks with the score of each question; {expected}.")
    for name, entry in tasks.items():
        for numbers in (entry["questions"], entry.get("weights", {})):
            if not isinstance(numbers, dict) or not all(map(_is_number, numbers.values())):
                raise DataError(f"{file}: {name} has scores that are no numbers; {expected}.")
    return dict(tasks)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300
