"""HumanEval (https://github.com/openai/human-eval): write the function that a docstring describes; its tests decide.

Formats: the program goes on as raw text up to a stop string (lm-evaluation-harness), or an answer in a chat has the whole
function, in a fence or not (nanochat). Programs run in sandbox.py. Not here: the model's answers (evaluation.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sft.tasks.question import Question, hub_rows, require, text_of

HUB = "openai/openai_humaneval"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem(Question):
    """A question whose right answer is a body; what is asked is the beginning of a program."""

    tests: str = ""
    """Defines check(candidate)."""
    entry_point: str = ""
    """Name of the function."""


def load(place: str, few_shots: int) -> list[tuple[Question, Sequence[Question]]]:
    """Rows have task_id, prompt, canonical_solution, test and entry_point. A file may be gzipped."""
    pairs: list[tuple[Question, Sequence[Question]]] = []
    names = ("prompt", "canonical_solution", "test", "entry_point")
    for where, row in hub_rows("humaneval", place, "test"):
        require(row, names, where)
        asked, solution, tests, entry_point = (text_of(row[name], name, where) for name in names)
        pairs.append((Problem(str(row.get("task_id", where)), asked, (), solution, where, tests, entry_point), ()))
    return pairs


def prompt(question: Problem, shots: Sequence[Question]) -> str:
    """The signature and the docstring."""
    return question.question


def continued(question: Problem, answer: str) -> str:
    """The program of an answer that goes on where the prompt ends."""
    return _checked(question, question.question + answer)


def answered(question: Problem, answer: str) -> str:
    """The program of an answer in a chat: the first fence's text, or all of it, behind the prompt's imports."""
    fence = _FENCE.search(answer)
    code = fence[1] if fence else answer
    return _checked(question, "\n".join([*_IMPORT.findall(question.question.partition("def ")[0]), "", code]))


def _checked(question: Problem, program: str) -> str:
    return f"{program}\n\n{question.tests}\n\ncheck({question.entry_point})\n"
