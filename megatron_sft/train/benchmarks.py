"""Tasks and sample prompts in the middle of training: read before it, answered by the chunks that are trained, in any layout.

A step's numbers are the same with and without it: answers draw no random numbers of the run's and keep no gradients. Not here:
how answers are had and scored (tasks/), held-out loss (evaluate.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import RunConfig
from megatron_sft.config.tasks import CHATCORE
from megatron_sft.errors import DataError, TrainingError
from megatron_sft.inference.generation import answer_text, generate
from megatron_sft.inference.load import Inference
from megatron_sft.inference.prompts import Prompt, encode_prompts, end_token_ids, read_prompts
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks
from megatron_sft.tasks.answers import require_usable
from megatron_sft.tasks.chatcore import chatcore
from megatron_sft.tasks.evaluation import as_table, read_questions, scored
from megatron_sft.tasks.table import TASKS, Asked
from megatron_sft.train.metrics import keep_until

SAMPLES = "samples.jsonl"
"""In the --save folder: iteration, prompt and response, one object a sample."""


@dataclass(frozen=True)
class Benchmarks:
    """What is asked of the model while it is trained."""

    run: RunConfig
    tokenizer: Any
    questions: Mapping[str, Asked]
    """By task."""
    prompts: Sequence[Prompt]
    encoded: Sequence[Sequence[int]]
    """Token ids of the prompts."""

    def is_due(self, iteration: int, is_last: bool) -> bool:
        """Whether the model is asked after an iteration."""
        interval = self.run.tasks.eval_task_interval
        return is_last or bool(interval and iteration % interval == 0)

    def answer(self, chunks: Sequence[Any], ranks: Ranks, iteration: int) -> dict[str, float]:
        """Collective, within whole_parameters: asks, and logs what is said.

        Returns:
            eval/<task>: its score; the same on every rank.
        """
        loaded = self._loaded(chunks, ranks)
        results = [scored(loaded, name, asked, self.run.tasks) for name, asked in self.questions.items()]
        if results:
            logger.info("iteration %d\n%s", iteration, as_table(results))
        self.sample(chunks, ranks, iteration)
        scores = {result.task: result.score for result in results}
        core = chatcore(scores)
        return {f"eval/{name}": score for name, score in (scores if core is None else {**scores, CHATCORE: core}).items()}

    def _loaded(self, chunks: Sequence[Any], ranks: Ranks) -> Inference:
        return Inference(chunks, self.run.model, self.tokenizer, self.run.data.tokenizer_model, ranks)

    def sample(self, chunks: Sequence[Any], ranks: Ranks, iteration: int) -> None:
        """Collective, as answer: the sample prompts alone; before training with iteration 0."""
        if not self.prompts:
            return
        loaded = self._loaded(chunks, ranks)
        options = GenerateConfig(osl=self.run.tasks.eval_osl, batch_size=self.run.tasks.eval_batch_size)
        ends = end_token_ids(self.tokenizer, loaded.tokenizer_folder)
        limit = loaded.model.max_position_embeddings or None
        answers = generate(chunks, self.encoded, options, ends, ranks, limit)
        if ranks.rank != 0:
            return
        rows = []
        for prompt, answer in zip(self.prompts, answers, strict=True):
            said, response = str(prompt.messages[-1]["content"]), answer_text(self.tokenizer, answer)
            logger.info("iteration %d, %s\n> %s\n%s", iteration, prompt.where, said, response)
            rows.append({"iteration": iteration, "prompt": said, "response": response, "finish_reason": answer.finish_reason})
        if self.run.checkpoint.save:
            _append(Path(self.run.checkpoint.save) / SAMPLES, iteration, rows)


def is_less_better(metric: str) -> bool:
    """Of a name in metrics.jsonl: valid/... and eval/TASK."""
    task = TASKS.get(metric.removeprefix("eval/"))
    return metric.startswith("valid/") or (task is not None and task.is_lower_better)


def read_benchmarks(run: RunConfig, tokenizer: Any) -> Benchmarks | None:
    """What --eval-tasks and --sample-prompts ask; None where they ask nothing.

    Raises:
        DataError: rows are missing or wrong, or a prompt is too long.
        ConfigError: a chat template is needed, or a sandbox, and there is none.
    """
    if not run.tasks.eval_tasks and not run.tasks.sample_prompts:
        return None
    questions = read_questions(run.tasks)
    require_usable(tokenizer, questions)
    path = run.tasks.sample_prompts
    prompts = read_prompts(GenerateConfig(prompts_path=path), run.data) if path else []
    encoded = encode_prompts(tokenizer, prompts, True) if prompts else []
    limit = run.model.max_position_embeddings
    for prompt, ids in zip(prompts, encoded, strict=True):
        if limit and len(ids) >= limit:
            raise DataError(f"{prompt.where}: {len(ids)} tokens; expected fewer than {limit}. Shorten it, or leave it out.")
    return Benchmarks(run, tokenizer, questions, prompts, encoded)


def _append(path: Path, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines; those of this iteration and later, of an attempt that was broken off, go first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(path, iteration - 1)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise TrainingError(f"{path}: not written ({error.strerror}); expected a folder with room. Make room.") from None
