"""The tasks, by the name of their score: what is asked, in the format of whose evaluator.

A new task is a file with `load`, `prompt` and `score`, a row here, and its name in config/tasks.py; evaluation.py does the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_sft.tasks import arc, choices, gsm8k, humaneval, mmlu, spelling, text
from megatron_sft.tasks.question import Question

Asked = Sequence[tuple[Question, Sequence[Question]]]
"""Questions, each with the examples that stand before it."""


class Kind(Enum):
    """How an answer is had."""

    LETTER = "letter"
    """The likeliest of the tokens of " A", " B" ... after the prompt; the answer is its index."""
    CHAT_LETTER = "letter in a chat"
    """The likeliest of those of "A", "B" ... as the first token of an answer to what a user says."""
    CHOICE = "choice"
    """The choice whose text, behind a blank, is the likeliest after the prompt; the answer is its index."""
    CHOICE_NORM = "choice by length"
    """The same, of the logarithm divided by the characters of the choice."""
    TEXT = "text"
    """The greedy continuation of the prompt."""
    CHAT_TEXT = "answer in a chat"
    """The greedy answer to what a user says."""
    NATS = "nats"
    """Minus the natural logarithm of the prompt's probability."""


def _one(question: Question) -> float:
    return 1.0


@dataclass(frozen=True)
class Task:
    """What a model is asked, and what its answers are worth."""

    load: Callable[[str, int], Asked]
    """(place, examples a question) -> the questions, in order. DataError where the rows are wrong."""
    prompt: Callable[[Any, Sequence[Any]], str]
    """A question and its examples as the text that the model reads."""
    kind: Kind
    score: Callable[[Any, Any], float]
    """Question and answer -> what it is worth, mostly 0 or 1."""
    hub: str = ""
    """Where rows are when --eval-data does not say it."""
    few_shots: int = 0
    """Examples that a question can have."""
    stop: tuple[str, ...] = ()
    """Each ends a text."""
    adds: Callable[[str], str] | None = None
    """Of a text: the end of the answer so far -> what is put behind it in the model's place; "" for nothing."""
    weight: Callable[[Any], float] = _one
    """Of a question in the mean."""
    is_lower_better: bool = False
    program: Callable[[Any, str], str] | None = None
    """Of question and answer: what is run in sandbox.py; it decides, and `score` is not asked."""


def _arc(name: str, prompt: Callable[[Any, Sequence[Any]], str], kind: Kind) -> Task:
    return Task(arc.load_of(name), prompt, kind, choices.is_right, arc.HUB, 5 if prompt is arc.prompt else 0)


def _humaneval(kind: Kind, program: Callable[[Any, str], str], stop: tuple[str, ...] = ()) -> Task:
    return Task(humaneval.load, humaneval.prompt, kind, choices.is_right, humaneval.HUB, stop=stop, program=program)


def _mmlu(prompt: Callable[[Any, Sequence[Any]], str], kind: Kind, few_shots: int) -> Task:
    return Task(mmlu.load, prompt, kind, choices.is_right, "cais/mmlu", few_shots)


TASKS: Mapping[str, Task] = {
    "mmlu/lm-eval": _mmlu(mmlu.prompt, Kind.LETTER, 5),
    "mmlu/chat-letter": _mmlu(mmlu.prompt, Kind.CHAT_LETTER, 5),
    "mmlu/nanochat": _mmlu(choices.nanochat, Kind.CHAT_LETTER, 0),
    "arc-easy/lm-eval": _arc("arc-easy", arc.prompt, Kind.CHOICE),
    "arc-easy/lm-eval-norm": _arc("arc-easy", arc.prompt, Kind.CHOICE_NORM),
    "arc-easy/chat-letter": _arc("arc-easy", arc.chat_prompt, Kind.CHAT_LETTER),
    "arc-easy/nanochat": _arc("arc-easy", choices.nanochat, Kind.CHAT_LETTER),
    "arc-challenge/lm-eval": _arc("arc-challenge", arc.prompt, Kind.CHOICE),
    "arc-challenge/lm-eval-norm": _arc("arc-challenge", arc.prompt, Kind.CHOICE_NORM),
    "arc-challenge/chat-letter": _arc("arc-challenge", arc.chat_prompt, Kind.CHAT_LETTER),
    "arc-challenge/nanochat": _arc("arc-challenge", choices.nanochat, Kind.CHAT_LETTER),
    "gsm8k/lm-eval": Task(gsm8k.load, gsm8k.continued, Kind.TEXT, gsm8k.strict_score, gsm8k.HUB, 5, gsm8k.STOP),
    "gsm8k/chat": Task(gsm8k.load, gsm8k.chat_prompt, Kind.CHAT_TEXT, gsm8k.chat_score, gsm8k.HUB),
    "gsm8k/nanochat": Task(gsm8k.load, gsm8k.prompt, Kind.CHAT_TEXT, gsm8k.score, gsm8k.HUB, adds=gsm8k.calculated),
    "humaneval/lm-eval": _humaneval(Kind.TEXT, humaneval.continued, humaneval.STOP),
    "humaneval/nanochat": _humaneval(Kind.CHAT_TEXT, humaneval.answered),
    "spelling-bee/chat": Task(spelling.load_of("spelling-bee"), spelling.prompt, Kind.CHAT_TEXT, spelling.bee_score),
    "simple-spelling/chat": Task(spelling.load_of("simple-spelling"), spelling.prompt, Kind.CHAT_TEXT, spelling.simple_score),
    "text/bits-per-byte": Task(text.load, text.prompt, Kind.NATS, text.score, weight=text.weight, is_lower_better=True),
}
