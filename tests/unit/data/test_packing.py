import numpy as np
import pytest

from megatron_sft.data.packing import attention_cost, pack, packing_figures, padded_lengths, token_counts


def packs_of(plan):
    return [plan[i].tolist() for i in range(len(plan))]


def plain_best_fit_decreasing(lengths, capacity):
    """The textbook algorithm, one document at a time: room left in each pack, in the order in which packs are opened."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize(
    "method, packs",
    [
        ("best-fit", [[0, 1], [2, 3]]),
        ("sequential", [[0, 1], [2, 3]]),
        ("none", [[0], [1], [2], [3]]),
    ],
)
def test_packs_of_a_small_example(method, packs):
    assert packs_of(pack(np.array([6, 4, 4, 3]), 10, method)) == packs


def test_best_fit_fills_the_fullest_pack_first():
    assert packs_of(pack(np.array([2, 7, 3, 6, 1]), 10, "best-fit")) == [[1, 2], [3, 0, 4]]


@pytest.mark.parametrize("seed", range(40))
def test_best_fit_leaves_the_room_of_the_textbook_algorithm(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(8, 64))
    lengths = random.integers(1, capacity + 1, size=int(random.integers(1, 300)))
    plan = pack(lengths, capacity, "best-fit")
    assert sorted(plan.doc_ids.tolist()) == list(range(len(lengths)))
    rooms = sorted((capacity - token_counts(plan, lengths)).tolist())
    assert rooms == plain_best_fit_decreasing(lengths.tolist(), capacity)


def test_best_fit_is_nearly_full_on_chat_like_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(7, 1, 50_000), 8, 4096).astype(np.int32)
    assert packing_figures(pack(lengths, 4096, "best-fit"), lengths, 4096)["efficiency"] >= 0.999


def test_sequential_opens_a_pack_when_the_next_document_does_not_fit():
    assert packs_of(pack(np.array([5, 4, 3, 2, 9, 1]), 9, "sequential")) == [[0, 1], [2, 3], [4], [5]]


def test_documents_are_padded_to_a_multiple():
    assert padded_lengths(np.array([3, 4, 5]), 4).tolist() == [4, 4, 8]
    assert packs_of(pack(np.array([3, 4, 5]), 8, "best-fit", multiple=4)) == [[2], [0, 1]]


@pytest.mark.parametrize("method", ["best-fit", "sequential", "none"])
def test_no_documents_make_no_packs(method):
    plan = pack(np.zeros(0, dtype=np.int32), 8, method)
    assert len(plan) == 0 and token_counts(plan, np.zeros(0, dtype=np.int32)).tolist() == []


def test_counts_and_costs():
    lengths = np.array([6, 4, 4, 3])
    plan = pack(lengths, 10, "best-fit")
    assert token_counts(plan, lengths).tolist() == [10, 7]
    assert attention_cost(plan, lengths).tolist() == [52, 25]
    assert packing_figures(plan, lengths, 10) == {
        "packs": 2,
        "documents": 4,
        "tokens": 17,
        "documents_per_pack": 2.0,
        "efficiency": 0.85,
    }


def test_a_plan_is_remapped_to_a_selection_with_repeats():
    plan = pack(np.array([6, 4, 4, 3]), 10, "best-fit").remapped(np.array([7, 7, 1, 0]))
    assert packs_of(plan) == [[7, 7], [1, 0]]


def test_a_document_above_the_capacity_is_refused():
    with pytest.raises(AssertionError, match="a document of 11 padded tokens cannot be packed into 10"):
        pack(np.array([11]), 10, "best-fit")
