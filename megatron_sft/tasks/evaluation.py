"""Scores a model on a task of table.py.

megatron-sft mmlu --load MODEL --mmlu-dataset FOLDER --few-shots 5 --output mmlu.json

1. the task's questions become token ids, of which too long ones lose their beginning;
2. they are dealt over data- and context-parallel ranks, and answered in the layout that the model stands in;
3. the task scores the answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_sft import parallel
from megatron_sft.config.fields import range_problems
from megatron_sft.config.options import MMLUConfig
from megatron_sft.config.run import RunConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import ConfigError
from megatron_sft.inference.forward import dealt, evaluating, from_all_ranks, from_last_stage, idle, last_logits, packed_row
from megatron_sft.inference.load import Inference, load_for_inference
from megatron_sft.log import logger
from megatron_sft.output import output_problems, write_output
from megatron_sft.tasks.mmlu import LETTERS
from megatron_sft.tasks.table import TASKS, Kind


def choice_token_ids(tokenizer: Any) -> list[int]:
    """The tokens of " A" to " D" as they stand after "Answer:"."""
    ids = [tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
    if len(set(ids)) != len(LETTERS):
        same = f"{tokenizer.name_or_path}: the letters A to D end in the same token; expected four."
        raise ConfigError([f"{same} Use the model's tokenizer."])
    return ids


def predictions(
    chunks: Sequence[Any], sequences: Sequence[Sequence[int]], choice_ids: Sequence[int], batch_size: int
) -> list[int]:
    """Index of the likeliest choice after each sequence. Collective, in any layout; every rank returns all.

    Sequences of like length share a packed row; they are dealt over data- and context-parallel ranks.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, int] = {}
    batches = dealt(order, batch_size)
    with evaluating(chunks):
        for number, batch in enumerate(batches, start=1):
            if not batch:
                idle(chunks)
                continue
            logits = last_logits(chunks, *packed_row([sequences[i] for i in batch], keeps=False))
            chosen = torch.empty(len(batch), dtype=torch.int64, device=device())
            chosen = chosen if logits is None else logits[:, choice_ids].argmax(-1)
            found.update(zip(batch, from_last_stage(chosen).tolist(), strict=True))
            if number % 10 == 0:
                logger.info("answered %d of %d questions", number * len(sequences) // len(batches), len(sequences))
    return from_all_ranks(found)


def letters(loaded: Inference, texts: Sequence[str], batch_size: int) -> list[int]:
    """Kind.LETTER: the index of the likeliest letter after each text. Collective; every rank returns all."""
    limit = loaded.model.max_position_embeddings or None
    sequences = [list(ids) for ids in loaded.tokenizer(texts)["input_ids"]]
    cut = sum(limit is not None and len(ids) > limit for ids in sequences)
    if cut:
        logger.warning("%d prompts are longer than %s tokens: their beginning is left out", cut, limit)
        sequences = [ids[-limit:] if limit else ids for ids in sequences]
    return predictions(loaded.chunks, sequences, choice_token_ids(loaded.tokenizer), batch_size)


ANSWERS: Mapping[Kind, Callable[[Inference, Sequence[str], int], list[int]]] = {Kind.LETTER: letters}
"""How the answers of each kind are had: of the model, the prompts and how many share a row."""


def check_options(options: MMLUConfig) -> None:
    """Raises ConfigError with every option that makes no sense."""
    if found := range_problems(options) + output_problems("--output", options.output):
        raise ConfigError(found)


def evaluate(run: RunConfig, explicit: frozenset[str], options: MMLUConfig, name: str = "mmlu/lm-eval") -> int:
    """Scores --load on a task, prints the table, writes --output. Collective.

    Args:
        run: as the flags say it.
        explicit: ModelConfig fields that a flag set.
        options: of the task.
        name: of the task, in TASKS.

    Returns:
        The process's exit status: 1 when the average is below --lower-bound.
    """
    check_options(options)
    task = TASKS[name]
    asked = task.load(options)
    texts = [task.prompt(question, shots) for question, shots in asked]
    loaded = load_for_inference(run, explicit)
    answers = ANSWERS[task.kind](loaded, texts, options.mmlu_batch_size)
    scores = task.score([question for question, _ in asked], answers)
    logger.info("%s", task.table(scores))
    if options.output and loaded.ranks.rank == 0:
        settings = {"load": run.checkpoint.load, "few_shots": options.few_shots, "fraction": options.fraction}
        write_output("--output", options.output, json.dumps({**settings, **scores}, indent=1) + "\n")
    parallel.finalize()
    if options.lower_bound is not None and scores["average"] < options.lower_bound:
        logger.warning("average %.4f is below --lower-bound %s", scores["average"], options.lower_bound)
        return 1
    return 0
