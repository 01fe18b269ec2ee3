"""Text from a model, whole or cut over ranks: packed prefill, then one token a document and step from a KV cache.

1. prompts are dealt over data-parallel ranks;
2. each batch is prefilled in one packed row, then decoded, and finished prompts leave it;
3. every rank returns every result.

Not here: loading the model (load.py), reading prompts and writing answers (prompts.py).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sft.config.options import GenerateConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import DataError
from megatron_sft.log import logger
from megatron_sft.model.cache import CachedSeqParams
from megatron_sft.parallel import Ranks, gather

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """What a model answered to one prompt."""

    tokens: list[int]
    """New tokens, without the end token."""
    finish_reason: str
    """stop: an end token came; length: the limit of new tokens or of positions was reached; cut: on_token ended it."""


OnToken = Callable[[int, int], bool]
"""(number of the prompt, its new token) -> whether its answer ends there; called on every rank, with one answer on all."""


def prefill_params(lengths: Sequence[int], limits: Sequence[int] | None, where: torch.device) -> CachedSeqParams:
    """The packed row of prompts of these lengths.

    Args:
        lengths: of the prompts.
        limits: tokens that may follow each prompt; None: nothing is kept for decoding.
        where: device of the row.
    """
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=where)
    longest = max(lengths)
    capacity = 0 if limits is None else max(length + limit for length, limit in zip(lengths, limits, strict=True))
    return CachedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=torch.zeros(len(lengths), dtype=torch.int64, device=where),
        capacity=capacity,
        longest=longest,
    )


def last_logits(chunk: Any, tokens: torch.Tensor, position_ids: torch.Tensor, params: CachedSeqParams) -> torch.Tensor | None:
    """One forward pass through all pipeline stages.

    Args:
        chunk: this rank's model chunk.
        tokens: [1, T] int64.
        position_ids: [1, T] int64.
        params: where documents begin, and their cache.

    Returns:
        Logits of each document's last token, [documents, vocab_size] float32, on the last stage; None elsewhere.
    """
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    config = chunk.config
    if not first:
        hidden = torch.empty(tokens.shape[1], 1, config.hidden_size, dtype=config.params_dtype, device=tokens.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor([hidden])
    ends = params.cu_seqlens_q[1:].long() - 1
    output = chunk(tokens, position_ids, packed_seq_params=params, output=lambda head, hidden: head.whole_logits(hidden[ends]))
    if last:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's values, on every stage; all stages give a tensor of the same shape and dtype."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, last, parallel_state.get_pipeline_model_parallel_group())
    return values


def from_all_shards(mine: Mapping[int, T], shards: int) -> list[T]:
    """Results of all data-parallel ranks, each by its index, in order: {0: a} and {1: b} -> [a, b]. Collective."""
    parts = gather(mine, parallel_state.get_data_parallel_group()) if shards > 1 else [mine]
    return [value for _, value in sorted((item for part in parts for item in part.items()), key=lambda item: item[0])]


def packed_rows(sequences: Sequence[Sequence[int]], where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and position ids of a packed row, each [1, T] int64: [[5, 6], [7]] -> [5, 6, 7] and [0, 1, 0]."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=where)
    positions = torch.cat([torch.arange(len(sequence), device=where) for sequence in sequences])
    return tokens[None], positions[None]


def sample(logits: torch.Tensor, options: GenerateConfig, draws: Sequence[float]) -> torch.Tensor:
    """Chooses a token of each row, with transformers' order: temperature, top-k, top-p.

    Args:
        logits: [rows, vocab] float32.
        options: temperature 0 takes the most likely token.
        draws: one number in [0, 1) a row, from the row's own generator.

    Returns:
        [rows] int64.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        ordered = ordered[:, : options.top_k]
    probabilities = ordered.double().softmax(-1)
    summed = probabilities.cumsum(-1)
    kept = torch.where(summed - probabilities < options.top_p, probabilities, 0.0).cumsum(-1)
    points = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * kept[:, -1:]
    chosen = torch.searchsorted(kept, points, right=True).clamp_max(kept.shape[1] - 1)
    return ids.gather(1, chosen)[:, 0]


