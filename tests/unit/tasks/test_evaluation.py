"""A tiny model's answers of every kind against transformers, and what `megatron-sft eval` writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sft.config.options import EvalConfig, GenerateConfig
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig
from megatron_sft.config.tasks import TasksConfig
from megatron_sft.core_compat import install_cpu_mode
from megatron_sft.errors import ConfigError
from tests.text_models import greedy, text_model

install_cpu_mode()

from megatron_sft import parallel  # noqa: E402
from megatron_sft.inference.generation import generate  # noqa: E402
from megatron_sft.inference.load import load_for_inference  # noqa: E402
from megatron_sft.tasks import evaluation  # noqa: E402
from megatron_sft.tasks.answers import ANSWERS, log_likelihoods, predictions  # noqa: E402
from megatron_sft.tasks.evaluation import read_questions  # noqa: E402
from megatron_sft.tasks.table import TASKS  # noqa: E402

PLACES = {"arc-easy": "arc.jsonl", "gsm8k": "gsm8k.jsonl", "text": "text.jsonl", "mmlu": "mmlu.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    text_model("llama", root / "model")
    arc = [
        {"question": f"What is {n}?", "choices": {"text": ["one", "two or", "3"][: 2 + n % 2], "label": list("ABC")[: 2 + n % 2]}}
        for n in range(7)
    ]
    (root / "arc.jsonl").write_text("".join(json.dumps({**row, "answerKey": "AB"[n % 2]}) + "\n" for n, row in enumerate(arc)))
    (root / "gsm8k.jsonl").write_text("".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(5)))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": "Some text. " * n}) + "\n" for n in (1, 3, 90)))
    mmlu = [{"subject": "s", "question": f"{n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(5)]
    (root / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmlu))
    return root


def run_of(folder: Path, *tasks: str, **settings: Any) -> RunConfig:
    model = str(folder / "model")
    places = {name: str(folder / file) for name, file in PLACES.items()}
    config = TasksConfig(eval_tasks=tasks, eval_data=places, eval_osl=8, eval_batch_size=3, **settings)
    return RunConfig(checkpoint=CheckpointConfig(load=model), data=DataConfig(tokenizer_model=model), tasks=config)


def reference_logprobs(reference: Any, ids: list[int]) -> torch.Tensor:
    """[tokens - 1, vocab] of what follows each token, by transformers."""
    with torch.no_grad():
        return reference(torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def test_answers_of_every_kind_equal_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    names = ("arc-easy/lm-eval", "arc-easy/lm-eval-norm", "arc-easy/chat-letter", "gsm8k/chat", "text/bits-per-byte")
    run = run_of(folder, *names)
    questions = read_questions(run.tasks)
    loaded = load_for_inference(run, frozenset())
    found = {name: ANSWERS[TASKS[name].kind](loaded, TASKS[name], asked, run.tasks) for name, asked in questions.items()}

    def worth(question: Any, choice: str) -> float:
        before = tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
        ids = before + tokenizer(f" {choice}")["input_ids"]
        values = reference_logprobs(reference, ids)
        return float(sum(values[place - 1, ids[place]] for place in range(len(before), len(ids))))

    def chat(said: str) -> list[int]:
        messages = [{"role": "user", "content": said}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    arc = [question for question, _ in questions["arc-easy/lm-eval"]]
    by_sum = [[worth(question, choice) for choice in question.choices] for question in arc]
    by_length = [[v / len(c) for v, c in zip(row, q.choices, strict=True)] for row, q in zip(by_sum, arc, strict=True)]
    assert found["arc-easy/lm-eval"] == [row.index(max(row)) for row in by_sum]
    assert found["arc-easy/lm-eval-norm"] == [row.index(max(row)) for row in by_length]
    letters = []
    for question in arc:
        asked = "\n".join([question.question, *(f"{a}. {c}" for a, c in zip("ABC", question.choices, strict=False)), "Answer:"])
        ids = [tokenizer(letter)["input_ids"][0] for letter in "ABC"[: len(question.choices)]]
        with torch.no_grad():
            letters.append(int(reference(torch.tensor([chat(asked)]), use_cache=False).logits[0, -1, ids].argmax()))
    assert found["arc-easy/chat-letter"] == letters
    prompts = [TASKS["gsm8k/chat"].prompt(*pair) for pair in questions["gsm8k/chat"]]
    answers = [tokenizer.decode(greedy(reference, chat(said), 8, [257, 259]), skip_special_tokens=True) for said in prompts]
    assert found["gsm8k/chat"] == answers
    for (question, _), nats in zip(questions["text/bits-per-byte"], found["text/bits-per-byte"], strict=True):
        ids = [257, *tokenizer(question.question)["input_ids"]]
        windows = [ids[start : start + 512] for start in range(0, len(ids) - 1, 511)]
        expected = sum(
            -float(reference_logprobs(reference, window).gather(1, torch.tensor(window[1:])[:, None]).sum()) for window in windows
        )
        assert nats == pytest.approx(expected, rel=1e-5)
    assert log_likelihoods(loaded.chunks, [[5, 6, 7]], [2], 1)[0] == pytest.approx(
        float(reference_logprobs(reference, [5, 6, 7]).gather(1, torch.tensor([[6], [7]])).sum()), rel=1e-5
    )
    assert predictions(loaded.chunks, [[1, 2, 3]] * 2, [33, 34, 35, 36], 2, [1, 1]) == [0, 0]
    forced = generate(
        loaded.chunks,
        [[1, 2, 3], [60, 61]],
        GenerateConfig(osl=9),
        (),
        loaded.ranks,
        forces=lambda tokens: [70, 71] if len(tokens) == 3 else [],
    )
    for prompt, answer in zip([[1, 2, 3], [60, 61]], forced, strict=True):
        first = greedy(reference, prompt, 3, [])
        assert answer.tokens == [*first, 70, 71, *greedy(reference, [*prompt, *first, 70, 71], 4, [])]
    parallel.finalize()


def test_eval_writes_scores_and_answers_and_two_runs_compare(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, "mmlu/chat-letter", "gsm8k/nanochat", "text/bits-per-byte", eval_max_problems=4)
    options = EvalConfig(output=str(tmp_path / "a.json"), answers=str(tmp_path / "a.jsonl"))
    assert evaluation.evaluate(run, frozenset(), options) == 0
    scores = json.loads((tmp_path / "a.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert scores["settings"]["eval_max_problems"] == 4 and scores["settings"]["load"] == str(folder / "model")
    for name, count in (("mmlu/chat-letter", 4), ("gsm8k/nanochat", 4), ("text/bits-per-byte", 3)):
        entry, mine = scores["tasks"][name], [row for row in rows if row["task"] == name]
        assert entry["count"] == count == len(mine) and entry["low"] <= entry["score"] <= entry["high"]
        assert entry["questions"] == {row["question"]: row["score"] for row in mine}
    entry = scores["tasks"]["text/bits-per-byte"]
    sizes = [11, 33, 990]
    expected = math.fsum(s * w for s, w in zip(entry["questions"].values(), sizes, strict=True)) / sum(sizes)
    assert entry["score"] == pytest.approx(expected) and list(entry["weights"].values()) == sizes
    assert {row["answer"] for row in rows if row["task"] == "mmlu/chat-letter"} <= set("ABCD")
    assert evaluation.evaluate(RunConfig(), frozenset(), EvalConfig(compare=(str(tmp_path / "a.json"),) * 2)) == 0
    bound = run_of(folder, "gsm8k/nanochat")
    assert evaluation.evaluate(bound, frozenset(), EvalConfig(lower_bound=0.5)) == 1


def test_options_that_make_no_sense_are_one_error() -> None:
    with pytest.raises(ConfigError, match=r"--compare has 1 files; expected two") as error:
        evaluation.check_options(RunConfig(), EvalConfig(compare=("a.json",), lower_bound=2.0))
    assert "--lower-bound is 2; expected a number from 0 to 1" in str(error.value)
    with pytest.raises(ConfigError, match="--eval-tasks is missing"):
        evaluation.check_options(RunConfig(), EvalConfig())
    with pytest.raises(ConfigError, match="--sample-prompts is of a training run"):
        evaluation.check_options(RunConfig(tasks=TasksConfig(sample_prompts="a.txt")), EvalConfig())
    with pytest.raises(ConfigError, match="of text/bits-per-byte less is better"):
        tasks = TasksConfig(eval_tasks=("text/bits-per-byte",))
        evaluation.check_options(RunConfig(tasks=tasks), EvalConfig(lower_bound=0.5))
