"""One optimizer step: micro-batches through megatron-core's schedule, one division, one update.

1. `forward_step` moves a micro-batch to the device, cuts it for context parallelism and runs the model;
2. the schedule adds up gradients over micro-batches (and pipeline stages), finalize_model_grads over ranks;
3. losses and gradients that are not finite stop the run before the update, with the rows and ranks named;
4. the optimizer clips and updates (clipping.py), unless the loss is a spike (--loss-spike-factor).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sft.core_compat import device, moved
from megatron_sft.data.loader import Batch, lengthened, padding_batch
from megatron_sft.errors import TrainingError
from megatron_sft.log import logger
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.context import shard_tokens
from megatron_sft.model.noise import neftune_bounds, noise_keys
from megatron_sft.parallel import gather
from megatron_sft.train.clipping import squared_norms, update
from megatron_sft.train.loss import LossTotals, document_losses, step_loss, summed_totals


@dataclass(frozen=True)
class StepResult:
    """What a training step gives to the log."""

    totals: LossTotals
    grad_norm: float
    """Before clipping; 0 where nothing was updated."""
    spike: str = ""
    """Not empty where the loss was above the limit and nothing was updated: says so, with the worst rows."""


@dataclass(frozen=True)
class Noise:
    """NEFTune's, of one step."""

    alpha: float
    seed: int
    iteration: int


def run_schedule(chunks: list[Any], batches: list[Batch], forward_only: bool, noise: Noise | None = None) -> list[dict]:
    """Runs micro-batches forward (and backward) through every chunk of this rank.

    Args:
        chunks: one model, or one a virtual pipeline stage.
        batches: this rank's micro-batches; every data-parallel rank has the same number.
        forward_only: no gradient.
        noise: on the embeddings; None: none.

    Returns:
        One report a micro-batch on the last pipeline stage, nothing on the others.
    """
    longest = max(batch.tokens.shape[1] for batch in batches)
    if len(chunks) > 1:  # the interleaved schedule wants one shape, and a multiple of the stages
        missing = -len(batches) % parallel_state.get_pipeline_model_parallel_world_size()
        batches = [lengthened(batch, longest) for batch in batches] + [padding_batch(longest)] * missing
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, noise=noise),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=1,  # packs of a micro-batch stand behind one another in one row
        forward_only=forward_only,
    )


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    batches: list[Batch],
    num_sources: int,
    name_document: Any,
    check_for_nan: bool = True,
    iteration: int = 0,
    loss_limit: float = float("inf"),
    noise: Noise | None = None,
) -> StepResult:
    """One optimizer step.

    Args:
        chunks: the model, wrapped in DDP.
        optimizer: megatron-core's.
        batches: this rank's micro-batches of the step.
        num_sources: sources of the data set.
        name_document: document id -> "file:line", for errors.
        check_for_nan: stop on a loss or gradient that is not finite.
        iteration: number of this step, for errors.
        loss_limit: a loss above it is a spike: nothing is updated. Rank 0 decides for all.
        noise: on the embeddings; None: none.

    Raises:
        TrainingError: a loss or a gradient is NaN or infinite; nothing was updated.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = run_schedule(chunks, batches, forward_only=False, noise=noise)
    summed = summed_totals(reports, batches, num_sources, device())
    totals, is_finite, squares = _on_the_host(summed, chunks if check_for_nan else [], squared_norms(optimizer))
    if check_for_nan and not (is_finite and np.isfinite(totals.by_source).all()):
        _refuse(chunks, reports, batches, totals, name_document, iteration)
    if loss_limit != float("inf") and _is_spike(totals.loss, loss_limit):
        rows = _rows_where(lambda loss: loss > loss_limit, reports, batches, name_document)
        of_rows = f", most of it in the rows {', '.join(rows[:8])}" if rows else ""
        return StepResult(totals, 0.0, f"iteration {iteration}: loss {totals.loss:.4f} is above {loss_limit:.4f}{of_rows}")
    if not totals.trained_tokens:
        rows = _rows_where(lambda loss: True, reports, batches, name_document)
        named = f" ({', '.join(rows[:8])})" if rows else ""
        logger.warning("iteration %d: no token of its rows%s is trained; expected some. Look at their masks.", iteration, named)
        # experts' own losses would go in undivided
        for chunk in chunks:
            chunk.zero_grad_buffer()
        squares = squared_norms(optimizer).tolist()
    return StepResult(totals, update(optimizer, squares))


def _is_spike(loss: float, limit: float) -> bool:
    """Rank 0's answer, on every rank: its running mean is the one that checkpoints hold."""
    flag = torch.tensor(int(loss > limit), dtype=torch.int32, device=device())
    dist.broadcast(flag, src=0)
    return bool(flag)


def _rows_where(is_meant: Callable[[float], bool], reports: list[dict], batches: list[Batch], name_document: Any) -> list[str]:
    """Collective: the rows of all ranks whose own mean loss (NaN if any token's is) is meant, worst first."""
    rows = []
    for report, batch in zip(reports, batches, strict=False):
        for document, (loss, trained, _) in zip(batch.document_ids, report["documents"].tolist(), strict=False):
            mean = loss / max(trained, 1.0)
            if document >= 0 and is_meant(mean):
                rows.append((-mean if math.isfinite(mean) else -math.inf, name_document(document)))
    return list(dict.fromkeys(row for _, row in sorted({item for part in gather(rows) for item in part})))


