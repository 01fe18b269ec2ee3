"""Order of packs, global batches, micro-batches of one data-parallel rank, prefetch.

The position in the data is consumed_samples (packs): everything else is a pure function of it, so there is no loader
state to lose and the global order is the same for any number of data-parallel ranks. A run that changes its global batch
size inside an epoch has a second number, order_batch_size: the order of that epoch stays as it was begun, so that each
pack is taken once; only the steps are cut anew.

1. epoch_order: packs of one epoch, shuffled by (seed, epoch), then balanced: sorted by attention cost inside windows of
   steps, the steps of a window shuffled, so that the packs of one step cost about the same.
2. A step takes the next global_batch_size packs. It never crosses an epoch's end: the last of an epoch is smaller.
3. rank_micro_batches: which of those packs a rank takes, and how they share micro-batches; the same count on all ranks.
4. collate: packs -> one Batch.
5. TrainLoader: the above in a background thread, a bounded number of steps ahead. It ends with its iterator, and what
   fails in it is raised where the step is asked for.

Not here: which documents share a pack (packing.py), tensors of one pack (sft_dataset.py).
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sft.config.run import TrainConfig
from megatron_sft.data.packing import PackPlan, attention_cost, padded_lengths, token_counts
from megatron_sft.data.sft_dataset import SFTDataset

WINDOW_STEPS = 32
ALIGNMENTS = {"fp32": 1, "bf16": 64}
"""Rows of a matrix product, which are tokens: a multiple of 64 fills a GPU's tiles, and rows of few lengths reuse its memory."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: packs one after another in one row of T tokens, without their padded tails.

    Example: packs of [3, 2] and [4] tokens, multiple 4 -> T 12, cu_seqlens [0, 3, 5, 9, 12], document_ids (a, b, c, -1).
    """

    tokens: torch.Tensor
    """int64 [1, T]."""
    labels: torch.Tensor
    """int64 [1, T]."""
    loss_mask: torch.Tensor
    """float32 [1, T]."""
    position_ids: torch.Tensor
    """int64 [1, T]."""
    cu_seqlens: torch.Tensor
    """int32 [k + 1], 0..T: what attention treats as one document."""
    document_offsets: torch.Tensor
    """int32 [d + 1], 0..T: documents; equal to cu_seqlens unless reset_attention_mask is off."""
    max_seqlen: int
    """Longest span of cu_seqlens, in tokens."""
    document_ids: tuple[int, ...]
    """d ids in the store; -1: padding."""
    source_ids: torch.Tensor
    """int16 [d]; -1: padding."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for asynchronous copies to a CUDA device."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_mask=self.loss_mask.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            document_offsets=self.document_offsets.pin_memory(),
            source_ids=self.source_ids.pin_memory(),
        )


@dataclass(frozen=True)
class Step:
    """One optimizer step's data on this data-parallel rank."""

    micro_batches: list[Batch]
    num_samples: int
    """Packs of the step over all data-parallel ranks: what consumed_samples grows by."""
    epoch: float
    """Position after the step, in passes over the data: 1.5 is halfway through the second."""
    lengths: np.ndarray
    """int64: tokens of what attention treats as one document, without padding, over all data-parallel ranks."""
    order_batch_size: int
    """The global batch size that the order of the step's epoch was made for."""


def epoch_order(
    num_packs: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    costs: np.ndarray | None = None,
    global_batch_size: int = 1,
) -> np.ndarray:
    """Packs in the order in which epoch `epoch` takes them: a permutation, int64 [num_packs].

    Args:
        num_packs: packs of the data set.
        seed: of the data (DataConfig.seed).
        epoch: 0, 1, ...; every epoch has its own permutation.
        shuffle: False: 0, 1, 2, ...
        costs: int [num_packs], packing.attention_cost; with it, steps are balanced.
        global_batch_size: packs a step; matters only with costs.
    """
    if not shuffle:
        return np.arange(num_packs, dtype=np.int64)
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = random.permutation(num_packs).astype(np.int64)
    if costs is None or global_batch_size == 1:
        return order
    num_steps = num_packs // global_batch_size  # whole ones: a smaller last batch stays last
    for first in range(0, num_steps, WINDOW_STEPS):
        last = min(first + WINDOW_STEPS, num_steps)
        window = order[first * global_batch_size : last * global_batch_size]
        steps = window[np.argsort(costs[window], kind="stable")].reshape(last - first, global_batch_size)
        window[:] = steps[random.permutation(last - first)].reshape(-1)
    return order


