"""What a task asks, and where its rows come from: local files first, then the hub."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sft.config.run import DataConfig
from megatron_sft.data.schema import valid_text
from megatron_sft.data.sources import open_source
from megatron_sft.errors import DataError

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    """One question, with its right answer: the index of a choice, or a text."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int | str
    where: str


def hub_rows(task: str, place: str, split: str, config: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, of a folder whose files are named for splits, or of a data set of the hub.

    Args:
        task: as --eval-data names it.
        place: path or hub name; of a folder with one for each configuration that of `config` is read.
        split: that is read where there are several.
        config: of a data set of the hub that has several.

    Raises:
        DataError: nothing is there, or a line is no object; it says what to download.
    """
    inner = os.path.join(place, config or "")
    if config and os.path.isdir(inner):
        place, config = inner, None
    try:
        for where, row in open_source(place, DataConfig(data_split=split, data_config=config)):
            if isinstance(row, DataError):
                raise row
            yield where, row
    except DataError as error:
        raise DataError(f"{error} For this task the place is --eval-data {task}=PLACE.") from None


def examples(task: str, place: str, count: int, rows: Callable[[str], Iterator[Question]]) -> list[Question]:
    """The first questions of the training split, which stand before each question of a test.

    Args:
        task: as --eval-data names it.
        place: of its rows; a single file has one split alone.
        count: wanted; 0: nothing is read.
        rows: split -> its questions.

    Raises:
        DataError: there are fewer.
    """
    if not count:
        return []
    shots = [] if os.path.isfile(place) else list(itertools.islice(rows("train"), count))
    if len(shots) < count:
        has = "one file" if os.path.isfile(place) else f"{len(shots)} training rows"
        expected = f"expected {count} as examples (--eval-few-shots), from a folder with files named train and test"
        raise DataError(f"{place}: {has}; {expected}. Name such a folder (--eval-data {task}=FOLDER), or ask for none.")
    return shots


def require(row: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises DataError where a row lacks a field."""
    missing = [name for name in names if name not in row]
    if missing:
        has = ", ".join(sorted(row)[:12]) or "nothing"
        raise DataError(f"{where}: has {has}; expected also {', '.join(missing)}. Correct the file, or name another place.")


def text_of(value: Any, name: str, where: str) -> str:
    """A field that is asked: DataError where it is no text, or holds what UTF-8 cannot. None is not asked as "None"."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {value!r:.40}; expected text. Mend the row.")
    return valid_text(value, where, name)


def texts_of(values: Any, name: str, where: str) -> tuple[str, ...]:
    """The same of a list, whose numbers count as text."""
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: {name} is {values!r:.40}; expected a list of texts. Mend the row.")
    return tuple(str(value) if type(value) in (int, float) else text_of(value, name, where) for value in values)
