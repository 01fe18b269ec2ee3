"""One forward pass of a model as it is cut for training: tensor and sequence parallel, all pipeline stages, virtual ones too.

Data-parallel and context-parallel ranks hold the same weights: here each of them has whole rows of its own.
Not here: what follows from the logits (generation.py, tasks/).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_sft.core_compat import device
from megatron_sft.errors import DataError
from megatron_sft.hf.weights import core_module
from megatron_sft.model.cache import CachedSeqParams
from megatron_sft.model.head import Output
from megatron_sft.parallel import Ranks, gather

T = TypeVar("T")


@contextlib.contextmanager
def evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """The chunks in eval mode within it, and as they were after it."""
    training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)


def packed_row(sequences: Sequence[Sequence[int]], keeps: bool) -> tuple[torch.Tensor, torch.Tensor, CachedSeqParams]:
    """Sequences behind one another.

    Args:
        sequences: token ids, at least one each.
        keeps: keys, values and states are kept, so that tokens can follow.

    Returns:
        Tokens and position ids, each [1, T] int64, and where the documents begin: [[5, 6], [7]] -> [5, 6, 7], [0, 1, 0].
    """
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32).to(device())
    params = CachedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=torch.zeros(len(lengths), dtype=torch.int64, device=device()),
        tokens=len(tokens),
        longest=max(lengths),
        keeps=keeps,
    )
    return tokens[None].to(device()), positions[None].to(device()), params


def require_known_tokens(chunks: Sequence[Any], sequences: Iterable[Sequence[int]]) -> None:
    """Raises DataError, alike on all ranks, where one has a token that the model's embeddings have no row for."""
    known = core_module(chunks[0]).vocab_rows
    highest = max((max(sequence) for sequence in sequences if sequence), default=0)
    if highest >= known:
        raise DataError(
            f"a prompt has token id {highest}, but the model's vocabulary ends at {known - 1}; expected the model's own "
            "tokenizer. Pass its folder as --tokenizer-model."
        )


@torch.no_grad()
def forward(
    chunks: Sequence[Any], tokens: torch.Tensor, position_ids: torch.Tensor, params: CachedSeqParams, output: Output
) -> torch.Tensor | None:
    """One pass through all pipeline stages. Collective over tensor, pipeline and expert parallel ranks.

    Args:
        chunks: this rank's, wrapped in DDP or not.
        tokens: [1, T] int64.
        position_ids: [1, T] int64.
        params: where documents begin, and their cache.
        output: what the last stage gives, of its head and hidden states, of which the first T are the row's.

    Returns:
        The output on the last stage; None elsewhere.
    """
    models = [core_module(chunk) for chunk in chunks]
    config, result = models[0].config, None
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    filled = -(-tokens.shape[1] // ranks) * ranks  # attention and Mamba leave out what is behind the documents
    tokens, position_ids = (F.pad(row, (0, filled - row.shape[1])) for row in (tokens, position_ids))
    for model in models:
        if not model.pre_process:
            shape = filled // ranks, 1, config.hidden_size
            hidden = torch.empty(shape, dtype=config.params_dtype, device=tokens.device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor([hidden])
        result = model(tokens, position_ids, packed_seq_params=params, output=output)
        if not model.post_process:
            dist.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            result = None
    return result


def last_logits(
    chunks: Sequence[Any], tokens: torch.Tensor, position_ids: torch.Tensor, params: CachedSeqParams
) -> torch.Tensor | None:
    """Logits of each document's last token, [documents, vocab_size] float32, on the last stage. Arguments as forward's."""
    ends = params.cu_seqlens_q[1:].long() - 1
    return forward(chunks, tokens, position_ids, params, lambda head, hidden: head.whole_logits(hidden[ends]))


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's values, on every stage; all stages give a tensor of the same shape and dtype."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, last, parallel_state.get_pipeline_model_parallel_group())
    return values


def dealt(items: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """The batches of this data- or context-parallel rank: 0, 1, 2 over two ranks in batches of 1 -> [0], [2] and [1], [].

    All ranks have equally many, of which the last may be empty.
    """
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    mine = items[parallel_state.get_data_parallel_rank(with_context_parallel=True) :: size]
    most = -(-len(items) // size)
    return [mine[start : start + batch_size] for start in range(0, most, batch_size)]


def from_all_ranks(mine: Mapping[int, T]) -> list[T]:
    """Results of all ranks that items were dealt to, each by its index, in order: {0: a} and {1: b} -> [a, b]. Collective."""
    parts = gather(mine, parallel_state.get_data_parallel_group(with_context_parallel=True))
    return [value for _, value in sorted((item for part in parts for item in part.items()), key=lambda item: item[0])]


def is_needed(wants: bool, ranks: Ranks) -> bool:
    """Whether any rank that this one shares experts with wants another pass: all of them then run one."""
    if ranks.ep_size == 1:
        return wants
    flag = torch.tensor(int(wants), device=device())
    dist.all_reduce(flag, dist.ReduceOp.MAX, parallel_state.get_expert_model_parallel_group())
    return bool(flag)


def idle(chunks: Sequence[Any]) -> None:
    """A pass over one token, for the ranks that this one shares experts with."""
    forward(chunks, *packed_row([[0]], keeps=False), lambda head, hidden: hidden[:1])