@torch.no_grad()
def generate(
    chunk: Any,
    prompts: Sequence[Sequence[int]],
    options: GenerateConfig,
    end_token_ids: Collection[int],
    ranks: Ranks,
    max_positions: int | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continues prompts. Collective: all ranks call it with the same prompts, and all get all results.

    Args:
        chunk: this rank's model chunk (no virtual pipeline, context or sequence parallelism).
        prompts: token ids, at least one each. A prompt's sample depends on the seed and its index alone.
        options: osl, temperature, top_k, top_p, seed, batch_size.
        end_token_ids: each ends an answer.
        ranks: where this process stands.
        max_positions: prompt and answer together are at most that long; None: no limit.
        on_token: sees each token as it comes; every rank then generates every answer.
    """
    # with experts dealt over ranks, all of them must run the same number of steps
    shards, shard = (1, 0) if ranks.ep_size > 1 or on_token else (ranks.dp_size, ranks.dp_rank)
    mine = range(shard, len(prompts), shards)
    for index, prompt in enumerate(prompts):
        if not prompt or (max_positions is not None and len(prompt) >= max_positions):
            raise DataError(
                f"prompt {index + 1} has {len(prompt)} tokens; expected 1 to {(max_positions or 0) - 1}. "
                "Shorten it, or leave it out."
            )
    training = chunk.training
    chunk.eval()
    results: dict[int, Generation] = {}
    for start in range(0, len(mine), options.batch_size):
        indices = mine[start : start + options.batch_size]
        limits = [min(options.osl, (max_positions or 2**31) - len(prompts[i])) for i in indices]
        ends = frozenset(end_token_ids)
        answers = _generate_batch(chunk, [prompts[i] for i in indices], limits, indices, options, ends, on_token)
        results.update(zip(indices, answers, strict=True))
        if on_token is None:
            logger.info("generated %d of %d answers", min(len(results) * shards, len(prompts)), len(prompts))
    chunk.train(training)
    return from_all_shards(results, shards)


def _generate_batch(
    chunk: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    indices: Sequence[int],
    options: GenerateConfig,
    end_token_ids: frozenset[int],
    on_token: OnToken | None,
) -> list[Generation]:
    """Prefill and decode of prompts that fit in memory together; finished ones leave the batch."""
    where = device()
    answers: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    generators = [np.random.default_rng([options.seed, index]) for index in indices]
    params = prefill_params([len(prompt) for prompt in prompts], limits, where)
    tokens, positions = packed_rows(prompts, where)
    live = list(range(len(prompts)))
    while live:
        logits = last_logits(chunk, tokens, positions, params)
        if logits is None:
            chosen = torch.empty(len(live), dtype=torch.int64, device=where)
        else:
            chosen = sample(logits, options, [generators[row].random() if options.temperature else 0.0 for row in live])
        new = from_last_stage(chosen).tolist()
        stay = []
        for place, (row, token) in enumerate(zip(live, new, strict=True)):
            if token in end_token_ids:
                reasons[row] = "stop"
                continue
            answers[row].append(token)
            if on_token is not None and on_token(indices[row], token):
                reasons[row] = "cut"
            elif len(answers[row]) < limits[row]:
                stay.append(place)
        live, kept_all = [live[place] for place in stay], len(stay) == len(live)
        lengths = [len(prompts[row]) + len(answers[row]) for row in live]
        if _first_long(chunk) in lengths:  # cached keys were turned with other frequencies
            params = prefill_params(lengths, [limits[row] - len(answers[row]) for row in live], where)
            tokens, positions = packed_rows([[*prompts[row], *answers[row]] for row in live], where)
        elif live:
            params.advance(max(lengths))
            if not kept_all:
                params.keep(torch.tensor(stay, device=where))
            tokens = torch.tensor([[answers[row][-1] for row in live]], device=where)
            positions = params.lengths[None]
    return [Generation(answer, reason) for answer, reason in zip(answers, reasons, strict=True)]


def _first_long(chunk: Any) -> int | None:
    """Tokens of the shortest document that longrope turns with its long factors; None: all are turned alike."""
    original = chunk.rotary_table.original_positions if chunk.rotary_table is not None else None
    return None if original is None else original + 1
