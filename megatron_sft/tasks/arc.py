"""ARC (https://allenai.org/data/arc): science questions of schools with three to five choices.

Formats: the text of each choice after "Answer:", whose probability counts (lm-evaluation-harness: arc_easy, arc_challenge), or
the letter of a choice in a chat. Not here: the model's answers (evaluation.py).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_sft.errors import DataError
from megatron_sft.tasks.choices import lettered
from megatron_sft.tasks.question import LETTERS, Question, examples, hub_rows, require, text_of, texts_of

HUB = "allenai/ai2_arc"
SUBSETS = {"arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge"}


def load_of(task: str) -> Callable[[str, int], list[tuple[Question, Sequence[Question]]]]:
    """load(place, few_shots) of one half of ARC."""

    def load(place: str, few_shots: int) -> list[tuple[Question, Sequence[Question]]]:
        def rows(split: str) -> Iterator[Question]:
            return (_question(row, where, task) for where, row in hub_rows(task, place, split, SUBSETS[task]))

        shots = examples(task, place, few_shots, rows)
        return [(question, shots) for question in rows("test")]

    return load


def _question(row: dict[str, Any], where: str, task: str) -> Question:
    """A row of the hub's data set (choices: {text, label}) or of ARC's own files (question: {stem, choices})."""
    require(row, ("question", "answerKey"), where)
    stem: Any = row["question"]
    choices: Any = row.get("choices")
    if isinstance(stem, dict):
        stem, choices = stem.get("stem"), stem.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    texts, labels = (choices.get("text", []), choices.get("label", [])) if isinstance(choices, dict) else ([], [])
    key = str(row["answerKey"])
    if not 2 <= len(texts) <= len(LETTERS) or len(texts) != len(set(map(str, labels))) or key not in map(str, labels):
        found = f"{len(texts)} choices, {len(labels)} labels, answerKey {key!r}"
        raise DataError(f"{where}: {found}; expected 2 to 5 choices with a label each, and one of these. Mend the row.")
    asked, choices = text_of(stem, "question", where), texts_of(texts, "choices", where)
    return Question(task, asked, choices, [str(label) for label in labels].index(key), where)


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """The text that each choice follows; examples before it have theirs, and a blank line."""
    before = "".join(f"Question: {shot.question}\nAnswer: {shot.choices[int(shot.answer)]}\n\n" for shot in shots)
    return f"{before}Question: {question.question}\nAnswer:"


def chat_prompt(question: Question, shots: Sequence[Question]) -> str:
    """What a user says, answered by a letter."""
    return lettered(question)
