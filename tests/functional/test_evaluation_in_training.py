"""--eval-tasks and --sample-prompts while a model is trained: what they say, and that training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import metrics_of
from tests.gloo import run_script

TASKS = ("mmlu/chat-letter", "gsm8k/nanochat", "text/bits-per-byte")
LAYOUTS: dict[str, tuple[int, list[Any]]] = {
    "one process": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The flags of an evaluation with tiny tasks."""
    root = tmp_path_factory.mktemp("asked")
    mmlu = [{"subject": "s", "question": f"{n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(5)]
    (root / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmlu))
    (root / "gsm8k.jsonl").write_text("".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(3)))
    (root / "text.txt").write_text("It is what it is. " * 40)
    (root / "prompts.txt").write_text("What is 2 + 2?\nTell me.\n")
    places = [f"mmlu={root / 'mmlu.jsonl'}", f"gsm8k={root / 'gsm8k.jsonl'}", f"text={root / 'text.txt'}"]
    flags = ["--eval-tasks", *TASKS, "--eval-data", *places, "--eval-task-interval", 2, "--eval-osl", 8, "--eval-batch-size", 2]
    return [*flags, "--eval-max-problems", 4, "--sample-prompts", root / "prompts.txt"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_the_same_bit_for_bit(name: str, finetune: Any, asked: list[Any], tmp_path: Path) -> None:
    """In one process also: the scores at the end are those of `megatron-sft eval` on the checkpoint, on two processes."""
    processes, layout = LAYOUTS[name]
    common = ["--train-iters", 3, "--global-batch-size", 2, "--lr", "1e-3", *layout]
    plain = finetune(*common, "--save", tmp_path / "plain", processes=processes)
    with_tasks = finetune(*common, *asked, "--save", tmp_path / "asked", processes=processes)
    assert (plain.returncode, with_tasks.returncode) == (0, 0), with_tasks.stdout + with_tasks.stderr
    before, after = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "asked")
    scores = [{key: value for key, value in line.items() if key.startswith("eval/")} for line in after]
    assert [set(line) for line in scores] == [set(), *[{f"eval/{task}" for task in TASKS}] * 2]
    for ours, theirs in zip(before, after, strict=True):
        kept = {key for key in ours if not key.startswith(("perf/", "data/"))}
        assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}
    samples = [json.loads(line) for line in (tmp_path / "asked/samples.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["prompt"]) for row in samples] == [
        (iteration, said) for iteration in (0, 2, 3) for said in ("What is 2 + 2?", "Tell me.")
    ]
    assert "iteration 3, " in with_tasks.stdout and "> Tell me." in with_tasks.stdout
    if processes > 1:
        return
    flags = [*asked[: asked.index("--eval-task-interval")], *asked[asked.index("--eval-osl") : -2]]
    words = ["eval", "--load", tmp_path / "asked", *flags, "--output", tmp_path / "scores.json"]
    done = run_script("megatron_sft/__main__.py", words, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = {
        f"eval/{task}": entry["score"] for task, entry in json.loads((tmp_path / "scores.json").read_text())["tasks"].items()
    }
    assert alone == pytest.approx(scores[-1], rel=1e-6)


def test_what_cannot_be_asked_is_said_before_training(finetune: Any, asked: list[Any], tmp_path: Path) -> None:
    done = finetune("--train-iters", 1, "--eval-task-interval", 2, "--eval-data", "nothing=x", "--eval-max-problems", 3)
    said = done.stdout + done.stderr
    assert done.returncode == 2
    assert "--eval-data nothing=: no such task; expected one of mmlu, arc-easy, arc-challenge, gsm8k," in said
    assert "--eval-max-problems has no effect without --eval-tasks" in said
    assert "--eval-task-interval has no effect without --eval-tasks" in said
    done = finetune("--train-iters", 1, "--eval-tasks", "gsm8k/chat", "--eval-data", f"gsm8k={tmp_path}/none.jsonl")
    assert done.returncode == 2 and "For this task the place is --eval-data gsm8k=PLACE." in done.stdout + done.stderr


def test_a_run_that_only_validates_asks_too(finetune: Any, asked: list[Any], rows_file: Path) -> None:
    done = finetune("--skip-train", "--valid-data", rows_file, "--eval-iters", 1, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation loss:" in done.stdout and "text/bits-per-byte" in done.stdout and "> Tell me." in done.stdout