def order_digest(plan: PackPlan, seed: int, shuffle: bool) -> str:
    """sha256, hex, of the packs as an epoch takes them: equal as long as data, flags and numpy's generator are the same."""
    digest = hashlib.sha256()
    for part in (plan.doc_ids, plan.offsets, epoch_order(len(plan), seed, 0, shuffle)):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()


def samples_of_steps(steps: int, num_packs: int, global_batch_size: int, start: int = 0) -> int:
    """Position after `steps` optimizer steps from position `start`, in packs.

    Example: 5 packs, global batch 2: 4 steps from 0 -> 7 (2, 2, 1, 2); 2 from 9 -> 12 (1, 2).
    """
    rest = -start % num_packs
    steps_to_end = -(-rest // global_batch_size)
    if steps < steps_to_end:
        return start + steps * global_batch_size
    epochs, steps = divmod(steps - steps_to_end, -(-num_packs // global_batch_size))
    return start + rest + epochs * num_packs + min(steps * global_batch_size, num_packs)


def steps_of_samples(samples: int, num_packs: int, global_batch_size: int, start: int = 0) -> int:
    """Optimizer steps from position `start` to position `samples`, in packs; 0 where that is not behind it.

    Example: 5 packs, global batch 2: from 0 to 7 -> 4 (2, 2, 1, 2); from 1 to 7 -> 3 (2, 2, 2).
    """
    rest = min(-start % num_packs, max(samples - start, 0))
    epochs, last = divmod(max(samples - start - rest, 0), num_packs)
    return sum(-(-part // global_batch_size) for part in (rest, last)) + epochs * -(-num_packs // global_batch_size)


def total_samples(
    train: TrainConfig, num_packs: int, global_batch_size: int, iteration: int = 0, consumed_samples: int = 0
) -> int:
    """Packs of the whole run: train_samples, num_epoch (2.5 of 5 packs -> 13), or where train_iters lead to.

    Args:
        iteration: steps that were done; with another global batch size, perhaps.
        consumed_samples: packs that they took.
    """
    if train.train_samples is not None:
        return train.train_samples
    if train.num_epoch is not None:
        return math.ceil(round(train.num_epoch * num_packs, 6))
    assert train.train_iters is not None, "one of train_iters, train_samples and num_epoch is set (problems.py)"
    left = max(train.train_iters - iteration, 0)
    return samples_of_steps(left, num_packs, global_batch_size, consumed_samples)


def rank_micro_batches(
    pack_ids: np.ndarray,
    pack_tokens: np.ndarray,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Which packs of a global batch share a micro-batch on one rank; every rank gets the same number of lists.

    Packs are dealt like cards, back and forth (ranks 0 1 2 2 1 0 0 1 2 ...), so that packs sorted by cost fall evenly.
    Example: packs 10..14, 2 ranks, micro-batch size 2 -> rank 0: [[10, 13], [14]], rank 1: [[11, 12], []].

    Args:
        pack_ids: int [n], the global batch.
        pack_tokens: int [packs], tokens of every pack of the data set.
        micro_batch_size: packs a micro-batch, when max_tokens is None.
        max_tokens: micro-batches are filled in order up to this many tokens; one pack is always taken.
    """
    rounds = -(-len(pack_ids) // dp_size)
    cards = np.full(rounds * dp_size, -1, dtype=np.int64)
    cards[: len(pack_ids)] = pack_ids
    hands = cards.reshape(rounds, dp_size)
    hands[1::2] = hands[1::2, ::-1].copy()
    by_rank = []
    for rank in range(dp_size):
        hand = [int(card) for card in hands[:, rank] if card >= 0]
        if max_tokens is None:
            by_rank.append([hand[i : i + micro_batch_size] for i in range(0, len(hand), micro_batch_size)])
        else:
            by_rank.append(_fill(hand, pack_tokens, max_tokens))
    count = max(len(lists) for lists in by_rank)
    return by_rank[dp_rank] + [[]] * (count - len(by_rank[dp_rank]))


def _fill(pack_ids: list[int], pack_tokens: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Consecutive packs share a micro-batch while their tokens stay within max_tokens."""
    lists: list[list[int]] = []
    room = 0
    for pack_id in pack_ids:
        tokens = int(pack_tokens[pack_id])
        if not lists or tokens > room:
            lists.append([])
            room = max_tokens
        lists[-1].append(pack_id)
        room -= tokens
    return lists


def pack_alignment(precision: str, tensor_parallel_size: int, context_parallel_size: int) -> int:
    """Tokens that a row's length is a multiple of, so that every rank's part of it fits: one place for all who ask that.

    Args:
        precision: of a GPU's matrix products, by name in ALIGNMENTS; elsewhere fp32, which asks for nothing.
        tensor_parallel_size: that cuts a context-parallel rank's part along the sequence; 1 without sequence parallelism.
        context_parallel_size: that cuts the row.
    """
    return context_parallel_size * math.lcm(tensor_parallel_size, ALIGNMENTS[precision])


def collate(dataset: SFTDataset, pack_ids: Sequence[int], multiple: int = 1) -> Batch:
    """Packs -> one Batch.

    Args:
        dataset: where the packs are.
        pack_ids: may be empty: an all-masked batch of minimal length, for a rank that has run out of packs.
        multiple: T is padded up to a multiple of it with a masked document (sequence and context parallelism).
    """
    packs = [dataset.pack(i) for i in pack_ids]
    used = sum(len(p.tokens) for p in packs)
    tail = -used % multiple if packs else multiple
    ends = np.cumsum([0, *(len(p.tokens) for p in packs)])[:-1]
    padding = np.full(tail, dataset.pad_token_id, dtype=np.int64)
    first = 0 if dataset.reset_position_ids or not packs else int(packs[-1].position_ids[-1]) + 1

    def row(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts))[None]

    def boundaries(parts: list[np.ndarray]) -> torch.Tensor:
        spans = [np.zeros(1, np.int32), *(part[1:] + end for part, end in zip(parts, ends, strict=True))]
        return torch.from_numpy(np.concatenate([*spans, [used + tail] * bool(tail)]).astype(np.int32))

    cu_seqlens = boundaries([p.cu_seqlens for p in packs])
    padding_id = np.full(int(bool(tail)), -1, dtype=np.int16)
    return Batch(
        tokens=row([*(p.tokens for p in packs), padding]),
        labels=row([*(p.labels for p in packs), padding]),
        loss_mask=row([*(p.loss_mask for p in packs), np.zeros(tail, dtype=np.float32)]),
        position_ids=row([*(p.position_ids for p in packs), np.arange(first, first + tail)]),
        cu_seqlens=cu_seqlens,
        document_offsets=boundaries([p.document_offsets for p in packs]),
        max_seqlen=int(cu_seqlens.diff().max()),
        document_ids=tuple(int(i) for p in packs for i in p.document_ids) + (-1,) * bool(tail),
        source_ids=torch.from_numpy(np.concatenate([*(p.source_ids for p in packs), padding_id])),
    )


def padding_batch(length: int) -> Batch:
    """A micro-batch of `length` masked tokens, for schedules that want more micro-batches than there are."""
    row, ends = torch.zeros(1, length, dtype=torch.int64), torch.tensor([0, length], dtype=torch.int32)
    mask, sources = torch.zeros(1, length), torch.tensor([-1], dtype=torch.int16)
    return Batch(row, row, mask, torch.arange(length)[None], ends, ends, length, (-1,), sources)


def lengthened(batch: Batch, length: int) -> Batch:
    """The batch with masked padding up to `length` tokens, a document of its own; unchanged when it is that long."""
    used = batch.tokens.shape[1]
    tail = length - used
    if not tail:
        return batch
    end = torch.tensor([length], dtype=torch.int32)
    pad = torch.nn.functional.pad
    return replace(
        batch,
        tokens=pad(batch.tokens, (0, tail)),
        labels=pad(batch.labels, (0, tail)),
        loss_mask=pad(batch.loss_mask, (0, tail)),
        position_ids=torch.cat([batch.position_ids, torch.arange(tail)[None]], dim=1),
        cu_seqlens=torch.cat([batch.cu_seqlens, end]),
        document_offsets=torch.cat([batch.document_offsets, end]),
        max_seqlen=max(batch.max_seqlen, tail),
        document_ids=(*batch.document_ids, -1),
        source_ids=torch.cat([batch.source_ids, torch.tensor([-1], dtype=torch.int16)]),
    )


class TrainLoader:
    """Iterates the Steps of one data-parallel rank from a position on, prepared ahead by a thread.

    Args:
        dataset: the packs.
        train: batch sizes and length of the run.
        seed: of the order (DataConfig.seed).
        shuffle: False keeps packs in plan order.
        dp_rank, dp_size: this rank among the data-parallel ranks.
        consumed_samples: where to start, in packs since the start of the run.
        iteration: optimizer steps that took them; None: as many as with this global batch size.
        order_batch_size: the global batch size that the order of the epoch at consumed_samples was made for; None: this one.
        num_samples: where to end; None: the run's total (train_samples, num_epoch or train_iters).
        multiple: row lengths are padded up to a multiple of it.
        prefetch: steps prepared ahead; 0: none, in the caller's thread.
        pin_memory: batches in page-locked memory.

    Attributes:
        num_packs, global_batch_size, num_samples, consumed_samples: as above, in packs.
        queue_depth: steps that were ready at the last step.
        wait_ms: how long the last step had to be waited for.
    """

    def __init__(
        self,
        dataset: SFTDataset,
        train: TrainConfig,
        *,
        seed: int = 1234,
        shuffle: bool = True,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
        iteration: int | None = None,
        order_batch_size: int | None = None,
        num_samples: int | None = None,
        multiple: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.num_packs = len(dataset)
        self.global_batch_size = train.global_batch_size or train.micro_batch_size * dp_size
        self.consumed_samples = consumed_samples
        if iteration is None:
            iteration = steps_of_samples(consumed_samples, self.num_packs, self.global_batch_size)
        if num_samples is None:
            num_samples = total_samples(train, self.num_packs, self.global_batch_size, iteration, consumed_samples)
        self.num_samples = num_samples
        self._iteration = iteration
        self._order_batch_size = order_batch_size or self.global_batch_size
        self.queue_depth = 0
        self.wait_ms = 0.0
        self._train = train
        self._seed, self._shuffle = seed, shuffle
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._multiple, self._prefetch, self._pin_memory = multiple, prefetch, pin_memory
        lengths = padded_lengths(dataset.store.lengths, dataset.multiple)
        self._pack_tokens = token_counts(dataset.plan, lengths)
        self._costs = attention_cost(dataset.plan, lengths)

    def __len__(self) -> int:
        """Optimizer steps of the whole run: those that were done, and those to come."""
        left = steps_of_samples(self.num_samples, self.num_packs, self.global_batch_size, self.consumed_samples)
        return self._iteration + left

    def __iter__(self) -> Iterator[Step]:
        steps = self._steps(self.consumed_samples)
        if not self._prefetch:
            yield from steps
            return
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sft-prefetch")
        try:
            ready = deque(executor.submit(next, steps, None) for _ in range(self._prefetch))
            while True:
                self.queue_depth = sum(future.done() for future in ready)
                start = time.perf_counter()
                step = ready.popleft().result()
                self.wait_ms = (time.perf_counter() - start) * 1e3
                if step is None:
                    return
                ready.append(executor.submit(next, steps, None))
                yield step
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _steps(self, consumed: int) -> Iterator[Step]:
        order_of_epoch, order, made_for = -1, np.zeros(0, dtype=np.int64), self._order_batch_size
        while consumed < self.num_samples:
            epoch, start = divmod(consumed, self.num_packs)
            if epoch != order_of_epoch:
                order_of_epoch = epoch
                made_for = self._order_batch_size if start else self.global_batch_size
                order = epoch_order(self.num_packs, self._seed, epoch, self._shuffle, self._costs, made_for)
            pack_ids = order[start : start + self.global_batch_size][: self.num_samples - consumed]
            consumed += len(pack_ids)
            lengths = self.dataset.attended_lengths(pack_ids)
            yield Step(self._batches(pack_ids), len(pack_ids), consumed / self.num_packs, lengths, made_for)

    def _batches(self, pack_ids: np.ndarray) -> list[Batch]:
        train = self._train
        groups = rank_micro_batches(
            pack_ids, self._pack_tokens, self._dp_rank, self._dp_size, train.micro_batch_size, train.max_tokens_per_gpu
        )
        batches = [collate(self.dataset, group, self._multiple) for group in groups]
        return [batch.pin_memory() for batch in batches] if self._pin_memory else batches


class ValidLoader(TrainLoader):
    """The same over held-out data: fixed order, from the start at every iteration, `eval_iters` global batches at most.

    Args:
        dataset: the held-out packs; no more than one pass over them is made.
        train: batch sizes, and eval_iters (-1: the whole set).
    """

    def __init__(
        self,
        dataset: SFTDataset,
        train: TrainConfig,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        global_batch_size = train.global_batch_size or train.micro_batch_size * dp_size
        wanted = len(dataset) if train.eval_iters < 0 else train.eval_iters * global_batch_size
        super().__init__(
            dataset,
            train,
            shuffle=False,
            dp_rank=dp_rank,
            dp_size=dp_size,
            num_samples=min(wanted, len(dataset)),
            multiple=multiple,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )
