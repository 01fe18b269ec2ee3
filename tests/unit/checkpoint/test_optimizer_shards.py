"""Flat ranges of a parameter as boxes."""

import itertools

import torch

from megatron_sft.checkpoint.optimizer_shards import flat_boxes


def test_the_example_of_the_docstring():
    assert flat_boxes((3, 4), 2, 9) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert flat_boxes((3, 4), 0, 12) == [((0, 0), (3, 4))]
    assert flat_boxes((), 0, 1) == [((), ())] and flat_boxes((3, 4), 5, 5) == []


def test_boxes_are_the_elements_of_the_range_in_order():
    """Every range of tensors with one to four dimensions."""
    for shape in ((7,), (3, 4), (2, 3, 4), (2, 1, 3, 2)):
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        for start, end in itertools.combinations(range(numbers.numel() + 1), 2):
            parts = [
                numbers[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].reshape(-1)
                for offsets, sizes in flat_boxes(shape, start, end)
            ]
            assert torch.cat(parts).tolist() == list(range(start, end)) and len(parts) <= 2 * len(shape) - 1
