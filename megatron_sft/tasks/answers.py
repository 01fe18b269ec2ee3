"""How a model's answers are had, one function a Kind of table.py. All are collective, in any layout; every rank gets all answers.

Not here: what is asked (one file a task), what an answer is worth (their score()), the pass through the stages
(inference/forward.py).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.tasks import TasksConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import ConfigError
from megatron_sft.inference.forward import (
    dealt,
    evaluating,
    forward,
    from_all_ranks,
    from_last_stage,
    idle,
    last_logits,
    packed_row,
    require_known_tokens,
)
from megatron_sft.inference.generation import answer_text, generate
from megatron_sft.inference.load import Inference
from megatron_sft.inference.prompts import Prompt, encode_prompts, end_token_ids
from megatron_sft.log import logger
from megatron_sft.model.head import Head
from megatron_sft.tasks import text
from megatron_sft.tasks.question import LETTERS, Question
from megatron_sft.tasks.table import TASKS, Asked, Kind, Task

T = TypeVar("T")
ROW_TOKENS = 512
"""A packed row has about so many tokens for each problem of --eval-batch-size, where the length of a problem is not its own."""
LOGIT_TOKENS = 256
"""Whole logits exist of so many tokens at once."""


def choice_token_ids(tokenizer: Any, before: str = "Answer: ") -> list[int]:
    """The tokens of "A" to "E" as they stand after a text."""
    ids = [tokenizer(before + letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
    if len(set(ids)) != len(LETTERS):
        same = f"{tokenizer.name_or_path}: the letters A to E end in the same token; expected five."
        raise ConfigError([f"{same} Use the model's tokenizer."])
    return ids


def predictions(
    chunks: Sequence[Any],
    sequences: Sequence[Sequence[int]],
    choice_ids: Sequence[int],
    batch_size: int,
    choices: Sequence[int] = (),
) -> list[int]:
    """Index of the likeliest choice after each sequence. Collective, in any layout; every rank returns all.

    Sequences of like length share a packed row; they are dealt over data- and context-parallel ranks.

    Args:
        chunks: this rank's model.
        sequences: token ids, at least one each.
        choice_ids: a token a choice.
        batch_size: sequences that share a row.
        choices: how many of the first choices a sequence has, one number each; none: all of them.
    """
    require_known_tokens(chunks, sequences)
    predicted: dict[int, int] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    numbers = torch.arange(len(choice_ids), device=device())
    with evaluating(chunks):
        for batch in _rows(chunks, order, batch_size):
            logits = last_logits(chunks, *packed_row([sequences[i] for i in batch], keeps=False))
            chosen = torch.empty(len(batch), dtype=torch.int64, device=device())
            if logits is not None:
                counts = torch.tensor([choices[i] if choices else len(choice_ids) for i in batch], device=device())
                chosen = logits[:, choice_ids].masked_fill(numbers >= counts[:, None], float("-inf")).argmax(-1)
            predicted.update(zip(batch, from_last_stage(chosen).tolist(), strict=True))
    return from_all_ranks(predicted)


def log_likelihoods(
    chunks: Sequence[Any], sequences: Sequence[Sequence[int]], counts: Sequence[int], batch_size: int
) -> list[float]:
    """Natural logarithm of the probability of each sequence's last tokens after those before. Collective; every rank has all.

    Args:
        chunks: this rank's model.
        sequences: token ids, at least two each; of the last ones no position is needed.
        counts: how many of each one's last tokens are asked about: at least 1, and fewer than it has.
        batch_size: sequences that share a row. Those that differ in their last token alone are one.

    Example: sequence [5, 6, 7], count 2 -> log p(6 | 5) + log p(7 | 5 6)
    """
    return [value for value, _ in _likelihoods(chunks, sequences, counts, batch_size, lambda head, states, labels: labels < 0)]


def greedy_likelihoods(
    chunks: Sequence[Any], sequences: Sequence[Sequence[int]], counts: Sequence[int], batch_size: int
) -> list[tuple[float, bool]]:
    """The same, and whether each of the tokens is the likeliest one."""

    def is_likeliest(head: Head, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.cat([head.whole_logits(some).argmax(-1) for some in states.split(LOGIT_TOKENS)]) == labels

    return _likelihoods(chunks, sequences, counts, batch_size, is_likeliest)


def _likelihoods(
    chunks: Sequence[Any],
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int],
    batch_size: int,
    says: Callable[[Head, torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[tuple[float, bool]]:
    """log_likelihoods, with whether `says` is true of all tokens: (head, states [tokens, hidden], labels) -> [tokens] bool."""
    require_known_tokens(chunks, sequences)
    asking: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        asking.setdefault(tuple(sequence[:-1]), []).append(i)
    likelihoods: dict[int, tuple[float, bool]] = {}

    def output(head: Head, hidden: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        states = hidden[places]
        nats = head.losses(states, labels, torch.ones_like(labels, dtype=torch.float32))
        return torch.stack([-nats.double(), says(head, states, labels).double()], dim=1)

    with evaluating(chunks):
        for batch in _rows(chunks, sorted(asking, key=len), batch_size):
            ends = itertools.accumulate(len(tokens) for tokens in batch)
            asked = [(i, end) for tokens, end in zip(batch, ends, strict=True) for i in asking[tokens]]
            places = torch.tensor([place for i, end in asked for place in range(end - counts[i], end)], device=device())
            labels = torch.tensor([token for i, _ in asked for token in sequences[i][-counts[i] :]], device=device())
            values = forward(chunks, *packed_row(batch, keeps=False), functools.partial(output, places=places, labels=labels))
            sums = torch.zeros(len(asked), 2, dtype=torch.float64, device=device())
            if values is not None:
                owners = [number for number, (i, _) in enumerate(asked) for _ in range(counts[i])]
                sums.index_add_(0, torch.tensor(owners, device=device()), values)
            for (i, _), (value, hits) in zip(asked, from_last_stage(sums).tolist(), strict=True):
                likelihoods[i] = value, hits == counts[i]
    return from_all_ranks(likelihoods)


def _rows(chunks: Sequence[Any], order: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """This rank's batches; where it has none any more it keeps those that it shares experts with company."""
    batches = dealt(order, batch_size)
    for number, batch in enumerate(batches, start=1):
        if batch:
            yield batch
        else:
            idle(chunks)
        if number % 10 == 0:
            logger.info("answered %d of %d questions", number * len(order) // len(batches), len(order))


def encoded(loaded: Inference, texts: Sequence[str], is_chat: bool, room: int = 0) -> list[list[int]]:
    """Token ids of prompts, as they are or as what a user says; too long ones lose their beginning, with a warning.

    Args:
        loaded: the model.
        texts: one a prompt.
        is_chat: through the chat template.
        room: positions that are left for an answer, at most half of all.
    """
    if is_chat:
        prompts = [
            Prompt([{"role": "user", "content": said}], f"question {number}") for number, said in enumerate(texts, start=1)
        ]
        sequences = encode_prompts(loaded.tokenizer, prompts, True)
    else:
        sequences = [list(ids) for ids in loaded.tokenizer(list(texts))["input_ids"]]
    limit = loaded.model.max_position_embeddings
    limit -= min(room, limit // 2)
    cut = sum(len(ids) > limit for ids in sequences) if limit else 0
    if cut:
        logger.warning("%d prompts are longer than %s tokens: their beginning is left out", cut, limit)
    return [ids[-limit:] if limit else ids for ids in sequences]


def letters(loaded: Inference, task: Task, asked: Asked, config: TasksConfig) -> list[int]:
    """Kind.LETTER and CHAT_LETTER: the index of the likeliest letter."""
    is_chat = task.kind is Kind.CHAT_LETTER
    sequences = encoded(loaded, [task.prompt(*pair) for pair in asked], is_chat)
    ids = choice_token_ids(loaded.tokenizer, loaded.decode(sequences[0]) if is_chat else "Answer: ")
    choices = [len(question.choices) for question, _ in asked]
    return predictions(loaded.chunks, sequences, ids, config.eval_batch_size, choices)


def likeliest(loaded: Inference, task: Task, asked: Asked, config: TasksConfig) -> list[int]:
    """Kind.CHOICE and CHOICE_NORM: the index of the likeliest text after the prompt, in all or by its length in characters."""
    pairs = [(task.prompt(question, shots), f" {choice}") for question, shots in asked for choice in question.choices]
    limit = loaded.model.max_position_embeddings or None
    before = loaded.tokenizer([first for first, _ in pairs])["input_ids"]
    whole = [list(ids) for ids in loaded.tokenizer([first + then for first, then in pairs])["input_ids"]]
    counts = [max(len(ids) - len(first), 1) for ids, first in zip(whole, before, strict=True)]
    if limit and (cut := sum(len(ids) > limit + 1 for ids in whole)):
        logger.warning("%d prompts with their choice are longer than %s tokens: their beginning is left out", cut, limit)
        whole = [ids[-limit - 1 :] for ids in whole]
        counts = [min(count, len(ids) - 1) for count, ids in zip(counts, whole, strict=True)]
    values = iter(log_likelihoods(loaded.chunks, whole, counts, config.eval_batch_size))
    chosen = []
    for question, _ in asked:
        worth = [next(values) / (max(len(choice), 1) if task.kind is Kind.CHOICE_NORM else 1) for choice in question.choices]
        chosen.append(max(range(len(worth)), key=worth.__getitem__))
    return chosen


def texts(loaded: Inference, task: Task, asked: Asked, config: TasksConfig) -> list[str]:
    """Kind.TEXT and CHAT_TEXT: the greedy answer, up to one of the task's stop strings."""
    is_chat = task.kind is Kind.CHAT_TEXT
    prompts = encoded(loaded, [task.prompt(*pair) for pair in asked], is_chat, config.eval_osl)
    options = GenerateConfig(osl=config.eval_osl, batch_size=config.eval_batch_size, stop=task.stop)
    ends = end_token_ids(loaded.tokenizer, loaded.tokenizer_folder, is_chat)
    limit = loaded.model.max_position_embeddings or None

    def adds(tokens: list[int]) -> list[int]:
        assert task.adds is not None, "asked only where there is one"
        added = task.adds(loaded.decode(tokens[-ROW_TOKENS // 4 :]))
        return list(loaded.tokenizer(added, add_special_tokens=False)["input_ids"]) if added else []

    forces = adds if task.adds else None
    answers = generate(loaded.chunks, prompts, options, ends, loaded.ranks, limit, decode=loaded.decode, forces=forces)
    return [answer_text(loaded.tokenizer, answer) for answer in answers]


def nats(loaded: Inference, task: Task, asked: Asked, config: TasksConfig) -> list[float]:
    """Kind.NATS: minus the logarithm of each document's probability, by windows of text.WINDOW tokens."""
    tokenizer, limit = loaded.tokenizer, loaded.model.max_position_embeddings or text.WINDOW
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    size = min(limit - 1, text.WINDOW)
    windows: list[list[int]] = []
    owners: list[int] = []
    for number, (question, shots) in enumerate(asked):
        ids = [first, *tokenizer(task.prompt(question, shots), add_special_tokens=False)["input_ids"]]
        cut = [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)]
        windows += cut
        owners += [number] * len(cut)
    batch_size = max(1, config.eval_batch_size * ROW_TOKENS // size)
    values = log_likelihoods(loaded.chunks, windows, [len(window) - 1 for window in windows], batch_size)
    sums = [0.0] * len(asked)
    for owner, value in zip(owners, values, strict=True):
        sums[owner] -= value
    return sums


ANSWERS: Mapping[Kind, Callable[[Inference, Task, Asked, TasksConfig], Sequence[Any]]] = {
    Kind.LETTER: letters,
    Kind.CHAT_LETTER: letters,
    Kind.CHOICE: likeliest,
    Kind.CHOICE_NORM: likeliest,
    Kind.TEXT: texts,
    Kind.CHAT_TEXT: texts,
    Kind.NATS: nats,
}
"""How the answers of each kind are had."""


def require_usable(tokenizer: Any, names: Iterable[str]) -> None:
    """Raises ConfigError where a task needs a chat template, or letters with a token each, and the tokenizer has none."""
    kinds = {TASKS[name].kind for name in names}
    if kinds & {Kind.CHAT_LETTER, Kind.CHAT_TEXT}:
        encode_prompts(tokenizer, [Prompt([{"role": "user", "content": "a"}], "a question")], True)
    if kinds & {Kind.LETTER, Kind.CHAT_LETTER}:
        choice_token_ids(tokenizer)


def shown(task: Task, question: Question, answer: Any) -> str:
    """An answer, or the right one, as a log of questions has it."""
    if isinstance(answer, int):
        letter = LETTERS[answer]
        return letter if task.kind in (Kind.LETTER, Kind.CHAT_LETTER) else f"{letter}: {question.choices[answer]}"
    return str(answer)
