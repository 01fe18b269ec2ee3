"""Each task's rows, wording and score, and what is made of scores."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.config.tasks import TASK_NAMES, TasksConfig
from megatron_sft.core_compat import install_cpu_mode
from megatron_sft.errors import DataError

install_cpu_mode()

from megatron_sft.tasks import arc, choices, gsm8k, humaneval, mmlu, sandbox, spelling, text  # noqa: E402
from megatron_sft.tasks.chatcore import BASELINES, chatcore  # noqa: E402
from megatron_sft.tasks.comparison import compare  # noqa: E402
from megatron_sft.tasks.evaluation import names_of, read_questions, wanted  # noqa: E402
from megatron_sft.tasks.intervals import interval, paired  # noqa: E402
from megatron_sft.tasks.table import TASKS  # noqa: E402

ARC_HUB = {"id": "a", "question": "What is wet?", "choices": {"text": ["fire", "rain", "sand"], "label": ["1", "2", "3"]}}
ARC_OWN = {"question": {"stem": "What is hot?", "choices": [{"text": "fire", "label": "A"}, {"text": "ice", "label": "B"}]}}
PROBLEM = {
    "task_id": "ours/0",
    "prompt": "from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    '''The sum of the even ones.'''\n",
    "canonical_solution": "    return sum(n for n in numbers if n % 2 == 0)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2, 4]) == 6\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_names_are_the_table() -> None:
    assert tuple(TASKS) == TASK_NAMES and BASELINES.keys() <= TASKS.keys()
    assert wanted(TasksConfig(eval_tasks=("gsm8k/nanochat", "chatcore"))) == [
        "gsm8k/nanochat",
        *list(BASELINES)[:3],
        *list(BASELINES)[4:],
    ]


def test_arc_reads_both_layouts_and_asks_in_three_formats(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "arc.jsonl", {**ARC_HUB, "answerKey": "2"}, {**ARC_OWN, "answerKey": "A"})
    (wet, shots), (hot, _) = TASKS["arc-easy/lm-eval"].load(rows, 0)
    assert (wet.choices, wet.answer, hot.choices, hot.answer) == (("fire", "rain", "sand"), 1, ("fire", "ice"), 0)
    assert arc.prompt(wet, shots) == "Question: What is wet?\nAnswer:"
    assert arc.chat_prompt(wet, shots) == "What is wet?\nA. fire\nB. rain\nC. sand\nAnswer:"
    assert choices.nanochat(hot) == (
        "Multiple Choice question: What is hot?\n- fire=A\n- ice=B\n\nRespond only with the letter of the correct answer."
    )
    with pytest.raises(DataError, match=r"arc\.jsonl:1: 3 choices, 3 labels, answerKey 'D'; expected 2 to 5 choices"):
        TASKS["arc-easy/lm-eval"].load(write_rows(tmp_path / "arc.jsonl", {**ARC_HUB, "answerKey": "D"}), 0)
    doubled = {**ARC_HUB, "choices": {"text": ["fire", "rain", "sand"], "label": ["1", "2", "2"]}, "answerKey": "2"}
    nothing = {**ARC_HUB, "choices": {"text": ["fire", None, "sand"], "label": ["1", "2", "3"]}, "answerKey": "2"}
    for row, message in ((doubled, "3 labels, answerKey '2'; expected"), (nothing, "choices is None; expected text")):
        with pytest.raises(DataError, match=rf"arc\.jsonl:1: .*{message}"):
            TASKS["arc-easy/lm-eval"].load(write_rows(tmp_path / "arc.jsonl", row), 0)


def test_a_byte_order_mark_is_not_asked(tmp_path: Path) -> None:
    for name, content in (("book.txt", "A word"), ("words.txt", "word\n"), ("s_test.csv", "Q?,a,b,c,d,B\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert text.load(str(tmp_path / "book.txt"), 0)[0][0].question == "A word"
    assert spelling.read_words(str(tmp_path / "words.txt")) == ["word"]
    assert mmlu.examples(str(tmp_path / "s_test.csv"))["test"][""][0].question == "Q?"


def test_examples_are_the_first_training_rows(tmp_path: Path) -> None:
    for split, answer in (("train", "1"), ("test", "2")):
        rows = [{"question": f"{split} {n}?", "answer": f"It is.\n#### {answer}"} for n in range(3)]
        write_rows(tmp_path / f"{split}.jsonl", *rows)
    task = TASKS["gsm8k/lm-eval"]
    asked = task.load(str(tmp_path), 2)
    assert [question.question for question, _ in asked] == ["test 0?", "test 1?", "test 2?"]
    assert task.prompt(*asked[1]) == (
        "Question: train 0?\nAnswer: It is.\n#### 1\n\nQuestion: train 1?\nAnswer: It is.\n#### 1\n\nQuestion: test 1?\nAnswer:"
    )
    assert [task.score(asked[0][0], said) for said in ("#### 2.", "#### $2", "so 2", "#### 2\n#### 3")] == [1.0, 0.0, 0.0, 1.0]
    (tmp_path / "arc").mkdir()
    write_rows(tmp_path / "arc" / "train.jsonl", {**ARC_OWN, "answerKey": "A"})
    write_rows(tmp_path / "arc" / "test.jsonl", {**ARC_HUB, "answerKey": "2"})
    ((question, shots),) = TASKS["arc-easy/lm-eval"].load(str(tmp_path / "arc"), 1)
    assert arc.prompt(question, shots) == "Question: What is hot?\nAnswer: fire\n\nQuestion: What is wet?\nAnswer:"
    with pytest.raises(DataError, match=r"arc: 1 training rows; expected 2 as examples .* \(--eval-data arc-easy=FOLDER\)"):
        TASKS["arc-easy/lm-eval"].load(str(tmp_path / "arc"), 2)
    with pytest.raises(DataError, match=r"test\.jsonl: one file; expected 1 as examples"):
        task.load(str(tmp_path / "test.jsonl"), 1)


def test_rows_that_are_nowhere_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl.*For this task the place is --eval-data gsm8k=PLACE\."):
        gsm8k.load(str(tmp_path / "nothing.jsonl"), 0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has question; expected also answer\."):
        gsm8k.load(write_rows(tmp_path / "rows.jsonl", {"question": "?"}), 0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: answer is None; expected text"):
        gsm8k.load(write_rows(tmp_path / "rows.jsonl", {"question": "?", "answer": None}), 0)
    with pytest.raises(DataError, match="the answer has no number after ####"):
        gsm8k.load(write_rows(tmp_path / "rows.jsonl", {"question": "?", "answer": "#### many"}), 0)
    with pytest.raises(DataError, match=r"Pass --eval-data text=FILE\.txt"):
        text.load("", 0)


def test_gsm8k_scores_the_number_after_the_mark(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "gsm8k.jsonl", {"question": "How much?", "answer": "48/2=<<48/2=24>>24\n#### 1,200"})
    ((question, _),) = gsm8k.load(rows, 0)
    answers = ["#### 1200", "so #### $1,200.", "It is 1,200.00", "#### 12", "", "1.2.3"]
    assert question.answer == "1200"
    assert [gsm8k.score(question, answer) for answer in answers] == [1, 1, 0, 0, 0, 0]
    assert [gsm8k.chat_score(question, answer) for answer in answers] == [1, 1, 1, 0, 0, 0]


def test_the_calculator_answers_arithmetic_alone() -> None:
    asked = {"He has <<48/2=": "24>>", "<<(1+2)*3 - 0.5=": "8.5>>", "<<1,000*2=": "2000>>", "<<10/4=": "2.5>>", "<<-3+1=": "-2>>"}
    assert {said: gsm8k.calculated(said) for said in asked} == asked
    for said in ("48/2=", "<<48/2", "<<48/2=24", "<<1/0=", "<<__import__('os')=", "<<9**9**9=", "<<=", "<<x=", f"<<{'(' * 99}="):
        assert gsm8k.calculated(said) == ""


def test_spelling_questions_are_the_same_each_time_and_their_solutions_right(tmp_path: Path) -> None:
    for task in ("spelling-bee", "simple-spelling"):
        asked, again = (TASKS[f"{task}/chat"].load("", 0) for _ in range(2))
        assert asked == again and len(asked) == spelling.PROBLEMS
        for question, _ in asked:
            assert TASKS[f"{task}/chat"].score(question, spelling.conversation(question)[1]["content"]) == 1
            assert TASKS[f"{task}/chat"].score(question, "99") == 0
    tested = {question.question for question, _ in TASKS["spelling-bee/chat"].load("", 0)}
    assert len(tested) > 200 and len(spelling.WORDS) == len(set(spelling.WORDS)) > 300
    words = tmp_path / "words.txt"
    words.write_text("Strawberry\nit's\n\n")
    assert spelling.simple(spelling.read_words(str(words)), 0).answer == "strawberry:s,t,r,a,w,b,e,r,r,y"
    bee = spelling.bee(["strawberry"], 3)
    assert bee.answer == str("strawberry".count(bee.choices[0]))


def test_humaneval_programs_of_both_formats(tmp_path: Path) -> None:
    ((problem, _),) = humaneval.load(write_rows(tmp_path / "humaneval.jsonl", PROBLEM), 0)
    assert isinstance(problem, humaneval.Problem)
    body, whole = PROBLEM["canonical_solution"], "def total(numbers: List[int]) -> int:\n" + PROBLEM["canonical_solution"]
    said = f"Here it is:\n```python\n{whole}```\nIt adds them up."
    programs = [humaneval.continued(problem, body), humaneval.answered(problem, said), humaneval.answered(problem, whole)]
    assert [sandbox.run_program(program, is_unsafe=True).passed for program in programs] == [True, True, True]
    empty = [humaneval.continued(problem, "    pass\n"), humaneval.answered(problem, ""), humaneval.answered(problem, "No.")]
    assert [sandbox.run_program(program, is_unsafe=True).passed for program in empty] == [False, False, False]


def test_fewer_problems_are_spread_evenly_and_keep_their_names(tmp_path: Path) -> None:
    rows = [{"question": f"{n // 2}?", "answer": f"#### {n}"} for n in range(10)]
    place = {"gsm8k": write_rows(tmp_path / "gsm8k.jsonl", *rows)}
    config = TasksConfig(eval_tasks=("gsm8k/chat",), eval_data=place)
    every = read_questions(config)["gsm8k/chat"]
    few = read_questions(TasksConfig(eval_tasks=("gsm8k/chat",), eval_data=place, eval_max_problems=4))["gsm8k/chat"]
    assert [question.answer for question, _ in few] == ["0", "2", "5", "7"]
    names = names_of(every)
    assert len(set(names)) == 10 and names[1] == f"{names[0]}-2" and names_of(few)[0] == names[0]


def test_chatcore_is_centered_on_guessing() -> None:
    guessing = {**BASELINES}
    assert chatcore(guessing) == 0 and chatcore(dict.fromkeys(BASELINES, 1.0)) == 1
    assert chatcore({**guessing, "mmlu/nanochat": 0.625}) == pytest.approx(0.5 / 6)
    assert chatcore({"mmlu/nanochat": 1.0}) is None


def test_intervals() -> None:
    assert interval([1.0] * 5 + [0.0] * 5, [1.0] * 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    low, high = interval([0.0] * 10, [1.0] * 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    low, high = interval([1.0, 3.0], [1.0, 1.0])
    assert (low + high) / 2 == 2 and (high - low) / 2 == pytest.approx(1.96 * math.sqrt(2 / 2), abs=1e-3)
    assert interval([2.5], [7.0]) == (2.5, 2.5)
    found = paired([1, 0, 1, 0], [1, 1, 1, 1], [1.0] * 4)
    assert (found["difference"], found["first_higher"], found["second_higher"], found["count"]) == (0.5, 0, 2, 4)
    assert found["high"] - 0.5 == pytest.approx(1.96 * math.sqrt(1 / 3) / 2, abs=1e-3)


def test_two_files_are_compared_question_by_question(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.json", {"tasks": {"gsm8k/chat": {"questions": {"x": 1.0, "y": 0.0, "z": 0.0}}}})
    second = write_rows(tmp_path / "b.json", {"tasks": {"gsm8k/chat": {"questions": {"y": 1.0, "x": 1.0, "w": 1.0}}}})
    said = compare(first, second, str(tmp_path / "c.json"))
    assert "gsm8k/chat" in said and "+0.5000" in said and "2 questions that only one of them was asked" in said
    figures = json.loads((tmp_path / "c.json").read_text())["tasks"]["gsm8k/chat"]
    assert (figures["difference"], figures["count"], figures["second_higher"]) == (0.5, 2, 1)
    with pytest.raises(DataError, match="have no question in common"):
        compare(first, write_rows(tmp_path / "d.json", {"tasks": {"mmlu/lm-eval": {"questions": {"x": 1.0}}}}))
    for score in (None, "1", [], float("nan"), 10**400):
        with pytest.raises(DataError, match=r"d\.json: gsm8k/chat has scores that are no numbers; expected what"):
            compare(first, write_rows(tmp_path / "d.json", {"tasks": {"gsm8k/chat": {"questions": {"x": score}}}}))
    (tmp_path / "d.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"d\.json: cannot be read"):
        compare(first, str(tmp_path / "d.json"))
    with pytest.raises(DataError, match=r"d\.json: has no tasks with the score of each question"):
        compare(first, write_rows(tmp_path / "d.json", {"average": 1.0}))


def test_mmlu_is_asked_in_three_formats() -> None:
    question = mmlu.Question("us_law", "Who?", ("a", "b", "c", "d"), 1, "f:1")
    assert TASKS["mmlu/lm-eval"].prompt(question, ()) == TASKS["mmlu/chat-letter"].prompt(question, ())
    assert TASKS["mmlu/nanochat"].prompt(question, ()).startswith("Multiple Choice question: Who?\n- a=A\n")
