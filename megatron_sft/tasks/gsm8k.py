"""GSM8K (https://github.com/openai/grade-school-math): word problems whose answer is a number, written after ####.

Its solutions hold <<48/2=24>>: a calculator gives what stands behind the =. A model that was trained on them so, as nanochat's
are, writes <<48/2= in its answers; `calculated` then says what follows. Not here: the model's answers (evaluation.py).
"""

import ast
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft.errors import DataError
from megatron_sft.tasks.question import Question, examples, hub_rows, require, text_of

HUB = "openai/gsm8k"
_NUMBER = re.compile(r"-?\$?[\d.,]*\d")
_AFTER_MARK = re.compile(r"#### *(-?\$?[\d.,]*\d)")
STOP = ("Question:", "</s>", "<|im_end|>")
"""Each ends a raw text."""
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_ASKED = re.compile(r"<<([^<>=]{1,100})=$")
_OPERATORS: Mapping[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@dataclass(frozen=True)
class Solved(Question):
    """A question that can be an example."""

    solution: str = ""
    """With #### and the answer at its end."""


def load(place: str, few_shots: int) -> list[tuple[Question, Sequence[Question]]]:
    """The test questions; rows have question and answer, whose last line is #### and the number."""

    def rows(split: str) -> Iterator[Question]:
        return (_question(row, where) for where, row in hub_rows("gsm8k", place, split, "main"))

    shots = examples("gsm8k", place, few_shots, rows)
    return [(question, shots) for question in rows("test")]


def _question(row: dict[str, Any], where: str) -> Question:
    require(row, ("question", "answer"), where)
    solution = text_of(row["answer"], "answer", where)
    answer = number_after_mark(solution)
    if answer is None:
        raise DataError(f"{where}: the answer has no number after ####; expected one at its end. Mend the row.")
    return Solved("gsm8k", text_of(row["question"], "question", where), (), answer, where, solution)


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """What a user says: the question alone, as in nanochat."""
    return question.question


def chat_prompt(question: Question, shots: Sequence[Question]) -> str:
    """The same with a word on how to end, for models that were not trained on GSM8K."""
    return f"{question.question}\n\nThink step by step, and end with #### and the number alone."


def continued(question: Question, shots: Sequence[Solved]) -> str:
    """Raw text that goes on with a solution; of lm-evaluation-harness (lm_eval/tasks/gsm8k/gsm8k.yaml)."""
    before = "".join(f"Question: {shot.question}\nAnswer: {shot.solution}\n\n" for shot in shots)
    return f"{before}Question: {question.question}\nAnswer:"


def number_after_mark(text: str) -> str | None:
    """The number behind the first ####, without commas and dollar signs: "#### 1,200" -> "1200"."""
    match = _AFTER_MARK.search(text)
    return _plain(match[1]) if match else None


def _plain(number: str) -> str:
    return re.sub(r"[,$]", "", number).rstrip(".")


def score(question: Question, answer: str) -> float:
    """1 where the number after #### is the right one."""
    return float(number_after_mark(answer) == question.answer)


def strict_score(question: Question, answer: str) -> float:
    """The same as lm-evaluation-harness's strict-match: a number with a dollar sign is none."""
    match = _STRICT.search(answer)
    return float(match is not None and _plain(match[1]) == question.answer)


def chat_score(question: Question, answer: str) -> float:
    """The same; without #### the last number of the answer counts. 18.00 is 18."""
    numbers = _NUMBER.findall(answer)
    said = number_after_mark(answer) or (_plain(numbers[-1]) if numbers else None)
    try:
        return float(said is not None and float(said) == float(question.answer))
    except ValueError:  # 1.2.3
        return 0.0


def calculated(text: str) -> str:
    """What a calculator adds to an answer so far: after "... <<48/2=" it is "24>>"; "" where nothing is asked of it."""
    match = _ASKED.search(text)
    if not match:
        return ""
    value = _value(match[1])
    return "" if value is None else f"{value:.10g}>>"


def _value(expression: str) -> float | None:
    """Of numbers, + - * / // % and brackets alone; None for anything else."""
    try:
        return float(_of(ast.parse(expression.replace(",", "").strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _of(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_of(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_of(node.left), _of(node.right)))
    raise ValueError("no arithmetic")
