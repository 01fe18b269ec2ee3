import threading
import time

import numpy as np
import pytest

from megatron_sft.config.run import TrainConfig
from megatron_sft.data.loader import (
    TrainLoader,
    ValidLoader,
    collate,
    epoch_order,
    order_digest,
    pack_alignment,
    rank_micro_batches,
    samples_of_steps,
    steps_of_samples,
    total_samples,
)
from megatron_sft.data.packing import attention_cost, pack
from megatron_sft.data.sft_dataset import SFTDataset
from megatron_sft.data.store import MemoryStore


def dataset_of(lengths, seq_length=16, multiple=1, **flags):
    documents = [(np.arange(100 * i, 100 * i + n), np.ones(n, dtype=np.uint8)) for i, n in enumerate(lengths)]
    store = MemoryStore(documents, source_ids=[i % 2 for i in range(len(lengths))], source_names=("a", "b"))
    plan = pack(store.lengths, seq_length, "sequential", multiple)
    return SFTDataset(store, plan, seq_length, 7, multiple=multiple, **flags)


def some_lengths(count, seed=0):
    return np.random.default_rng(seed).integers(1, 17, size=count).tolist()


def test_collate_joins_packs_and_pads_the_row_up():
    dataset = dataset_of([3, 2, 15])
    batch = collate(dataset, [0, 1], multiple=8)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (1, 24)
    assert batch.tokens[0].tolist() == [0, 1, 2, 100, 101, *range(200, 215), 7, 7, 7, 7]
    assert batch.labels[0].tolist() == [1, 2, 100, 101, 7, *range(201, 215), 7, 7, 7, 7, 7]
    assert batch.loss_mask[0].tolist() == [1, 1, 0, 1, 0, *[1] * 14, 0, 0, 0, 0, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, *range(15), 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == batch.document_offsets.tolist() == [0, 3, 5, 20, 24]
    assert batch.max_seqlen == 15
    assert batch.document_ids == (0, 1, 2, -1)
    assert batch.source_ids.tolist() == [0, 1, 0, -1]


def test_a_step_knows_what_attention_takes_for_documents_on_every_rank():
    for resets, expected in ((True, [3, 2, 5, 4]), (False, [5, 9])):
        dataset = dataset_of([3, 2, 5, 4], 12, multiple=4, reset_attention_mask=resets)
        train = TrainConfig(global_batch_size=2, train_iters=1)
        for rank in (0, 1):
            loader = TrainLoader(dataset, train, shuffle=False, dp_rank=rank, dp_size=2, prefetch=0, multiple=8)
            assert [step.lengths.tolist() for step in loader] == [expected]


@pytest.mark.parametrize(
    ("precision", "tensor", "context", "tokens"),
    [("fp32", 1, 1, 1), ("fp32", 2, 2, 4), ("bf16", 1, 1, 64), ("bf16", 2, 1, 64), ("bf16", 1, 2, 128), ("bf16", 3, 2, 384)],
)
def test_every_ranks_part_of_a_row_is_aligned(precision, tensor, context, tokens):
    assert pack_alignment(precision, tensor, context) == tokens


def test_collate_without_packs_is_a_minimal_masked_batch():
    batch = collate(dataset_of([3]), [], multiple=4)
    assert batch.tokens.tolist() == [[7, 7, 7, 7]] and batch.loss_mask.sum() == 0
    assert batch.cu_seqlens.tolist() == [0, 4] and batch.document_ids == (-1,) and batch.max_seqlen == 4


def test_collate_keeps_document_offsets_when_attention_does_not_reset():
    batch = collate(dataset_of([3, 2], reset_attention_mask=False, reset_position_ids=False), [0], multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 5, 8] and batch.document_offsets.tolist() == [0, 3, 5, 8]
    assert batch.position_ids[0].tolist() == list(range(8)) and batch.source_ids.tolist() == [0, 1, -1]


def test_epoch_order_is_a_pure_function_of_seed_and_epoch():
    assert epoch_order(6, 1234, 0, True).tolist() == epoch_order(6, 1234, 0, True).tolist()
    orders = {tuple(epoch_order(50, seed, epoch, True).tolist()) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(4, 1, 9, False).tolist() == [0, 1, 2, 3]


def test_balanced_order_gives_each_step_like_costs():
    costs = np.random.default_rng(0).integers(1, 10**6, size=330)
    order = epoch_order(330, 1, 0, True, costs, 8)
    assert sorted(order.tolist()) == list(range(330))

    def spread(order):
        steps = costs[order[: 330 // 8 * 8]].reshape(-1, 8)
        return float(np.mean(steps.max(axis=1) / steps.mean(axis=1))) - 1

    assert spread(order) < 0.15 < 0.5 < spread(epoch_order(330, 1, 0, True))
    first_costs = costs[order[:256]].reshape(32, 8).mean(axis=1)
    assert first_costs.tolist() != sorted(first_costs.tolist())


def test_a_step_never_crosses_an_epoch():
    loader = TrainLoader(dataset_of([16] * 5), TrainConfig(global_batch_size=2, num_epoch=3), seed=1)
    steps = list(loader)
    assert [step.num_samples for step in steps] == [2, 2, 1] * 3
    second = [i for step in steps[3:6] for batch in step.micro_batches for i in batch.document_ids]
    assert second == epoch_order(5, 1, 1, True, attention_cost(loader.dataset.plan, loader.dataset.store.lengths), 2).tolist()


@pytest.mark.parametrize("num_packs, batch", [(5, 2), (4, 2), (3, 8), (1, 1)])
def test_steps_and_samples_are_inverse(num_packs, batch):
    for steps in range(20):
        samples = samples_of_steps(steps, num_packs, batch)
        assert steps_of_samples(samples, num_packs, batch) == steps


def test_steps_and_samples_from_any_position_are_those_of_walking():
    random = np.random.default_rng(0)
    for _ in range(2000):
        num_packs, batch, start, end, steps = (
            int(random.integers(low, high)) for low, high in ((1, 12), (1, 15), (0, 40), (0, 60), (0, 30))
        )
        position, count = start, 0
        while position < end:
            position, count = min(position + batch, (position // num_packs + 1) * num_packs, end), count + 1
        assert steps_of_samples(end, num_packs, batch, start) == count
        position = start
        for _ in range(steps):
            position = min(position + batch, (position // num_packs + 1) * num_packs)
        assert samples_of_steps(steps, num_packs, batch, start) == position


def test_total_samples_of_each_way_to_say_the_length():
    assert total_samples(TrainConfig(train_samples=12), 5, 2) == 12
    assert total_samples(TrainConfig(num_epoch=2.5), 5, 2) == 13
    assert total_samples(TrainConfig(num_epoch=0.1), 30, 2) == 3
    assert total_samples(TrainConfig(train_iters=4), 5, 2) == 7
    assert total_samples(TrainConfig(train_iters=4), 5, 2, iteration=1, consumed_samples=4) == 9, "the first step took 4"
    assert total_samples(TrainConfig(train_iters=4), 5, 2, iteration=9, consumed_samples=15) == 15


def test_packs_are_dealt_back_and_forth_and_short_ranks_get_empty_micro_batches():
    ids, tokens = np.arange(10, 15), np.full(20, 4)
    assert rank_micro_batches(ids, tokens, 0, 2, 2) == [[10, 13], [14]]
    assert rank_micro_batches(ids, tokens, 1, 2, 2) == [[11, 12], []]
    assert rank_micro_batches(ids[:1], tokens, 1, 2, 1) == [[]]


def test_micro_batches_are_filled_up_to_max_tokens():
    tokens = np.array([4, 5, 3, 9, 1])
    assert rank_micro_batches(np.arange(5), tokens, 0, 1, 1, max_tokens=8) == [[0], [1, 2], [3], [4]]
    assert rank_micro_batches(np.arange(5), tokens, 0, 1, 1, max_tokens=100) == [[0, 1, 2, 3, 4]]
    counts = {len(rank_micro_batches(np.arange(5), tokens, rank, 2, 1, max_tokens=8)) for rank in (0, 1)}
    assert counts == {3}


def run_of(dataset, train, consumed, dp_size, steps, order):
    """Trains `steps` steps from `consumed` with dp_size ranks; the documents seen, step by step, and the new position."""
    seen = []
    loaders = [
        iter(TrainLoader(dataset, train, seed=3, dp_rank=r, dp_size=dp_size, consumed_samples=consumed, prefetch=0))
        for r in range(dp_size)
    ]
    for _ in range(steps):
        ranks = [next(loader, None) for loader in loaders]
        if ranks[0] is None:
            break
        assert len({len(step.micro_batches) for step in ranks}) == 1
        assert len({step.num_samples for step in ranks}) == 1
        ids = [i for step in ranks for batch in step.micro_batches for i in batch.document_ids if i >= 0]
        seen.append(sorted(ids))
        assert seen[-1] == order(consumed)
        consumed += ranks[0].num_samples
    return seen, consumed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_tokens", [None, 40])
def test_50_stops_and_resizes_see_each_document_once_an_epoch_in_one_order(seed, max_tokens):
    random = np.random.default_rng(seed)
    dataset = dataset_of(some_lengths(150, seed))
    train = TrainConfig(micro_batch_size=2, global_batch_size=8, num_epoch=4, max_tokens_per_gpu=max_tokens)
    costs = attention_cost(dataset.plan, dataset.store.lengths)

    def order(consumed):
        epoch, start = divmod(consumed, len(dataset))
        packs = epoch_order(len(dataset), 3, epoch, True, costs, 8)[start : start + 8]
        return sorted(int(i) for p in packs for i in dataset.plan[int(p)])

    seen, consumed = [], 0
    for event in range(50):
        kept = int(random.integers(0, 3))
        lost = int(random.integers(0, 3))  # steps after the last checkpoint, run again after the crash
        dp_size = int(random.choice([1, 2, 4, 8]))
        steps, _ = run_of(dataset, train, consumed, dp_size, kept + lost, order)
        seen += steps[:kept]
        consumed = run_of(dataset, train, consumed, dp_size, kept, order)[1]
        if event == 49:
            seen += run_of(dataset, train, consumed, dp_size, 10**6, order)[0]
    assert sorted(i for step in seen for i in step) == sorted(list(range(150)) * 4)
    per_epoch = -(-len(dataset) // 8)
    for epoch in range(4):
        steps = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in steps for i in step) == list(range(150))


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_size_that_changes_anywhere_leaves_each_document_once_an_epoch(seed):
    """The position is consumed_samples and, inside an epoch, the batch size that its order was made for."""
    random = np.random.default_rng(seed)
    dataset = dataset_of(some_lengths(120, seed))
    consumed, iteration, made_for, seen = 0, 0, None, []
    while True:
        train = TrainConfig(
            micro_batch_size=int(random.integers(1, 4)), global_batch_size=int(random.integers(1, 30)), num_epoch=3
        )
        dp_size, stop = int(random.integers(1, 5)), int(random.integers(1, 6))
        place = dict(consumed_samples=consumed, iteration=iteration, order_batch_size=made_for, prefetch=0, dp_size=dp_size)
        ranks = [TrainLoader(dataset, train, dp_rank=rank, **place) for rank in range(dp_size)]
        for _, *steps in zip(range(stop), *ranks, strict=False):
            seen += [i for step in steps for batch in step.micro_batches for i in batch.document_ids if i >= 0]
            consumed, iteration, made_for = consumed + steps[0].num_samples, iteration + 1, steps[0].order_batch_size
        if consumed == 3 * len(dataset):
            break
    assert iteration == len(ranks[0])
    for epoch in range(3):
        assert sorted(seen[120 * epoch : 120 * (epoch + 1)]) == list(range(120))


def test_the_digest_is_that_of_packs_and_order():
    plan, again = (dataset_of(some_lengths(40)).plan for _ in range(2))
    assert order_digest(plan, 1, True) == order_digest(again, 1, True)
    others = [order_digest(plan, 2, True), order_digest(plan, 1, False), order_digest(dataset_of(some_lengths(41)).plan, 1, True)]
    assert len({order_digest(plan, 1, True), *others}) == 4


def test_prefetch_gives_the_same_steps_and_ends():
    dataset = dataset_of(some_lengths(40))
    train = TrainConfig(micro_batch_size=2, global_batch_size=4, num_epoch=2)

    def ids(loader):
        return [[b.document_ids for b in step.micro_batches] for step in loader]

    ahead = TrainLoader(dataset, train, prefetch=3)
    assert ids(ahead) == ids(TrainLoader(dataset, train, prefetch=0))
    assert len(ahead) == len(ids(ahead)) == 2 * -(-len(dataset) // 4)
    assert [step.epoch for step in ahead][-1] == 2.0


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("sft-prefetch")]


def test_prefetch_thread_ends_with_its_iterator():
    loader = TrainLoader(dataset_of(some_lengths(40)), TrainConfig(train_samples=10**9), prefetch=2)
    steps = iter(loader)
    next(steps)
    assert prefetch_threads()
    del steps
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()
    assert loader.wait_ms >= 0 and 0 <= loader.queue_depth <= 2


def test_what_fails_in_the_thread_is_raised_by_the_iterator():
    dataset = dataset_of([3, 4, 5])
    dataset.plan.doc_ids[-1] = 77
    with pytest.raises(IndexError):
        list(TrainLoader(dataset, TrainConfig(num_epoch=1), prefetch=2))


def test_valid_loader_is_one_fixed_pass_at_most():
    dataset = dataset_of(some_lengths(40))
    size = len(dataset)

    def packs(eval_iters, dp_size=1):
        train = TrainConfig(global_batch_size=4, eval_iters=eval_iters)
        loaders = [ValidLoader(dataset, train, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
        return [step.num_samples for step in loaders[0]], [len(step.micro_batches) for step in loaders[-1]]

    assert sum(packs(-1)[0]) == sum(packs(10**6)[0]) == size
    assert packs(2)[0] == [4, 4] and packs(2, 4)[1] == [1, 1]
    loader = ValidLoader(dataset, TrainConfig(global_batch_size=4, eval_iters=-1))
    first, again = ([b.document_ids for s in loader for b in s.micro_batches] for _ in range(2))
    assert first == again and [i for ids in first for i in ids] == list(range(40))
