"""Bits per byte: how well a model predicts any text, whatever its tokenizer. The less the better.

Each document follows the tokenizer's first token (bos, else eos) and is cut into windows of at most WINDOW tokens, each of which
sees the last token before it: what lm-evaluation-harness calls rolling. Not here: the probabilities (evaluation.py).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_sft.errors import DataError
from megatron_sft.tasks.question import Question, hub_rows, require, text_of

WINDOW = 2048


def load(place: str, few_shots: int) -> list[tuple[Question, Sequence[Question]]]:
    """A .txt file is one document; rows of other files have `text`."""
    if not place:
        raise DataError("text/bits-per-byte: no text is named; expected some. Pass --eval-data text=FILE.txt, or rows with text.")
    if place.endswith(".txt"):
        try:
            documents = [(place, Path(place).read_text(encoding="utf-8-sig"))]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{place}: cannot be read ({error}); expected UTF-8 text. Correct --eval-data text=.") from None
    else:
        documents = []
        for where, row in hub_rows("text", place, "test"):
            require(row, ("text",), where)
            documents.append((where, text_of(row["text"], "text", where)))
    pairs = [(Question("text", text, (), "", where), ()) for where, text in documents if text]
    if not pairs:
        raise DataError(f"{place}: has no text; expected some. Correct --eval-data text=.")
    return list(pairs)


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """The document."""
    return question.question


def score(question: Question, nats: float) -> float:
    """Bits a byte of its UTF-8, of the negative logarithm of the document's probability."""
    return nats / math.log(2) / weight(question)


def weight(question: Question) -> int:
    """Bytes: the score of several documents is that of all their bytes."""
    return len(question.question.encode())