def _gradient_buffers(chunks: list[Any]) -> list[torch.Tensor]:
    return [buffer.grad_data for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor.sum())) for tensor in tensors)


def _on_the_host(totals: torch.Tensor, chunks: list[Any], squares: torch.Tensor) -> tuple[LossTotals, bool, list[float]]:
    """A step's totals, whether every rank's gradient is finite (True without chunks), squared norms: the one wait of a step."""
    flag = torch.zeros((), dtype=torch.int32, device=totals.device)
    if chunks:
        flag += sum((~torch.isfinite(tensor.sum())).int() for tensor in _gradient_buffers(chunks))
        dist.all_reduce(flag)
    bad, *sums = torch.cat((flag[None].double(), squares.double(), totals.flatten())).tolist()
    return LossTotals(np.array(sums[len(squares) :]).reshape(totals.shape)), not bad, sums[: len(squares)]


def _refuse(
    chunks: list[Any],
    reports: list[dict],
    batches: list[Batch],
    totals: LossTotals,
    name_document: Any,
    iteration: int,
) -> None:
    """Raises the same TrainingError on every rank: the step's loss or a rank's gradient is not finite."""
    if np.isfinite(totals.by_source).all():
        of_what = f"; the loss is finite, the gradient is not: {_bad_gradients(chunks, batches, name_document)}"
    else:
        rows = _rows_where(lambda loss: not math.isfinite(loss), reports, batches, name_document)
        of_what = f" in the rows {', '.join(rows[:8])}" if rows else ""
    raise TrainingError(
        f"iteration {iteration}: loss or gradient is not finite{of_what}. Expected finite numbers. "
        "Nothing was updated in this step: lower --lr, look at the rows, or pass --no-check-for-nan-in-loss-and-grad to go on."
    )


def _bad_gradients(chunks: list[Any], batches: list[Batch], name_document: Any) -> str:
    """Collective: the micro-batches whose own gradient is not finite, found by running each again without a reduction."""
    config = chunks[0].config
    kept = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    texts = []
    try:
        for number, batch in enumerate(batches, start=1):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            with contextlib.ExitStack() as stack:
                for chunk in chunks:
                    stack.enter_context(chunk.no_sync())
                run_schedule(chunks, [batch], forward_only=False)
            if not _is_finite(_gradient_buffers(chunks)):
                rows = ", ".join(name_document(document) for document in batch.document_ids if document >= 0)
                named = [item for chunk in chunks for item in chunk.module.named_parameters()]
                bad = [name for name, parameter in named if parameter.requires_grad and not _is_finite([parameter.main_grad])]
                texts.append(f"rank {dist.get_rank()}, micro-batch {number} ({rows}), {', '.join(bad[:3])}")
    finally:
        config.finalize_model_grads_func, config.no_sync_func = kept
    named = [text for part in gather(texts) for text in part]
    return "; ".join(named[:4]) or "every micro-batch alone is, their sum is not"


def forward_step(batches: Iterator[Batch], model: Any, noise: Noise | None = None) -> tuple[torch.Tensor, Any]:
    """megatron-core's forward_step_func: one micro-batch through one model chunk.

    Returns:
        Per-token losses [1, tokens] on the last stage (hidden states before it) and the function that sums them.
    """
    batch = next(batches)
    here = device()
    tokens, labels, loss_mask, position_ids = (
        shard_tokens(x).to(here, non_blocking=True) for x in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
    )
    offsets = batch.document_offsets.to(here, non_blocking=True).long()
    counts, length = offsets.diff(), batch.tokens.shape[1]
    documents = shard_tokens(torch.repeat_interleave(counts, output_size=length)[None])
    output = model(
        tokens,
        position_ids,
        None,
        labels=labels,
        loss_mask=loss_mask,
        padding_mask=_padding_mask(batch) if model.config.num_moe_experts else None,
        packed_seq_params=packed_seq_params(batch.cu_seqlens, batch.max_seqlen, here),
        noise=_embedding_noise(batch, model.config.hidden_size, noise) if noise else None,
        trained=moved(shard_tokens(batch.loss_mask)[0].nonzero()[:, 0]),
    )
    return output, partial(_loss, loss_mask, documents[0], len(counts))


def _embedding_noise(batch: Batch, hidden_size: int, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """([1, tokens / cp_size] int64, the same float32): the model's `noise`."""
    ids, lengths = torch.tensor(batch.document_ids), batch.document_offsets.long().diff()
    keys = noise_keys(noise.seed, noise.iteration, ids, lengths)
    bounds = neftune_bounds(noise.alpha, lengths, hidden_size, ids >= 0)
    return moved(shard_tokens(keys[None])), moved(shard_tokens(bounds[None]))


def _padding_mask(batch: Batch) -> torch.Tensor:
    """[1, tokens / cp_size] bool, True where experts need no balance."""
    padding = torch.tensor(batch.document_ids) < 0
    return moved(shard_tokens(padding.repeat_interleave(batch.document_offsets.diff())[None]))


def _loss(loss_mask: torch.Tensor, documents: torch.Tensor, count: int, token_loss: torch.Tensor) -> tuple:
    weighted = token_loss * loss_mask
    return step_loss(weighted, loss_mask, document_losses(weighted, loss_mask, documents, count))
