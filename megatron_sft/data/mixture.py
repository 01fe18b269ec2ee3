"""How often each source's documents stand in one epoch of a mixture. Pure numpy; the order is the loader's matter.

train_epochs (1.0, 2.5), 10 documents each -> the first source once, the second 25 times in all: 2 whole passes and
5 of its documents, drawn by the seed, once more.
"""

from collections.abc import Sequence

import numpy as np


def mixture_documents(documents: np.ndarray, source_ids: np.ndarray, epochs: Sequence[float], seed: int) -> np.ndarray:
    """The documents of one epoch of the mixture, repeated as often as their source's epochs say.

    Args:
        documents: int64 [n], ids of the store's documents that are trained on.
        source_ids: [documents of the store], the source of each document.
        epochs: one per source, fractions allowed; empty: each source once.
        seed: of the choice of documents for a fraction.

    Returns:
        int64 [m] document ids: the first pass over all sources in the given order, then the second, and so on.
    """
    if not len(epochs):
        return documents
    owners = np.asarray(source_ids)[documents]
    keys = np.empty(len(documents))
    for source in range(len(epochs)):
        mine = np.flatnonzero(owners == source)
        # Rank 0 .. 1 of each document within its source, shuffled: the fraction takes the lowest ranks, so exactly its share.
        keys[mine] = np.random.default_rng([seed, source]).permutation(len(mine)) / max(1, len(mine))
    wanted = np.asarray(epochs, dtype=np.float64)[owners]
    passes = [documents[keys < wanted - turn - 1e-9] for turn in range(int(np.ceil(max(epochs))))]
    return np.concatenate(passes) if passes else documents[:0]


def epochs_from_weights(weights: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """Epochs that give each source its share of the mixture, which stays as large as all sources together.

    Args:
        weights: relative shares (--prompt-data-weights), need not sum to 1.
        sizes: rows (or tokens) of each source.

    Example: weights (1, 1), sizes (30, 10) -> (20/30, 20/10).
    """
    total, share = sum(sizes), sum(weights)
    return tuple(weight / share * total / size if size else 0.0 for weight, size in zip(weights, sizes, strict=True))
