"""The tasks, by the name of their score: what is asked, in the format of whose evaluator.

A new task is a file with `load`, `prompt` and `score`, and a row here; evaluation.py does the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_sft.config.options import MMLUConfig
from megatron_sft.tasks import mmlu


class Kind(Enum):
    """How an answer is had."""

    LETTER = "letter"
    """The likeliest of the tokens of " A", " B", " C" and " D" after the prompt; the answer is its index."""


@dataclass(frozen=True)
class Task:
    """What a model is asked, and what its answers are worth."""

    load: Callable[[MMLUConfig], list[tuple[Any, Sequence[Any]]]]
    """The questions, in order, each with the examples that stand before it. DataError where the data are wrong."""
    prompt: Callable[[Any, Sequence[Any]], str]
    """A question and its examples as the text that the model reads."""
    kind: Kind
    score: Callable[[Sequence[Any], Sequence[int]], dict[str, Any]]
    """Questions and answers -> what is written; "average" is compared with --lower-bound."""
    table: Callable[[Mapping[str, Any]], str]
    """The scores as text."""


TASKS: Mapping[str, Task] = {
    "mmlu/lm-eval": Task(mmlu.load, mmlu.prompt, Kind.LETTER, mmlu.score, mmlu.table),
}
