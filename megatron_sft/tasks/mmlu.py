"""MMLU (https://github.com/hendrycks/test): which of four letters a model finds most likely after "Answer:".

Prompts are those of the original evaluate.py and of lm-evaluation-harness: raw text, no chat template. Not here: the model's
answers (evaluation.py).
"""

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_sft.config.run import DataConfig
from megatron_sft.data.sources import open_source, read_file
from megatron_sft.errors import DataError
from megatron_sft.tasks.choices import lettered
from megatron_sft.tasks.question import Question, text_of, texts_of

LETTERS = "ABCD"
TRAINING = ("auxiliary_train", "train")
"""Splits that no question of a test is in."""
CONFIGS = {"cais/mmlu": "all"}
"""Configuration of a data set of the hub, where the user names none: all subjects in one."""
_SPLIT = re.compile(r"(?:^|[/_.-])(dev|test|val|validation|auxiliary_train|train)(?=[/_.-]|$)")
_DATA_FILE = re.compile(r"\.(csv|jsonl|ndjson|json|parquet|arrow)(\.gz|\.zst)?$")


Subjects = dict[str, list[Question]]


def examples(path: str) -> dict[str, Subjects]:
    """Reads the questions.

    Args:
        path: a folder with SUBJECT/{dev,test}/*, SUBJECT/{dev,test}*.parquet or {dev,test}/SUBJECT_{dev,test}.csv; one
            file with subject, question, choices and answer (and perhaps split); or a hub name.

    Returns:
        {"dev": {subject: questions}, "test": {subject: questions}}, subjects in alphabetical order.

    Raises:
        DataError: no test question there, or a row that is no question; the message names file and line.
    """
    by_split: dict[str, Subjects] = {"dev": {}, "test": {}}
    for split, question in _questions(path):
        if split in by_split:
            by_split[split].setdefault(question.subject, []).append(question)
    if not by_split["test"]:
        raise DataError(f"{path}: has no test question; expected files or folders named test. Check the path.")
    return {split: dict(sorted(subjects.items())) for split, subjects in by_split.items()}


def _questions(path: str) -> Iterator[tuple[str, Question]]:
    if os.path.isfile(path):
        for where, row in _rows(path):
            yield str(row.get("split", "test")) if isinstance(row, dict) else "test", _question(row, where, "")
    elif os.path.isdir(path):
        for file, split, subject in _files(path):
            for where, row in _rows(file):
                yield split, _question(row, where, subject)
    else:
        for split in ("dev", "test"):
            for where, row in open_source(path, DataConfig(data_split=split, data_config=CONFIGS.get(path))):
                yield split, _question(row, where, "")


