"""Which benchmarks `megatron-sft eval` and a training run answer, and how. One section of RunConfig.

Not here: what the tasks are (tasks/table.py), what eval has beside it (options.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from megatron_sft.config.fields import Count, Length, Number, Words

TASK_NAMES = (
    "mmlu/lm-eval",
    "mmlu/chat-letter",
    "mmlu/nanochat",
    "arc-easy/lm-eval",
    "arc-easy/lm-eval-norm",
    "arc-easy/chat-letter",
    "arc-easy/nanochat",
    "arc-challenge/lm-eval",
    "arc-challenge/lm-eval-norm",
    "arc-challenge/chat-letter",
    "arc-challenge/nanochat",
    "gsm8k/lm-eval",
    "gsm8k/chat",
    "gsm8k/nanochat",
    "humaneval/lm-eval",
    "humaneval/nanochat",
    "spelling-bee/chat",
    "simple-spelling/chat",
    "text/bits-per-byte",
)
"""Keys of tasks/table.py:TASKS. Before the / what is asked, behind it in whose format."""
CHATCORE = "chatcore"
"""Stands for the tasks of tasks/chatcore.py."""


@dataclass(frozen=True)
class TasksConfig:
    """Benchmarks, and samples of what the model says."""

    eval_tasks: tuple[Annotated[str, Words(*TASK_NAMES, CHATCORE), "task"], ...] = ()
    """mmlu, arc-easy, arc-challenge with /lm-eval, /chat-letter or /nanochat; gsm8k with /lm-eval, /chat or /nanochat;
    humaneval with /lm-eval or /nanochat; spelling-bee/chat, simple-spelling/chat; text/bits-per-byte; chatcore: all its six."""
    eval_max_problems: Annotated[Count, "problems"] | None = None
    """Of each task, evenly spread over it; None: all."""
    eval_task_interval: Annotated[Length, "iterations"] | None = None
    """Between two times that eval_tasks and sample_prompts are answered while a model is trained; None: at its end alone."""
    sample_prompts: Annotated[str, "file"] | None = None
    """Prompts, as --prompts-path, whose answers go to the log and to samples.jsonl while a model is trained."""
    eval_data: Mapping[str, str] = field(default_factory=dict)
    """TASK=PLACE, as mmlu=FOLDER gsm8k=FILE.jsonl text=FILE.txt spelling-bee=WORDS.txt; otherwise rows come from the hub."""
    eval_few_shots: Annotated[int, Number(0, 5), "examples"] = 0
    """Before each question of mmlu/lm-eval and mmlu/chat-letter, from the dev split, arc-.../lm-eval and gsm8k/lm-eval, the first
    of the training split."""
    eval_osl: Annotated[Count, "tokens"] = 512
    """New ones an answer at most, where the answer is a text."""
    eval_batch_size: Annotated[Count, "problems"] = 8
    """Answered together on one data-parallel rank."""
    unsafe_code: bool = False
    """HumanEval's programs, which the model wrote, run without a sandbox where this machine gives none."""
