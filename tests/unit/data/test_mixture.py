"""Epochs and weights of sources come out exactly, and the choice is the seed's alone."""

import numpy as np
import pytest

from megatron_sft.data.mixture import epochs_from_weights, mixture_documents

SOURCES = np.array([0] * 10 + [1] * 10 + [2] * 4, dtype=np.int16)
ALL = np.arange(24)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [((1, 1, 1), (10, 10, 4)), ((1, 2.5, 0), (10, 25, 0)), ((0.3, 3, 0.5), (3, 30, 2)), ((1.1, 1.9, 2), (11, 19, 8))],
)
def test_each_source_stands_as_often_as_asked(epochs: tuple[float, ...], expected: tuple[int, ...]) -> None:
    documents = mixture_documents(ALL, SOURCES, epochs, seed=1)
    assert tuple(np.bincount(SOURCES[documents], minlength=3)) == expected
    counts = np.bincount(documents, minlength=24)
    for source, passes in enumerate(epochs):
        mine = counts[SOURCES == source]
        assert mine.min() >= int(passes) and mine.max() <= np.ceil(passes)


def test_the_same_seed_gives_the_same_documents_and_another_seed_others() -> None:
    first, again, other = (mixture_documents(ALL, SOURCES, (0.5, 1.5, 1), seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_without_epochs_and_with_held_out_documents_only_the_given_ones_stand() -> None:
    assert mixture_documents(ALL, SOURCES, (), 1).tolist() == ALL.tolist()
    assert mixture_documents(ALL[::2], SOURCES, (2, 1, 1), 1).tolist() == [*range(0, 24, 2), *range(0, 10, 2)]


def test_weights_become_epochs_that_keep_the_size() -> None:
    epochs = epochs_from_weights((1, 1), (30, 10))
    assert epochs == (20 / 30, 2.0)
    documents = mixture_documents(np.arange(40), np.array([0] * 30 + [1] * 10), epochs, 1)
    assert np.bincount(np.array([0] * 30 + [1] * 10)[documents]).tolist() == [20, 20]
    assert epochs_from_weights((1, 3), (0, 5)) == (0.0, 0.75)