def _files(folder: str, keeps: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(file, split, subject as the path says it) of a folder's data files; the sum of all subjects is left out.

    Args:
        folder: of the files.
        keeps: folders of splits that are not left out.
    """
    names = sorted(os.path.relpath(os.path.join(top, name), folder) for top, _, inside in os.walk(folder) for name in inside)
    other = (".", "state.", "dataset_info")
    data = [name for name in names if _DATA_FILE.search(name) and not os.path.basename(name).startswith(other)]
    if any(not name.startswith("all" + os.sep) for name in data):
        left = [name + os.sep for name in ("all", TRAINING[0]) if name not in keeps]
        data = [name for name in data if not name.startswith(tuple(left))]
    for name in data:
        split = _SPLIT.search(name)
        stem = _DATA_FILE.sub("", os.path.basename(name))
        parts = name.split(os.sep)[:-1]
        subject = next((part for part in parts if not _SPLIT.fullmatch(part)), re.sub(r"_(dev|test|val)$", "", stem))
        if split:
            yield os.path.join(folder, name), split[1], subject


def _rows(file: str) -> Iterator[tuple[str, Any]]:
    if not file.endswith(".csv"):
        yield from read_file(file)
        return
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        for row in reader:
            if len(row) != 6:
                where = f"{file}:{reader.line_num}"
                raise DataError(f"{where}: {len(row)} columns; expected question, four choices, letter. Mend the row.")
            if row[0] != "question":
                yield f"{file}:{reader.line_num}", {"question": row[0], "choices": row[1:5], "answer": row[5]}


def _question(row: Any, where: str, subject: str) -> Question:
    if isinstance(row, DataError):
        raise row
    missing = [name for name in ("question", "choices", "answer") if name not in row]
    if missing:
        raise DataError(f"{where}: no {', '.join(missing)}; expected question, choices, answer. Correct the file.")
    choices, answer = texts_of(row["choices"], "choices", where), str(row["answer"]).strip()
    index = LETTERS.find(answer) if len(answer) == 1 and answer in LETTERS else "0123".find(answer) if len(answer) == 1 else -1
    if len(choices) != 4 or index < 0:
        raise DataError(f"{where}: {len(choices)} choices and answer {answer!r}; expected 4, and 0 to 3 or A to D. Mend the row.")
    about = row.get("subject") or subject
    return Question(text_of(about, "subject", where), text_of(row["question"], "question", where), choices, index, where)


def training_questions(path: str) -> Iterator[Question]:
    """The questions that a model may be trained on.

    Args:
        path: as `examples` reads it, of which the splits auxiliary_train and train are taken, and of a file rows without a
            split too; or a hub name, whose configuration auxiliary_train is.

    Raises:
        DataError: a row is no question; the message names file and line.
    """
    if os.path.isdir(path):
        for file, split, subject in _files(path, TRAINING):
            if split in TRAINING:
                yield from (_question(row, where, subject) for where, row in _rows(file))
        return
    config = DataConfig(data_split="train", data_config=TRAINING[0])
    for where, row in _rows(path) if os.path.isfile(path) else open_source(path, config):
        if isinstance(row, DataError) or str(row.get("split", TRAINING[0])) in TRAINING:
            inner = row.get("train", row) if isinstance(row, dict) else row  # cais/mmlu wraps these rows
            yield _question(inner, where, "")


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """The text that ends in "Answer:"; examples before it end in "Answer: B" and a blank line."""
    head = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    return head + "".join(f"{lettered(shot)} {LETTERS[int(shot.answer)]}\n\n" for shot in shots) + lettered(question)


def by_subject(questions: Sequence[Question], chosen: Sequence[int]) -> dict[str, Any]:
    """Accuracy of each subject, over all questions (average) and over subjects (macro_average)."""
    subjects: dict[str, dict[str, Any]] = {}
    for question, choice in zip(questions, chosen, strict=True):
        entry = subjects.setdefault(question.subject, {"correct": 0, "total": 0, "predictions": []})
        entry["correct"] += choice == question.answer
        entry["total"] += 1
        entry["predictions"].append(LETTERS[choice])
    for entry in subjects.values():
        entry["accuracy"] = entry["correct"] / entry["total"]
    correct = sum(entry["correct"] for entry in subjects.values())
    macro = sum(entry["accuracy"] for entry in subjects.values()) / len(subjects)
    total = len(questions)
    return {"average": correct / total, "macro_average": macro, "correct": correct, "total": total, "subjects": subjects}


def table(scores: Mapping[str, Any]) -> str:
    """The scores as text, one subject a line."""
    lines = [f"{'subject':40} {'questions':>9} {'accuracy':>8}"]
    lines += [f"{name:40} {entry['total']:9d} {entry['accuracy']:8.4f}" for name, entry in scores["subjects"].items()]
    lines += [f"{'average over questions':40} {scores['total']:9d} {scores['average']:8.4f}"]
    return "\n".join([*lines, f"{'average over subjects':40} {len(scores['subjects']):9d} {scores['macro_average']:8.4f}"])


def load(
    place: str, few_shots: int, fraction: float = 1.0, flag: str = "--eval-data mmlu="
) -> list[tuple[Question, Sequence[Question]]]:
    """The questions that are asked, subject by subject, each with its examples.

    Args:
        place: as `examples` reads it.
        few_shots: examples before each question, from the dev split.
        fraction: share of each subject's questions, from the first.
        flag: that named the place, for messages.

    Raises:
        DataError: a subject has fewer dev questions than that, and what `examples` raises.
    """
    data = examples(place)
    asked: list[tuple[Question, Sequence[Question]]] = []
    for subject, questions in data["test"].items():
        shots = data["dev"].get(subject, [])[:few_shots]
        if len(shots) < few_shots:
            raise DataError(
                f"{place} ({flag}): {subject} has {len(shots)} dev questions; expected {few_shots} as examples. Ask for "
                "fewer, or add the dev split."
            )
        asked += [(question, shots) for question in questions[: math.ceil(len(questions) * fraction)]]
    return asked
