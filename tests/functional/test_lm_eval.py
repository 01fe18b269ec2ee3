"""`megatron-sft lm-eval`: lm-evaluation-harness says of our model, in any layout, what it says of transformers'.

Needs `pip install 'megatron-sft[eval]'`, 240 MB that the `test` extra leaves out; without it only the message is tested.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.config.help import divided
from megatron_sft.config.options import GenerateConfig
from megatron_sft.errors import ConfigError
from megatron_sft.tasks.harness import generation_options, rolling_windows
from tests.gloo import run_script

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
SCRIPT = "megatron_sft/__main__.py"
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
"""
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_alone": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "local_text": """
output_type: generate_until
doc_to_text: "{{question}}\\n"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: bypass}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question * 30}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four tasks on five rows, for --include_path."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {n} and {n}?" + " Well?" * n, "choices": ["a", f"b{n}", " two words", "d"], "answer": n % 4}
        for n in range(5)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON.replace('ROWS', str(folder / 'rows.jsonl'))}{text.lstrip()}")
    return folder


def said(folder: Path) -> dict[str, list[Any]]:
    """Task -> what the model said to each request, in order, of what --log_samples wrote."""
    answers_of: dict[str, list[Any]] = {}
    for file in folder.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers_of[file.name.removeprefix("samples_").rpartition("_")[0]] = [
            answer for row in rows for answers in row["resps"] for answer in answers
        ]
    return answers_of


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What it says of transformers' model, alone and in a chat."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def of(is_chat: bool) -> dict[str, list[Any]]:
        model = HFLM(str(tiny_folder), dtype="float32", batch_size=1, device="cpu")
        manager = TaskManager(include_path=str(tasks))
        results = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, apply_chat_template=is_chat, bootstrap_iters=0)
        return {
            name: [answer for row in rows for answers in row["resps"] for answer in answers]
            for name, rows in results["samples"].items()
        }

    return of


@needs_harness
@pytest.mark.parametrize(
    ("processes", "layout", "more"),
    [
        (1, [], ["--apply_chat_template", "--batch_size", "3"]),
        (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"], []),
        (2, ["--pipeline-model-parallel-size", "2"], []),
        (2, [], ["--batch_size", "2"]),
    ],
    ids=["chat", "TP2", "PP2", "DP2"],
)
def test_it_says_what_it_says_of_transformers(
    processes: int, layout: list[str], more: list[str], expected: Any, tiny_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    words = ["lm-eval", tiny_folder, *layout, "--tasks", *TASKS, "--include_path", tasks, *more]
    done = run_script(SCRIPT, [*words, "--output_path", tmp_path / "out", "--log_samples"], processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|local_choice " in done.stdout
    ours, theirs = said(tmp_path / "out"), expected("--apply_chat_template" in more)
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for name in ("local_choice", "local_alone"):
        assert [is_greedy for _, is_greedy in ours[name]] == [str(is_greedy) for _, is_greedy in theirs[name]]
        assert [float(value) for value, _ in ours[name]] == pytest.approx([value for value, _ in theirs[name]], abs=2e-4)
    assert ours["local_text"] == theirs["local_text"] and len(set(ours["local_text"])) > 1
    assert [float(value) for value in ours["local_rolling"]] == pytest.approx(theirs["local_rolling"], rel=1e-5)


@needs_harness
@pytest.mark.parametrize("processes", [1, 2])
def test_words_that_it_refuses(processes: int, tiny_folder: Path) -> None:
    for words, message in (
        (["--tasks", "no_such_task"], "refuses the command line (Tasks not found: no_such_task); expected what it knows."),
        (
            ["--tasks", "arc_easy", "--no_such_flag"],
            "refuses its flags, as it says above; expected those of lm-eval run --help.",
        ),
    ):
        done = run_script(SCRIPT, ["lm-eval", tiny_folder, *words], processes)
        assert done.returncode == 2 and message in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_it_the_message_names_the_command(tiny_folder: Path) -> None:
    done = run_script(SCRIPT, ["lm-eval", tiny_folder, "--tasks", "arc_easy"])
    assert done.returncode == 2
    assert "lm-eval: lm-evaluation-harness cannot be imported" in done.stdout + done.stderr
    assert "Run: pip install 'megatron-sft[eval]'" in done.stdout + done.stderr


def test_flags_are_ours_or_theirs() -> None:
    words = "--load M --tasks a b --tensor-model-parallel-size 2 --seed 3 --bf16 -L 4 --output_path=x".split()
    ours = "--load M --tensor-model-parallel-size 2 --bf16".split()
    assert divided(words, "lm-eval") == (ours, "--tasks a b --seed 3 -L 4 --output_path=x".split())


def test_windows_ask_about_each_token_once() -> None:
    windows = list(rolling_windows(range(10), 99, 4))
    assert windows == [([99, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]
    assert list(rolling_windows([], 99, 4)) == []
    assert list(rolling_windows([7], 99, 4)) == [([99, 7], 1)]


def test_generation_kwargs() -> None:
    said = {"until": ["\n\n", ""], "max_gen_toks": 32, "do_sample": False, "temperature": 0.7}
    assert generation_options(said, 4) == GenerateConfig(osl=32, batch_size=4, stop=("\n\n",))
    assert generation_options({"until": "x", "temperature": 0.5, "top_p": 0.9}, 4) == GenerateConfig(
        osl=256, batch_size=4, stop=("x",), temperature=0.5, top_p=0.9
    )
    assert generation_options({"do_sample": True}, 1).temperature == 1.0
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams not known; expected until, max_gen_toks"):
        generation_options({"num_beams": 2}, 4)
