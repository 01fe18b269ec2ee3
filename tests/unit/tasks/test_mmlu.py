"""MMLU's prompts, its layouts on disk, and every prediction against transformers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sft.config.options import MMLUConfig
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig
from megatron_sft.core_compat import install_cpu_mode
from tests.text_models import text_model

install_cpu_mode()

from megatron_sft.errors import ConfigError, DataError  # noqa: E402
from megatron_sft.tasks import evaluation, mmlu  # noqa: E402

SUBJECTS = ("high_school_algebra", "anatomy")


def question(subject: str, split: str, number: int) -> dict[str, Any]:
    choices = [f"{subject[:2]} {split} {number + i}" for i in range(4)]
    asked = f"How {'very ' * (number % 4)}much, {number}?"
    return {"subject": subject, "question": asked, "choices": choices, "answer": number % 4}


def rows(subject: str) -> list[tuple[str, dict[str, Any]]]:
    sizes = (("dev", 5), ("test", 7), ("validation", 2))
    return [(split, question(subject, split, number)) for split, size in sizes for number in range(size)]


def write_jsonl_tree(root: Path) -> Path:
    for subject in SUBJECTS:
        for split, row in rows(subject):
            (root / subject / split).mkdir(parents=True, exist_ok=True)
            with (root / subject / split / "data.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    return root


def write_csv_tree(root: Path) -> Path:
    for subject in SUBJECTS:
        for split, row in rows(subject):
            short = {"validation": "val"}.get(split, split)
            (root / short).mkdir(parents=True, exist_ok=True)
            with (root / short / f"{subject}_{short}.csv").open("a", newline="") as file:
                csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])
    return root


def write_parquet_tree(root: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    for subject in (*SUBJECTS, "all"):
        (root / subject).mkdir(parents=True)
        for split in ("dev", "test"):
            found = [row for name in SUBJECTS for where, row in rows(name) if where == split and subject in (name, "all")]
            parquet.write_table(pyarrow.Table.from_pylist(found), root / subject / f"{split}-00000-of-00001.parquet")
    return root


def write_one_file(root: Path) -> Path:
    file = root / "mmlu.jsonl"
    file.write_text("".join(json.dumps({**row, "split": split}) + "\n" for name in SUBJECTS for split, row in rows(name)))
    return file


@pytest.mark.parametrize("write", [write_jsonl_tree, write_csv_tree, write_parquet_tree, write_one_file])
def test_every_layout_gives_the_same_questions(write: Any, tmp_path: Path) -> None:
    found = mmlu.examples(str(write(tmp_path)))
    assert list(found["test"]) == sorted(SUBJECTS)
    for split, size in (("dev", 5), ("test", 7)):
        for subject in SUBJECTS:
            expected = [question(subject, split, number) for number in range(size)]
            got = [
                {"subject": q.subject, "question": q.question, "choices": list(q.choices), "answer": q.answer}
                for q in found[split][subject]
            ]
            assert got == expected


def test_prompt_has_the_same_separators_in_examples_and_question() -> None:
    one = mmlu.Question("us_law", "Who?", ("a", "b", "c", "d"), 1, "f:1")
    two = mmlu.Question("us_law", "Why?", ("e", "f", "g", "h"), 2, "f:2")
    assert mmlu.prompt(two, [one]) == (
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\nWhy?\nA. e\nB. f\nC. g\nD. h\nAnswer:"
    )


def test_fraction_is_of_each_subject_and_few_shots_come_from_dev(tmp_path: Path) -> None:
    asked = mmlu.load(str(write_jsonl_tree(tmp_path)), 3, 0.4)
    texts = [mmlu.prompt(*pair) for pair in asked]
    assert [q.subject for q, _ in asked] == ["anatomy"] * 3 + ["high_school_algebra"] * 3
    assert [text.count("\nAnswer:") for text in texts] == [4] * 6


def test_too_many_few_shots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--few-shots is 6; expected a whole number from 0 to 5\."):
        evaluation.evaluate_mmlu(RunConfig(), frozenset(), MMLUConfig(few_shots=6))
    rows = write_jsonl_tree(tmp_path) / "anatomy" / "dev" / "data.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(DataError, match="anatomy has 2 dev questions; expected 3"):
        mmlu.load(str(tmp_path), 3)


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mmlu.jsonl"
    good = json.dumps(question("anatomy", "test", 0))
    wrong = (("question", None, "question is None; expected text"), ("choices", "abcd", "choices is 'abcd'; expected a list"))
    wrong += (("choices", ["a", None, "c", "d"], "choices is None"), ("question", "\ud800", "question has a lone surrogate"))
    for key, value, message in (
        *wrong,
        ("answer", 4, "answer '4'"),
        ("choices", ["a"], "1 choices"),
        ("answer", "AB", "answer 'AB'"),
    ):
        file.write_text(good + "\n" + json.dumps({**json.loads(good), key: value}) + "\n")
        with pytest.raises(DataError, match=f"mmlu.jsonl:2: .*{message}"):
            mmlu.examples(str(file))
    file.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match=r"mmlu\.jsonl:1: no choices, answer"):
        mmlu.examples(str(file))


def test_average_is_over_questions_and_macro_average_over_subjects() -> None:
    one = mmlu.Question("a", "?", ("", "", "", ""), 1, "")
    two = mmlu.Question("b", "?", ("", "", "", ""), 2, "")
    scores = mmlu.by_subject([one, one, one, two], [1, 1, 0, 0])
    assert (scores["average"], scores["macro_average"]) == (0.5, pytest.approx(1 / 3))
    assert scores["subjects"]["a"] == {"correct": 2, "total": 3, "accuracy": pytest.approx(2 / 3), "predictions": ["B", "B", "A"]}


@pytest.mark.parametrize("few_shots", [0, 2])
def test_predictions_equal_transformers_and_lower_bound_sets_the_status(few_shots: int, tmp_path: Path) -> None:
    model = text_model("llama", tmp_path / "model")
    data = write_jsonl_tree(tmp_path / "mmlu")
    output = tmp_path / "scores.json"
    run = RunConfig(
        checkpoint=CheckpointConfig(load=str(tmp_path / "model")), data=DataConfig(tokenizer_model=str(tmp_path / "model"))
    )
    options = MMLUConfig(mmlu_dataset=str(data), few_shots=few_shots, mmlu_batch_size=3, output=str(output), lower_bound=0.0)
    assert evaluation.evaluate_mmlu(run, frozenset(), options) == 0
    scores = json.loads(output.read_text())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [mmlu.prompt(*pair) for pair in mmlu.load(str(data), few_shots)]
    letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCD"]
    expected = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][-512:]
        with torch.no_grad():
            expected.append("ABCD"[model(torch.tensor([ids]), use_cache=False).logits[0, -1, letters].argmax()])
    assert [letter for entry in scores["subjects"].values() for letter in entry["predictions"]] == expected
    assert scores["total"] == len(texts) == 14
    bound = MMLUConfig(**{**options.__dict__, "lower_bound": scores["average"] + 0.01})
    assert evaluation.evaluate_mmlu(run, frozenset(), bound) == 1
