"""Packing: document lengths -> which documents share a sequence of fixed capacity. Pure numpy, no torch, no I/O.

Not here: tokens (store.py), tensors (sft_dataset.py), order of packs (loader.py). Over-long documents are cut or
dropped before (tokens.py): a length above the capacity is our own bug.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackPlan:
    """Which documents share a pack: indices, not copies.

    Example: packs [0, 2] and [1] -> doc_ids [0, 2, 1], offsets [0, 2, 3].
    """

    doc_ids: np.ndarray
    """int64 [n]: document ids, pack after pack."""
    offsets: np.ndarray
    """int64 [packs + 1]: pack i is doc_ids[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Document ids of pack `index`, int64 [k]."""
        return self.doc_ids[self.offsets[index] : self.offsets[index + 1]]

    def remapped(self, doc_ids: np.ndarray) -> "PackPlan":
        """The plan with document j replaced by doc_ids[j]: for packs made of a selection, repeats allowed."""
        return PackPlan(np.asarray(doc_ids, dtype=np.int64)[self.doc_ids], self.offsets)


def pack(lengths: np.ndarray, capacity: int, method: str, multiple: int = 1) -> PackPlan:
    """Puts documents into packs of at most `capacity` tokens.

    Args:
        lengths: int [docs], tokens per document, each in 1..capacity.
        capacity: tokens per pack (seq_length).
        method: best-fit (documents from long to short, each into the fullest pack that still has room), sequential
            (in order, a new pack when the next document does not fit) or none (one document a pack).
        multiple: every document is padded up to a multiple of it (context parallelism).

    Returns:
        A plan in which each document is in exactly one pack. The same arguments give the same plan.
    """
    padded = padded_lengths(lengths, multiple)
    longest = int(padded.max(initial=0))
    assert longest <= capacity, f"a document of {longest} padded tokens cannot be packed into {capacity}"
    assert int(padded.min(initial=1)) >= 1, "an empty document cannot be packed"
    methods = {"best-fit": _best_fit, "sequential": _sequential, "none": _one_each}
    return methods[method](padded, capacity)


def padded_lengths(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to a multiple: [3, 4, 5], 4 -> [4, 4, 8]. int64 [docs]."""
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def token_counts(plan: PackPlan, lengths: np.ndarray) -> np.ndarray:
    """Tokens in each pack. int64 [packs]."""
    return _sum_by_pack(plan, np.asarray(lengths, dtype=np.int64)[plan.doc_ids])


def attention_cost(plan: PackPlan, lengths: np.ndarray) -> np.ndarray:
    """Sum of squared document lengths of each pack: what attention costs, up to a factor. int64 [packs]."""
    return _sum_by_pack(plan, np.asarray(lengths, dtype=np.int64)[plan.doc_ids] ** 2)


def packing_figures(plan: PackPlan, lengths: np.ndarray, capacity: int) -> Mapping[str, float]:
    """Figures for the report: packs, documents, tokens, documents a pack, share of slots that hold a token."""
    tokens = int(token_counts(plan, lengths).sum())
    packs = max(len(plan), 1)
    return {
        "packs": len(plan),
        "documents": len(plan.doc_ids),
        "tokens": tokens,
        "documents_per_pack": len(plan.doc_ids) / packs,
        "efficiency": tokens / (packs * capacity),
    }


def _sum_by_pack(plan: PackPlan, values: np.ndarray) -> np.ndarray:
    if not len(plan):
        return np.zeros(0, dtype=np.int64)
    return np.add.reduceat(values, plan.offsets[:-1])


def _best_fit(lengths: np.ndarray, capacity: int) -> PackPlan:
    """Best-fit decreasing, by buckets of equal length and equal room, so that the loop runs over sizes, not documents.

    Documents of length L go into the packs with the least room r >= L. All packs with that room are alike, and each
    takes r // L documents before another is touched: what one-at-a-time best-fit decreasing does, in one numpy step.
    Example: capacity 10, lengths [6, 4, 4, 3] -> packs [6, 4] and [4, 3].
    """
    order = np.argsort(-lengths.astype(np.int32), kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    packs_with_room: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []  # keys of packs_with_room, sorted
    num_packs, at = 0, 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            where = bisect.bisect_left(rooms, size)
            if where < len(rooms):
                room = rooms[where]
                packs = packs_with_room[room].pop()
                if not packs_with_room[room]:
                    del packs_with_room[room], rooms[where]
            else:
                room = capacity
                packs = np.arange(num_packs, num_packs - (-count // (capacity // size)))
                num_packs += len(packs)
            each = room // size
            used = min(len(packs), -(-count // each))
            placed = min(count, used * each)
            pack_of[order[at : at + placed]] = np.repeat(packs[:used], each)[:placed]
            full = placed // each
            _give_room(packs_with_room, rooms, room - each * size, packs[:full])
            _give_room(packs_with_room, rooms, room - (placed - full * each) * size, packs[full:used])
            _give_room(packs_with_room, rooms, room, packs[used:])
            at += placed
            count -= placed
    by_pack = np.argsort(pack_of[order], kind="stable")
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return PackPlan(order[by_pack].astype(np.int64), offsets)


def _give_room(packs_with_room: dict[int, list[np.ndarray]], rooms: list[int], room: int, packs: np.ndarray) -> None:
    """Files `packs` under the room they have left; full packs are forgotten."""
    if not room or not len(packs):
        return
    if room not in packs_with_room:
        packs_with_room[room] = []
        bisect.insort(rooms, room)
    packs_with_room[room].append(packs)


def _sequential(lengths: np.ndarray, capacity: int) -> PackPlan:
    """Next-fit: [5, 4, 3, 2], capacity 9 -> packs [0, 1], [2, 3]."""
    ends = np.cumsum(lengths)
    offsets = [0]
    while offsets[-1] < len(lengths):
        before = int(ends[offsets[-1] - 1]) if offsets[-1] else 0
        offsets.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return PackPlan(np.arange(len(lengths), dtype=np.int64), np.asarray(offsets, dtype=np.int64))


def _one_each(lengths: np.ndarray, capacity: int) -> PackPlan:
    return PackPlan(np.arange(len(lengths), dtype=np.int64), np.arange(len(lengths) + 1, dtype=np.int64))
