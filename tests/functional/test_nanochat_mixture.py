"""examples/nanochat/mixture.py in a small form: the files, the flags, and a run that trains on all six sources."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.errors import DataError
from megatron_sft.tasks import mmlu
from tests.functional.conftest import metrics_of
from tests.gloo import run_script

SCRIPT = "examples/nanochat/mixture.py"


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: str) -> list[list[str]]:
    """What was said, in turns, of each row."""
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    return [[turn["content"] for turn in row] for row in rows]


def test_the_mixture_is_made_and_trained(finetune: Any, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    inner = {"question": "2?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": ""}
    asked = write_rows(tmp_path / "mmlu.jsonl", {"train": inner}, {**inner, "answer": "D"}, {**inner, "split": "test"})
    solved = {"question": "Half of 48?", "answer": "It is <<48/2=24>>24.\n#### 24"}
    places = ["--smoltalk", rows_file, "--mmlu", asked, "--gsm8k", write_rows(tmp_path / "gsm8k.jsonl", solved)]
    identity = write_rows(
        tmp_path / "me.jsonl", {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    )
    words = tmp_path / "words.txt"
    words.write_text("apple\n")
    more = ["--identity", identity, "--words", words, "--simple-spelling", 2, "--spelling-bee", 3]
    done = run_script(SCRIPT, [tmp_path / "out", *places, *more])
    assert done.returncode == 0, done.stdout + done.stderr
    flags = shlex.split(done.stdout)
    names = ["smoltalk", "identity", "mmlu", "gsm8k", "simple-spelling", "spelling-bee"]
    made = [str(tmp_path / "out" / f"{name}.jsonl") for name in names[2:]]
    named = [word for pair in zip(names, [str(rows_file), str(identity), *made], strict=True) for word in pair]
    assert flags == ["--prompt-data", *named, "--prompt-data-epochs", "1", "2", "3", "4", "1", "1"]

    said = "Multiple Choice question: 2?\n- a=A\n- b=B\n- c=C\n- d=D\n\nRespond only with the letter of the correct answer."
    assert conversations(made[0]) == [[said, "C"], [said, "D"]]
    assert conversations(made[1]) == [[solved["question"], solved["answer"]]]
    assert conversations(made[2]) == [["Spell the word: apple", "apple:a,p,p,l,e"]] * 2
    assert [answer.partition("#### ")[2].isdecimal() for _, answer in conversations(made[3])] == [True] * 3

    flags += [
        "--load",
        str(tiny_folder),
        "--seq-length",
        "256",
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--num-workers",
        "1",
    ]
    trained = finetune(*flags, "--train-iters", 4, "--global-batch-size", 8, "--save", tmp_path / "save", needs=False)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    losses = {
        key.removeprefix("sft/loss/") for line in metrics_of(tmp_path / "save") for key in line if key.startswith("sft/loss/")
    }
    assert losses == set(names)


def test_what_is_left_out_is_not_made(rows_file: Path, tmp_path: Path) -> None:
    off = ["--mmlu-epochs", 0, "--gsm8k-epochs", 0, "--simple-spelling", 0, "--spelling-bee", 1]
    done = run_script(SCRIPT, [tmp_path / "out", "--smoltalk", rows_file, *off])
    flags = ["--prompt-data", "smoltalk", str(rows_file), "spelling-bee", str(tmp_path / "out/spelling-bee.jsonl")]
    assert shlex.split(done.stdout) == [*flags, "--prompt-data-epochs", "1", "1"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["spelling-bee.jsonl"]
    done = run_script(SCRIPT, [tmp_path / "out", "--gsm8k", tmp_path / "none.jsonl", "--mmlu-epochs", 0])
    assert done.returncode == 2 and "none.jsonl: " in done.stderr and done.stdout == ""


def test_training_questions_are_not_those_of_a_test(tmp_path: Path) -> None:
    row = {"question": "q", "choices": list("abcd"), "answer": 0}
    for folder in ("anatomy/test", "anatomy/dev", "auxiliary_train", "all/test"):
        (tmp_path / folder).mkdir(parents=True)
        write_rows(tmp_path / folder / "data.jsonl", {**row, "question": folder})
    assert [question.question for question in mmlu.training_questions(str(tmp_path))] == ["auxiliary_train"]
    with pytest.raises(DataError, match="no choices, answer"):
        list(mmlu.training_questions(str(write_rows(tmp_path / "x.jsonl", {"question": "q"}))))
