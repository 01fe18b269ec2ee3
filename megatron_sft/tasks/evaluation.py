"""Scores a model on tasks of table.py.

megatron-sft eval --load MODEL --eval-tasks mmlu/chat-letter gsm8k/chat --output scores.json --answers answers.jsonl
megatron-sft mmlu --load MODEL --mmlu-dataset FOLDER --few-shots 5 --output mmlu.json

1. the tasks' questions are read, before the model is;
2. they are dealt over data- and context-parallel ranks, and answered in the layout that the model stands in (answers.py);
3. the task scores each answer; scores have intervals (intervals.py).
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft import parallel
from megatron_sft.config.fields import flag_of, range_problems
from megatron_sft.config.options import EvalConfig, MMLUConfig
from megatron_sft.config.run import RunConfig
from megatron_sft.config.tasks import CHATCORE, TasksConfig
from megatron_sft.errors import ConfigError
from megatron_sft.inference.load import Inference, load_for_inference
from megatron_sft.log import logger
from megatron_sft.output import output_problems, write_output
from megatron_sft.tasks import mmlu
from megatron_sft.tasks.answers import ANSWERS, letters, require_usable, shown
from megatron_sft.tasks.chatcore import BASELINES, chatcore
from megatron_sft.tasks.comparison import compare
from megatron_sft.tasks.intervals import interval, mean
from megatron_sft.tasks.sandbox import require_sandbox, run_program, why_no_sandbox
from megatron_sft.tasks.table import TASKS, Asked, Task


@dataclass(frozen=True)
class Result:
    """A task's score and what it is made of, question by question."""

    task: str
    names: Sequence[str]
    """Of the questions: of two runs those with the same name were asked the same."""
    scores: Sequence[float]
    weights: Sequence[float]
    rows: Sequence[dict[str, Any]]
    """prompt, answer and score of each question, for --answers."""

    @property
    def score(self) -> float:
        return mean(self.scores, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """As --output has it."""
        low, high = interval(self.scores, self.weights)
        values: dict[str, Any] = {"score": self.score, "low": low, "high": high, "count": len(self.scores)}
        if set(self.scores) <= {0.0, 1.0}:
            values["correct"] = int(sum(self.scores))
        values["questions"] = dict(zip(self.names, self.scores, strict=True))
        if len(set(self.weights)) > 1:
            values["weights"] = dict(zip(self.names, self.weights, strict=True))
        return values


def wanted(config: TasksConfig) -> list[str]:
    """The tasks of --eval-tasks, each once; chatcore stands for its own."""
    spelled = (name for given in config.eval_tasks for name in (BASELINES if given == CHATCORE else (given,)))
    return list(dict.fromkeys(spelled))


def read_questions(config: TasksConfig) -> dict[str, Asked]:
    """What is asked, by task. DataError where rows are missing or wrong, ConfigError where programs would run unsafely."""
    questions: dict[str, Asked] = {}
    if not config.unsafe_code and any(TASKS[name].program for name in wanted(config)):
        require_sandbox()
    for name in wanted(config):
        task, few_shots = TASKS[name], config.eval_few_shots
        if few_shots > task.few_shots:
            logger.info("%s has no examples: --eval-few-shots has no effect on it.", name)
        asked = task.load(config.eval_data.get(name.partition("/")[0], task.hub), min(few_shots, task.few_shots))
        count = min(config.eval_max_problems or len(asked), len(asked))
        questions[name] = [asked[number * len(asked) // count] for number in range(count)]
    return questions


def names_of(asked: Asked) -> list[str]:
    """A name of each question that says what is asked, whatever else is asked and where it came from."""
    seen: Counter[str] = Counter()
    names = []
    for question, _ in asked:
        digest = hashlib.sha256(json.dumps([question.question, question.choices]).encode()).hexdigest()[:12]
        seen[digest] += 1
        names.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return names


def scored(loaded: Inference, name: str, asked: Asked, config: TasksConfig) -> Result:
    """Answers and scores one task's questions. Collective; every rank gets the result.

    Args:
        loaded: the model, also in the middle of training (within train/optim.py:whole_parameters).
        name: of the task, in TASKS.
        asked: at least one question.
        config: how many are answered together, how long an answer may be.
    """
    task = TASKS[name]
    answers = ANSWERS[task.kind](loaded, task, asked, config)
    outcomes, names = _scores(loaded, task, asked, answers, config.unsafe_code), names_of(asked)
    rows = [
        {
            "task": name,
            "question": names[number],
            "where": question.where,
            "prompt": task.prompt(question, shots),
            "answer": shown(task, question, answers[number]),
            "right": shown(task, question, question.answer),
            "score": outcomes[number][0],
            **({"why": outcomes[number][1]} if outcomes[number][1] else {}),
        }
        for number, (question, shots) in enumerate(asked)
    ]
    return Result(name, names, [score for score, _ in outcomes], [float(task.weight(question)) for question, _ in asked], rows)


def _scores(loaded: Inference, task: Task, asked: Asked, answers: Sequence[Any], is_unsafe: bool) -> list[tuple[float, str]]:
    """(score, why it failed) of each answer. Each process scores its share: to run a program takes time."""
    mine: dict[int, tuple[float, str]] = {}
    is_unsafe = is_unsafe and task.program is not None and bool(why_no_sandbox())
    for number in range(loaded.ranks.rank, len(asked), loaded.ranks.world_size):
        question, answer = asked[number][0], answers[number]
        if task.program is None:
            mine[number] = task.score(question, answer), ""
        else:
            outcome = run_program(task.program(question, answer), is_unsafe)
            mine[number] = float(outcome.passed), outcome.why
    by_number = {number: score for part in parallel.gather(mine) for number, score in part.items()}
    return [by_number[number] for number in range(len(asked))]


def as_table(results: Sequence[Result]) -> str:
    """The scores as text, one task a line, with 95 % intervals."""
    lines = [f"{'task':28} {'problems':>8} {'score':>8} {'95 % interval':>18}"]
    for result in results:
        low, high = interval(result.scores, result.weights)
        lines.append(f"{result.task:28} {len(result.scores):8d} {result.score:8.4f} {f'{low:.4f} to {high:.4f}':>18}")
    core = chatcore({result.task: result.score for result in results})
    return "\n".join(lines if core is None else [*lines, f"{'ChatCORE':28} {'':8} {core:8.4f}"])


def check_options(run: RunConfig, options: EvalConfig) -> None:
    """Raises ConfigError with every option that makes no sense."""
    problems = range_problems(options)
    for flag, path in (("--output", options.output), ("--answers", options.answers)):
        problems += output_problems(flag, path)
    if options.compare and len(options.compare) != 2:
        problems.append(f"--compare has {len(options.compare)} files; expected two: --compare A.json B.json.")
    if not options.compare and not run.tasks.eval_tasks:
        problems.append("--eval-tasks is missing: expected at least one task. See megatron-sft eval --help, or name chatcore.")
    for name in ("eval_task_interval", "sample_prompts"):
        if getattr(run.tasks, name):
            problems.append(f"{flag_of(name)} is of a training run; expected another command. Leave it out.")
    lower = [name for name in wanted(run.tasks) if TASKS[name].is_lower_better]
    if options.lower_bound is not None and lower:
        problems.append(f"--lower-bound: of {', '.join(lower)} less is better; expected other tasks. Score it by itself.")
    if problems:
        raise ConfigError(problems)


def evaluate(run: RunConfig, explicit: frozenset[str], options: EvalConfig) -> int:
    """Scores --load on --eval-tasks, prints the table, writes --output and --answers; or compares two files. Collective.

    Args:
        run: as the flags say it.
        explicit: ModelConfig fields that a flag set.
        options: what is written.

    Returns:
        The process's exit status: 1 when a score is below --lower-bound.
    """
    check_options(run, options)
    if options.compare:
        logger.info("%s", compare(options.compare[0], options.compare[1], options.output))
        return 0
    questions = read_questions(run.tasks)
    loaded = load_for_inference(run, explicit)
    require_usable(loaded.tokenizer, questions)
    results = [scored(loaded, name, asked, run.tasks) for name, asked in questions.items()]
    logger.info("%s", as_table(results))
    if loaded.ranks.rank == 0:
        _write(run, options, results)
    parallel.finalize()
    low = [result for result in results if options.lower_bound is not None and result.score < options.lower_bound]
    for result in low:
        logger.warning("%s: %.4f is below --lower-bound %s", result.task, result.score, options.lower_bound)
    return 1 if low else 0


def _write(run: RunConfig, options: EvalConfig, results: Sequence[Result]) -> None:
    if options.output:
        settings = {"load": run.checkpoint.load, "ckpt_step": run.checkpoint.ckpt_step, **dataclasses.asdict(run.tasks)}
        content: dict[str, Any] = {"settings": settings, "tasks": {result.task: result.to_dict() for result in results}}
        core = chatcore({result.task: result.score for result in results})
        content |= {} if core is None else {CHATCORE: core}
        write_output("--output", options.output, json.dumps(content, indent=1) + "\n")
    if options.answers:
        lines = [json.dumps(row, ensure_ascii=False) for result in results for row in result.rows]
        write_output("--answers", options.answers, "\n".join(lines) + "\n")


def evaluate_mmlu(run: RunConfig, explicit: frozenset[str], options: MMLUConfig) -> int:
    """megatron-sft mmlu: mmlu/lm-eval with its table by subject. Collective.

    Returns:
        The process's exit status: 1 when the average is below --lower-bound.
    """
    if problems := range_problems(options) + output_problems("--output", options.output):
        raise ConfigError(problems)
    asked = mmlu.load(options.mmlu_dataset, options.few_shots, options.fraction, "--mmlu-dataset")
    loaded = load_for_inference(run, explicit)
    config = TasksConfig(eval_batch_size=options.mmlu_batch_size)
    answers = letters(loaded, TASKS["mmlu/lm-eval"], asked, config)
    scores: Mapping[str, Any] = mmlu.by_subject([question for question, _ in asked], answers)
    logger.info("%s", mmlu.table(scores))
    if options.output and loaded.ranks.rank == 0:
        settings = {"load": run.checkpoint.load, "few_shots": options.few_shots, "fraction": options.fraction}
        write_output("--output", options.output, json.dumps({**settings, **scores}, indent=1) + "\n")
    parallel.finalize()
    if options.lower_bound is not None and scores["average"] < options.lower_bound:
        logger.warning("average %.4f is below --lower-bound %s", scores["average"], options.lower_bound)
        return 1
    return 0
