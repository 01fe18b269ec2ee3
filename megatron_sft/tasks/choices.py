"""How a question with choices is put: the wordings that mmlu.py and arc.py share."""

from collections.abc import Sequence

from megatron_sft.tasks.question import LETTERS, Question


def lettered(question: Question) -> str:
    """The question, a lettered choice a line, and "Answer:"; of MMLU's evaluate.py (https://github.com/hendrycks/test)."""
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{question.question.strip()}{choices}\nAnswer:"


def nanochat(question: Question, shots: Sequence[Question] = ()) -> str:
    """As nanochat trains and asks (https://github.com/karpathy/nanochat, tasks/common.py:render_mc): the letter comes last."""
    choices = "".join(f"- {choice}={letter}\n" for letter, choice in zip(LETTERS, question.choices, strict=False))
    asked = f"Multiple Choice question: {question.question}\n{choices}"
    return f"{asked}\nRespond only with the letter of the correct answer."


def is_right(question: Question, chosen: int) -> float:
    """1 where the chosen index is the answer's, else 0."""
    return float(chosen == question.answer)
